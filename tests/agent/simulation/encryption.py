"""What must hold under `encrypted`, and on the way there and back: by what the kernels in memory hold.

At rest:

* with the setting, every node is at the last stage, and what nodes of two segments say to each other at internal IPs
  goes through a tunnel in both directions, but for the addresses of which `kgctl status` says that they do not;
* a host that gets all that a node sends it through the tunnel refuses the node's packets in clear, and nobody is
  refused who sends in clear, nor anybody but nodes of other segments;
* without it, no record, report, plan or kernel has anything of it, and reverse-path checks are as they were.

At every step:

* of two hosts whose kernels have taken all of one and the same snapshot, neither refuses the other's packets in clear
  while the other sends them so;
* in a schedule of `steady` hosts (each alone in its segment, whose agents are never away for so long that others go on
  without them) no packet between two of them is lost, at whichever stages they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import permutations
from typing import TYPE_CHECKING

import trio

from kilo_etcd.agent.stage_watch import GONE_SECONDS
from kilo_etcd.kernel.routing import encrypted
from kilo_etcd.kernel.routing.exit_node import MARK
from kilo_etcd.kernel.state import Observed
from kilo_etcd.model import DEFAULT_INTERFACE, EncryptionStage, InternalIPs, IPAddress, Node, Snapshot
from kilo_etcd.store.keys import Keys
from kilo_etcd.topology.families import same_site
from kilo_etcd.topology.places import own_addresses
from kilo_etcd.topology.segments import Topology, host_network
from kilo_etcd.topology.unrouted import unrouted
from simulation.network import T, refused

if TYPE_CHECKING:
    from simulation.host import SimulatedAgent, SimulatedHost
    from simulation.world import World

KEYS = Keys()

ABSENT_SECONDS = GONE_SECONDS - 8.0
"""How long an agent may be without a status and not be gone for others, less what it may take to report again."""
LAPSE_SECONDS, JOIN_SECONDS = 30.0, 5.0
"""For so long a host is not `steady` after its agent was absent for longer (others may have gone on without it), or
while another host came for the first time, which it does not know; and after it has come for the first time itself: the
others follow."""


# -- at rest --------------------------------------------------------------------------------------------------------


def at_rest(world: World, topology: Topology, agents: Mapping[str, SimulatedAgent]) -> None:
    """AssertionError: something is not as it must be, or not yet."""
    on = topology.internal_ips is InternalIPs.ENCRYPTED
    wanted = EncryptionStage.SENDS if on else None
    for node in topology.snapshot.nodes.values():
        assert node.encryption is wanted, f"{node.name} is at {node.encryption}, not {wanted}"
    if not on:
        assert not [key for key in world.etcd.keys(KEYS.status_by_root) if key.endswith("/stage")], (
            "stages are reported"
        )
        for name, agent in agents.items():
            _nothing_left(world.hosts[name], agent)
        return
    for host in world.members():
        loose = set(host.machine.observed.loosened)
        assert loose == set(host.strict), f"{host.name} has {loose or 'nothing'} loosened"
    left_out = [one.network for one in unrouted(topology)]
    for name, other in permutations(agents, 2):
        apart = _apart(topology, name, other)
        for ip in topology.snapshot.nodes[other].internal_ips:
            if any(ip.version == network.version and ip.ip in network for network in left_out):
                continue
            fate = world.network.fate(name, ip.ip)
            assert fate == ("encrypted" if apart else "clear"), f"what {name} sends to {other} at {ip.ip}: {fate}"
        _refusals(world, topology, name, other)


def _nothing_left(host: SimulatedHost, agent: SimulatedAgent) -> None:
    observed = host.machine.observed
    assert agent.state.plan is not None
    assert agent.state.plan.encryption is None, f"the plan of {host.name} encrypts"
    rules = [rule for rule in observed.policy.rules if encrypted.is_ours(rule.priority)]
    assert not rules, f"{host.name} has the rules {'; '.join(map(str, rules))}"
    assert T not in observed.policy.tables, f"{host.name} has the table of `encrypted`"
    assert observed.mark != MARK or agent.state.plan.exit_route is not None, f"{host.name} marks WireGuard's packets"
    chains = () if observed.table is None else [chain.name for chain in observed.table.chains]
    assert "encrypted" not in chains, f"{host.name} has the chains {chains}"
    assert not observed.loosened, f"{host.name} has {observed.loosened} loosened"
    assert host.strict.items() <= observed.strict.items(), f"{host.name} is strict at {observed.strict} only"


def _apart(topology: Topology, name: str, other: str) -> bool:
    """Whether what two nodes say to each other goes from segment to segment."""
    here, there = topology.segment_of(name), topology.segment_of(other)
    if here.key == there.key:
        return False
    near = here.leader.location == there.leader.location and same_site(here.leader, there.leader)
    return not (near and topology.snapshot.granularity == "cross")


def _refusals(world: World, topology: Topology, name: str, other: str) -> None:
    """Whom a host refuses of another node's addresses."""
    nodes, host, there = topology.snapshot.nodes, world.hosts[name].machine.observed, world.hosts[other].machine
    alone = len(topology.segment_of(name).members) == 1
    for version in (4, 6):
        own, theirs = (_addresses(nodes[one], version) for one in (name, other))
        whole = own and all(_sent(there.observed, address) for address in own)
        for address in theirs:
            refuses = _refuses(host, address)
            if refuses:
                clear = [str(one) for one in own if not _sent(there.observed, one)]
                assert not clear, f"{name} refuses {other}, which sends in clear to {clear}"
            elif whole and alone and _apart(topology, name, other) and _sent(host, address):
                raise AssertionError(f"{name} takes what comes from {address} of {other} in clear")


