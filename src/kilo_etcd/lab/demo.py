"""The demo: what a person should see in the first two minutes. It only operates the lab as anyone can.

Every step prints what it has seen, not what it hopes for, and a step that does not happen in time ends the
demo with a sentence.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import trio
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from kilo_etcd.lab.client import HostStatus, Lab
from kilo_etcd.lab.runtime import LabError
from kilo_etcd.lab.spec import Spec
from kilo_etcd.model import DEFAULT_PREFIX
from kilo_etcd.store.keys import ElectionKey, Keys, LeaderKey, NodeKey

K = TypeVar("K")

_POLL = 0.1


async def show(lab: Lab, console: Console, picture: Path, *, deadline: float = 45.0) -> None:
    """Show a built lab forming its mesh. LabError when it does not within `deadline` seconds."""
    began = trio.current_time()

    def say(line: str) -> None:
        console.print(f"[dim]{trio.current_time() - began:5.1f} s[/]  {line}", highlight=False)

    with trio.move_on_after(deadline) as limit:
        await _follow(registered, lab, len(lab.hosts), lambda name: say(f"[bold]{name}[/] has registered"))
        await _follow(
            leaders,
            lab,
            led_locations(lab.spec) if lab.spec else 1,
            lambda entry: say(f"[bold]{entry[1]}[/] leads {_called(entry[0])}"),
        )
    if limit.cancelled_caught:
        raise LabError(f"the hosts did not register and elect leaders within {deadline:g} s; see kgctl lab logs HOST")
    await lab.all_pairs_ping(max(1.0, deadline - (trio.current_time() - began)))
    pairs = len(lab.hosts) * (len(lab.hosts) - 1)
    say(f"all {pairs} ordered pairs ping each other at their mesh addresses")
    console.print(await ping_table(lab))
    console.print(await host_table(lab, console))
    await _allocated(lab)
    status = await lab.kgctl("status", check=False, env={"COLUMNS": str(max(console.width, 100))})
    console.print("[bold]kgctl status[/]")
    console.print(status.stdout or status.stderr, markup=False, highlight=False, soft_wrap=True)
    for site in [site.name for site in lab.spec.sites] if lab.spec else []:
        counts = await lab.counters(site)
        console.print(
            f"router of {site}: {counts['wireguard'].packets} WireGuard and {counts['etcd'].packets} etcd packets "
            f"passed, {counts['other'].packets} of any other kind tried",
            highlight=False,
            soft_wrap=True,
        )
    console.print(await draw(lab, picture), highlight=False, soft_wrap=True)


def led_locations(spec: Spec) -> int:
    """How many locations of a lab elect a leader. A host that is alone in its location is no candidate."""
    return sum(number > 1 for number in Counter(host.label or "" for host in spec.hosts).values())


async def _allocated(lab: Lab) -> None:
    """Wait a little for those next in line: hosts stand for leader when they have been steady for two seconds."""
    assert lab.spec is not None
    labels = [host.label for host in lab.spec.hosts]
    standing = sum(labels.count(label) for label in set(labels) if labels.count(label) > 1)
    with trio.move_on_after(5):
        while len(await _parsed(lab, ElectionKey)) < standing:  # noqa: ASYNC110 - another process acts
            await trio.sleep(_POLL)


def _called(location: str) -> str:
    return location or "the hosts without a label"


async def _follow(
    look: Callable[[Lab], Awaitable[Iterable[K]]], lab: Lab, number: int, on_found: Callable[[K], None]
) -> None:
    """Wait until `look` finds `number` things; tell of each when it is first seen."""
    entries: set[K] = set()
    while len(entries) < number:
        for entry in await look(lab):
            if entry not in entries:
                entries.add(entry)
                on_found(entry)
        await trio.sleep(_POLL)


async def registered(lab: Lab) -> list[str]:
    """The nodes with a record."""
    return [key.node for key in await _parsed(lab, NodeKey)]


async def leaders(lab: Lab) -> list[tuple[str, str]]:
    """The locations and their leaders on record."""
    return [(key.location, key.node) for key in await _parsed(lab, LeaderKey)]


async def _parsed(lab: Lab, kind: type[K]) -> list[K]:
    """The keys of one kind."""
    keys = Keys()
    parsed = (keys.parse(kv.key) for kv in await lab.key_values(keys.by_root))
    return [key for key in parsed if isinstance(key, kind)]


async def ping_table(lab: Lab) -> Table:
    """Which host reaches which."""
    missing = set(await lab.missing_pings())
    hosts = [row.host for row in await lab.status() if row.power]
    table = Table(title="pings at mesh addresses", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("from \\ to", style="bold")
    for host in hosts:
        table.add_column(host, justify="center", no_wrap=True)
    for a in hosts:
        cells = ["·" if a == b else "[red]no[/]" if (a, b) in missing else "[green]ok[/]" for b in hosts]
        table.add_row(a, *cells)
    return table


async def host_table(lab: Lab, console: Console) -> Table:
    """The hosts of a lab and where they are found, as wide as the console."""
    return hosts_as_table(lab.name, await lab.status(), console)


def hosts_as_table(name: str, rows: Sequence[HostStatus], console: Console) -> Table:
    """The same of these rows: an address a line, in one piece. Where the console is too narrow for a column of each
    kind of address, all are in one."""
    wide = _hosts(name, rows, ("private", "public", "mesh"), lambda row: (row.private, row.public, row.mesh))
    if console.measure(wide, options=console.options.update(max_width=10_000)).maximum <= console.width:
        return wide

    def together(row: HostStatus) -> tuple[tuple[str, ...], ...]:
        kinds = {"private": row.private, "public": row.public, "mesh": row.mesh}
        return (tuple(f"{kind} {address}" for kind, addresses in kinds.items() for address in addresses),)

    return _hosts(name, rows, ("addresses",), together)


def _hosts(
    name: str,
    rows: Iterable[HostStatus],
    headings: tuple[str, ...],
    addresses: Callable[[HostStatus], tuple[tuple[str, ...], ...]],
) -> Table:
    table = Table(title=f"hosts of lab {name}", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    cuts = ("cut from",) if any(row.cuts for row in rows) else ()
    for heading in ("host", "site", *headings, "agent", *cuts):
        table.add_column(heading, no_wrap=heading in ("host", *headings), overflow="fold")
    for row in rows:
        agent = row.agent if row.power else "powered off"
        cells = ("\n".join(lines) for lines in addresses(row))
        table.add_row(row.host, row.site, *cells, agent, *([", ".join(row.cuts)] if cuts else []))
    return table


async def draw(lab: Lab, picture: Path) -> str:
    """Write the mesh as an SVG, as `kgctl graph | circo -Tsvg` does; a line that says where it is, or why not."""
    circo = shutil.which("circo")
    if circo is None:
        return "no picture: circo is not installed (apt install graphviz)"
    graph = await lab.kgctl("graph", check=False)
    if graph.returncode:
        return f"no picture: kgctl graph: {graph.stderr.strip()}"
    drawn = await trio.run_process([circo, "-Tsvg"], stdin=graph.stdout.encode(), capture_stdout=True, check=False)
    if drawn.returncode:
        return f"no picture: circo ended with {drawn.returncode}"
    target = await trio.Path(picture).absolute()
    try:
        await target.write_bytes(drawn.stdout)
    except OSError as error:
        return f"no picture: {target} cannot be written: {error.strerror}"
    return f"the mesh as a picture: {target}"


def suggestions(lab: Lab) -> list[str]:
    """Lines to try next, fitting the lab."""
    assert lab.spec is not None
    # Only a public host can be a location of its own; one behind a NAT is reached through its location's leader.
    movable = [host.name for host in lab.spec.hosts if host.label is None and host.public]
    lines = ["kgctl status", f"kgctl lab exec {lab.hosts[0]} wg"]
    if movable:
        lines.append(f"etcdctl put {DEFAULT_PREFIX}/locations/{movable[-1]} {movable[-1]}")
        lines.append(f"etcdctl del {DEFAULT_PREFIX}/locations/{movable[-1]}")
    lines += [
        f"etcdctl put {DEFAULT_PREFIX}/mesh/granularity full",
        f"etcdctl put {DEFAULT_PREFIX}/mesh/granularity cross",
        f"etcdctl put {DEFAULT_PREFIX}/mesh/granularity location",
        "kgctl graph | circo -Tsvg > mesh.svg",
        "kgctl lab pings",
        # Its lease ends after five seconds.
        f"kgctl lab power-off {lab.hosts[0]}; sleep 6; kgctl status; kgctl lab power-on {lab.hosts[0]}",
    ]
    return lines
