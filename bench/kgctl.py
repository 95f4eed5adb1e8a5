"""How long an operator waits for `kgctl`, its start included, with 1,000 nodes in one real etcd on loopback.

    python bench/kgctl.py

Each command is a process of its own; the rounds take the commands in turn. `etcdctl get --prefix` of the same keys and
`python -c pass` are in the same rounds, for comparison.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import trio

from _fill import records
from _table import console, runs, spread, table
from kilo_etcd.etcd import open_client
from kilo_etcd.store import operator
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import Role, StatusRecord, encode
from kilo_etcd.testing.etcd_server import EtcdServer
from kilo_etcd.topology.segments import build_topology

NODES = 1000
KGCTL = str(Path(sys.executable).with_name("kgctl"))
COMMANDS = {
    "python -c pass": (sys.executable, "-c", "pass"),
    "etcdctl get --prefix /kilo": ("etcdctl", "get", "--prefix", "/kilo"),
    "kgctl --version": (KGCTL, "--version"),
    "kgctl mesh show": (KGCTL, "mesh", "show"),
    "kgctl node list": (KGCTL, "node", "list"),
    "kgctl node show node-15": (KGCTL, "node", "show", "node-15"),
    "kgctl showconf node node-15": (KGCTL, "showconf", "node", "node-15"),
    "kgctl peer list": (KGCTL, "peer", "list"),
    "kgctl location list": (KGCTL, "location", "list"),
    "kgctl status": (KGCTL, "status"),
    "kgctl status -o json": (KGCTL, "status", "-o", "json"),
    "kgctl graph --plain": (KGCTL, "graph", "--plain"),
    "kgctl explain node-15 node-987": (KGCTL, "explain", "node-15", "node-987"),
}


async def fill(server: EtcdServer) -> None:
    keys = Keys()
    async with open_client(server.config()) as client:
        await client.put("/kilo/mesh/subnets", "10.4.0.0/16")
        await client.put("/kilo/mesh/granularity", "location")
        hosts = records(NODES, "172.24.0.0/16")
        for start in range(0, len(hosts), 25):
            await client.txn([], [put for puts in hosts[start : start + 25] for put in puts])
        snapshot, _ = await operator.snapshot(client, keys)
        topology = build_topology(snapshot)
        for name, node in snapshot.nodes.items():
            leader = topology.segment_of(name).leader.name
            status = StatusRecord(
                public_key=node.public_key,
                revision=snapshot.revision,
                role=Role.LEADER if leader == name else Role.MEMBER,
                location=node.location,
                leader=leader,
            )
            await client.put(keys.status(name), encode(status))


async def main() -> None:
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    async with EtcdServer.run() as server:
        await fill(server)
        # An installed kgctl has its bytecode; without, each start compiles all modules anew.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment = {**environment, "ETCDCTL_ENDPOINTS": server.endpoint, "ETCDCTL_API": "3"}
        for number in range(runs(10, 3) + 1):
            for name, command in COMMANDS.items():
                began = time.perf_counter()
                done = await trio.run_process(command, env=environment, stdout=subprocess.DEVNULL, check=False)
                if done.returncode not in (0, 1):
                    raise SystemExit(f"bench/kgctl: {name} ended with {done.returncode}")
                if number:  # the first round fills the caches
                    seconds[name].append(time.perf_counter() - began)
    shown = table(f"kgctl at {NODES:,} nodes, start included, milliseconds", "command", "runs", "min", "median", "max")
    for name, taken in seconds.items():
        shown.add_row(name, *spread(taken))
    console.print(shown)


if __name__ == "__main__":
    trio.run(main)