def _addresses(node: Node, version: int) -> list[IPAddress]:
    return [address for address in own_addresses(node) if address.version == version]


def _sent(observed: Observed, address: IPAddress) -> bool:
    """Whether a kernel sends to an address by the table of `encrypted`, or holds it."""
    table, network = observed.policy.table(T), host_network(address)
    return network in table.routes or network in table.last


def _refuses(observed: Observed, address: IPAddress) -> bool:
    return any(address in address_set.addresses for address_set in refused(observed))


# -- at every step --------------------------------------------------------------------------------------------------


def sent_in_clear(snapshot: Snapshot, one: SimulatedHost, other: SimulatedHost) -> str:
    """Which of two hosts that have applied a snapshot refuses what the other sends in clear; empty: none does."""
    for here, there in ((one, other), (other, one)):
        observed, node = here.machine.observed, snapshot.nodes.get(here.name)
        peer = snapshot.nodes.get(there.name)
        if node is None or peer is None:
            continue
        for ip in peer.internal_ips:
            if not _refuses(observed, ip.ip):
                continue
            clear = [str(own.ip) for own in node.internal_ips
                     if own.version == ip.version and not _sent(there.machine.observed, own.ip)]  # fmt: skip
            if clear:
                return f"{here.name} refuses {there.name} at {ip.ip}, which sends to {', '.join(clear)} in clear"
    return ""


class Steady:
    """Looks at what becomes of packets between hosts that are each alone in their segments."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._lapsed: dict[str, float] = {}
        """The hosts that have ever had a status in etcd -> when one was last without for too long."""
        self._absent: dict[str, float] = {}
        """Those without one now -> since when."""
        self._came = 0.0
        """When a host came for the first time, the last of them."""

    async def run(self) -> None:
        """See whose leases end."""
        while True:
            self._look()
            await trio.sleep(0.5)

    def _look(self) -> None:
        for name in self._world.hosts:
            if self._world.etcd.get(KEYS.status(name)) is not None:
                if name not in self._lapsed:
                    self._lapsed[name] = trio.current_time() + JOIN_SECONDS - LAPSE_SECONDS
                    self._came = trio.current_time()
                self._absent.pop(name, None)
            elif name in self._lapsed:
                since = self._absent.setdefault(name, trio.current_time())
                if trio.current_time() - since > ABSENT_SECONDS or self._came > since - JOIN_SECONDS:
                    self._lapsed[name] = trio.current_time()

    def lost(self, settled: Mapping[str, bool]) -> Iterator[str]:
        """What is lost between two hosts. `settled`: whose kernels are as they have been programmed."""
        self._look()
        since = trio.current_time() - LAPSE_SECONDS
        hosts = [
            host for name, host in self._world.hosts.items()
            if host.condition.powered and settled.get(name) and self._lapsed.get(name, since + 1) <= since
        ]  # fmt: skip
        for here, there in permutations(hosts, 2):
            if here.name[0] != there.name[0] and "off" in self._world.shape.modes:
                continue  # Between sites the routes of `routed` have no stages.
            for source, target in zip(here.place.inside, there.place.inside, strict=True):
                why = _lost(here, there, source.ip, target.ip)
                if why:
                    yield f"{here.name} to {there.name} at {target.ip}: {why}"


def _has_met(host: SimulatedHost, other: SimulatedHost) -> bool:
    """Whether the agent that runs has put a plan into force that has the other host as a peer."""
    plan = None if host.agent is None else host.agent.state.plan
    return plan is not None and other.public_key in plan.peers


def _lost(here: SimulatedHost, there: SimulatedHost, source: IPAddress, target: IPAddress) -> str:
    """What becomes of a packet between two hosts, neither of which has a leader but itself; empty: it arrives."""
    observed, remote = here.machine.observed, there.machine.observed
    network = host_network(target)
    table = observed.policy.table(T)
    route = table.routes.get(network)
    if route is None and network in table.last:
        return "it is held"
    if route is None:
        route = observed.routes.get(network)
    if route is None or route.device != DEFAULT_INTERFACE:
        return f"{there.name} refuses it, as it comes in clear" if _refuses(remote, source) else ""
    out, into = observed.peers.get(there.public_key), remote.peers.get(here.public_key)
    if out is None or network not in out.allowed_ips:
        return f"{here.name} has no peer that it is for"
    if into is None and not _has_met(there, here):
        return ""  # Its agent has been away since before that node joined: there can be no tunnel between the two.
    if into is None or host_network(route.source or source) not in into.allowed_ips:
        return f"{there.name} does not take {route.source} out of the tunnel"
    return ""
