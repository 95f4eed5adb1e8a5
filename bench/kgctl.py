"""How long an operator waits for `kgctl`, start included: 1,000 nodes and 10 peers in one real etcd on loopback.

    python bench/kgctl.py

All commands that only read are there but those that ask the hosts, and so last as long as these take to answer, or as
the patience of the command where they do not: `check`, `status --live`, `explain --live`, `graph` without `--plain`.

Each command is a process of its own; the rounds take the commands in turn. `etcdctl get --prefix` of the same keys and
`python -c pass` are in the same rounds, for comparison. CPU is user's and system's time of the process: on a machine
that others use too it says more than the clock.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import time
from base64 import b64encode
from hashlib import sha256
from ipaddress import ip_network
from pathlib import Path
from statistics import median

import trio

from _fill import LEASE_SECONDS, records
from _table import console, runs, spread, table
from kilo_etcd.etcd.client import open_client
from kilo_etcd.store import operator
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import PeerRecord, Role, StatusRecord, encode
from kilo_etcd.testing.etcd_server import EtcdServer
from kilo_etcd.topology.segments import build_topology

NODES = 1000
PEERS = 10
KGCTL = str(Path(sys.executable).with_name("kgctl"))
COMMANDS = {
    "python -c pass": (sys.executable, "-c", "pass"),
    "etcdctl get --prefix /kilo": ("etcdctl", "get", "--prefix", "/kilo"),
    **{
        f"kgctl {arguments}": (KGCTL, *arguments.split())
        for arguments in (
            "--version",
            "--help",
            "completion bash",
            "mesh show",
            "location list",
            "location list -o json",
            "node list",
            "node list -o json",
            "node show node-15",
            "peer list",
            "peer list -o json",
            "peer show peer-7",
            "showconf node node-15",
            "showconf node node-15 --as-peer",
            "showconf peer peer-7",
            "status",
            "status -o json",
            "explain node-15 node-987",
            "explain node-15 node-987 -o json",
            "graph --plain",
            "graph --plain -o json",
            "graph --plain -o mermaid",
        )
    },
    "tab after: kgctl node show node-98": (
        *("env", "_KGCTL_COMPLETE=bash_complete", "COMP_WORDS=kgctl node show node-98", "COMP_CWORD=3", KGCTL),
    ),
}


async def fill(server: EtcdServer) -> None:
    keys = Keys()
    async with open_client(server.config()) as client:
        await client.put("/kilo/mesh/subnets", "10.4.0.0/16")
        await client.put("/kilo/mesh/granularity", "location")
        lease = (await client.grant_lease(LEASE_SECONDS)).id
        hosts = records(NODES, "172.24.0.0/16", lease)
        for start in range(0, len(hosts), 25):
            await client.txn([], [put for puts in hosts[start : start + 25] for put in puts])
        for number in range(1, PEERS + 1):
            key = b64encode(sha256(b"%d" % number).digest()).decode()
            peer = PeerRecord(public_key=key, allowed_ips=(ip_network(f"10.9.0.{number}"),))
            await client.put(keys.peer(f"peer-{number}"), encode(peer))
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
            await client.put(keys.status(name), encode(status), lease=lease)


def cpu_seconds() -> float:
    """What the processes that have ended by now have used."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


async def main() -> None:
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    worked: dict[str, list[float]] = {name: [] for name in COMMANDS}
    async with EtcdServer.run() as server:
        await fill(server)
        # An installed kgctl has its bytecode; without, each start compiles all modules anew.
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
        environment = {**environment, "ETCDCTL_ENDPOINTS": server.endpoint, "ETCDCTL_API": "3"}
        for number in range(runs(10, 3) + 1):
            for name, command in COMMANDS.items():
                cpu, began = cpu_seconds(), time.perf_counter()
                done = await trio.run_process(command, env=environment, stdout=subprocess.DEVNULL, check=False)
                if done.returncode not in (0, 1):
                    raise SystemExit(f"bench/kgctl: {name} ended with {done.returncode}")
                if number:  # the first round fills the caches
                    seconds[name].append(time.perf_counter() - began)
                    worked[name].append(cpu_seconds() - cpu)
    shown = table(
        f"kgctl at {NODES:,} nodes, start included, milliseconds",
        "command",
        "runs",
        "min",
        "median",
        "max",
        "CPU median",
    )
    for name, taken in seconds.items():
        shown.add_row(name, *spread(taken), f"{median(worked[name]) * 1000:.0f}")
    console.print(shown)


if __name__ == "__main__":
    trio.run(main)
