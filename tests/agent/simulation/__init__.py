"""Whole agents by the dozen, on one etcd in memory and a kernel each, in virtual time, with faults drawn from a seed.

The agents are the real ones: only etcd's client, the kernel and the packets that make WireGuard shake hands are not.
docs/simulation.md says what is checked, and how to play a schedule again. From below:

    clockwork   one process plays many hosts, the same way each time
    network     who gets an answer from whom, by what the kernels hold
    host        a machine, and its agent while it runs
    invariants  what must hold at every step
    encryption  what must hold under `encrypted`, and while it is switched
    faults      what goes wrong
    world       a world drawn from a seed, and what must hold at rest
"""

from simulation.clockwork import seeded
from simulation.host import SimulatedHost, in_memory
from simulation.world import KEYS, Shape, World, run_schedule, without_cause

__all__ = ["KEYS", "Shape", "SimulatedHost", "World", "in_memory", "run_schedule", "seeded", "without_cause"]
