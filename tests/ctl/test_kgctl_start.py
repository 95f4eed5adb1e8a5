"""What a start of `kgctl` costs, told by what it imports: time would depend on the machine and on who else is at work.

Where one of these fails, something was imported at the head of a module that few commands need; import it where it is
used. `bench/kgctl.py` says what it costs in milliseconds.
"""

from __future__ import annotations

import json
import subprocess
import sys

from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import NodeRecord, PeerRecord, Role, StatusRecord, encode, parse_networks

KEY, OTHER = "A" * 43 + "=", "B" * 42 + "A="
KEYS = Keys()
WORLD = {
    "/kilo/mesh/granularity": "location",
    "/kilo/mesh/subnets": "10.4.0.0/16",
    KEYS.node("a"): encode(NodeRecord(public_key=KEY)).decode(),
    "/kilo/by/a/addresses/10.4.0.1": "",
    KEYS.peer("phone"): encode(PeerRecord(public_key=OTHER, allowed_ips=parse_networks("10.9.0.1/32"))).decode(),
    KEYS.status("a"): encode(StatusRecord(public_key=KEY, role=Role.ALONE)).decode(),
}

ETCD_IN_MEMORY = """
import kilo_etcd.etcd.client
from contextlib import asynccontextmanager
from kilo_etcd.testing.fake_etcd import FakeEtcd

fake = FakeEtcd()
for key, value in {world!r}.items():
    fake.put_kept(key, value)

@asynccontextmanager
async def opened(config, **_):
    yield fake.client()

kilo_etcd.etcd.client.open_client = opened
"""
RUN = """
import contextlib, io, json, sys
from kilo_etcd.ctl.entry import main

before = set()
for arguments in {commands!r}:
    sys.argv = ["kgctl", *arguments.split()]
    printed = io.TextIOWrapper(io.BytesIO())
    try:
        with contextlib.redirect_stdout(printed):
            main()
    except SystemExit as end:
        assert not end.code, end
    printed.flush()
    assert printed.buffer.getvalue().strip(), arguments + " has printed nothing"
    print(json.dumps([arguments, sorted(sys.modules.keys() - before)]))
    before.update(sys.modules)
"""

NEVER = (
    *("asyncio", "cattrs", "cryptography", "logging_journald", "multiprocessing", "prometheus_client", "rich", "segno"),
    *("structlog", "yaml", "kilo_etcd.kernel", "kilo_etcd.lab", "kilo_etcd.agent.daemon", "kilo_etcd.agent.main"),
)
"""No command that only reads needs them, and prints a table to a pipe, or JSON."""
NO_MESH = ("trio", "h2", "google", "ssl", "kilo_etcd.store.records", "kilo_etcd.topology.segments")
NO_PLAN = (
    *(
        "kilo_etcd.planning.plan",
        "kilo_etcd.planning.route_filter",
        "kilo_etcd.planning.walk",
        "kilo_etcd.topology.graph",
    ),
    *(
        "kilo_etcd.ctl.reports.live",
        "kilo_etcd.ctl.impact",
        "kilo_etcd.store.session.session",
        "kilo_etcd.store.mirror",
    ),
)


def imported(*commands: str, etcd: bool) -> dict[str, set[str]]:
    """By command, the modules that a kgctl has imported when it has done its work, and their packages, but for those
    that a command before it has imported. One process runs them all: what none imports is not there at the end."""
    script = (ETCD_IN_MEMORY.format(world=WORLD) if etcd else "") + RUN.format(commands=commands)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = {arguments: set(modules) for arguments, modules in map(json.loads, done.stdout.splitlines())}
    assert tuple(found) == commands
    return found


def unwanted(found: dict[str, set[str]], *modules: str) -> dict[str, set[str]]:
    """By command, which of the modules it is the first to import."""
    return {arguments: there for arguments, all_ in found.items() if (there := all_.intersection(modules))}


def test_what_asks_no_mesh_imports_nothing_of_it() -> None:
    found = imported("--version", "--help", "completion bash", etcd=False)
    assert "kilo_etcd.ctl.main" in found["--version"]
    assert unwanted(found, *NEVER, *NO_MESH, *NO_PLAN) == {}


def test_what_shows_no_plan_imports_no_planning() -> None:
    found = imported(
        "mesh show",
        "location list",
        "node list",
        "node list -o json",
        "peer list",
        "peer show phone",
        "status",
        "status -o json",
        etcd=True,
    )
    assert "kilo_etcd.store.view" in found["mesh show"]
    assert unwanted(found, *NEVER, *NO_PLAN) == {}


def test_peers_as_data_need_no_topology() -> None:
    found = imported("peer list -o json", "peer show phone -o json", etcd=True)
    assert unwanted(found, *NEVER, *NO_PLAN, "kilo_etcd.topology.segments") == {}


def test_no_command_that_only_reads_imports_the_agent_or_what_draws() -> None:
    found = imported("node show a", "showconf node a", "explain a phone", "graph --plain", etcd=True)
    assert unwanted(found, *NEVER) == {}
    assert not [module for module in set().union(*found.values()) if module.startswith("kilo_etcd.agent")]
