"""`kgctl status`: one look at the mesh, or one after each change. What it says is in `ctl.reports.report`, how it looks
in `ctl.reports.render`."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING

import click
from attrs import frozen

from kilo_etcd.ctl.context import Mesh
from kilo_etcd.ctl.output import output_option, show
from kilo_etcd.ctl.reports.render import status_heading, status_json, status_tables
from kilo_etcd.ctl.reports.report import Report, newest_revision, registered_names, report
from kilo_etcd.ctl.trust import distrust
from kilo_etcd.etcd.api import Client, Unavailable
from kilo_etcd.store import operator
from kilo_etcd.store.keys import Keys, ResponseKey
from kilo_etcd.store.records import StatusRecord
from kilo_etcd.topology.segments import Topology, build_topology

if TYPE_CHECKING:
    from kilo_etcd.ctl.reports.live import Live

PAUSE_SECONDS = 0.5
"""How long `--watch` lets changes gather: they come in bursts."""

LIVE_SECONDS = 5.0
"""How often `--watch --live` asks the hosts when etcd is quiet."""


@frozen(kw_only=True)
class Looked:
    """What etcd held when it was looked at."""

    topology: Topology
    statuses: Mapping[str, StatusRecord]
    newest: int
    registered: frozenset[str]
    distrust: str | None = None
    """A sentence on agents that do not follow this etcd."""

    def report(self, *, about: Collection[str] | None = None, live: Live | None = None) -> Report:
        """The report on it; see `ctl.reports.report`."""
        return report(
            self.topology.snapshot,
            self.statuses,
            newest=self.newest,
            registered=self.registered,
            live=live,
            topology=self.topology,
            about=about,
            distrust=self.distrust,
        )


async def look(client: Client, keys: Keys) -> Looked:
    """Look at all that etcd holds of the mesh now."""
    snapshot, view = await operator.snapshot(client, keys)
    # Last: an agent can only have got further since, so nobody is called behind for our slowness.
    statuses = await operator.statuses(client, keys)
    registered = registered_names(view, keys)
    return Looked(
        topology=build_topology(snapshot),
        statuses=statuses,
        newest=newest_revision(view, keys),
        registered=registered,
        distrust=await distrust(client, keys, registered, statuses.keys()),
    )


async def read_mesh(client: Client, keys: Keys, *, live: bool = False) -> Report:
    """The report on what etcd holds now; with `live` the hosts are asked too."""
    looked = await look(client, keys)
    if not live:
        return looked.report()
    from kilo_etcd.ctl.reports.live import gather

    return looked.report(live=await gather(client, keys, looked.statuses.keys()))


@click.command(
    "status",
    epilog="Examples:\n\n\b\n  kgctl status\n  kgctl status --live            tunnels, traffic, kernels\n"
    "  kgctl status --watch           again after each change, until Ctrl-C\n  kgctl status -o json | jq .locations",
)
@click.option(
    "--live",
    is_flag=True,
    help="Ask the agents for the state of their kernels: handshakes, traffic, differences from the plan.",
)
@click.option("-w", "--watch", is_flag=True, help="Show it again after each change.")
@output_option
@click.pass_obj
def status_command(mesh: Mesh, output: str, live: bool, watch: bool) -> None:
    """Show nodes, locations, their leaders and the next in line, and everything that is wrong."""

    def print_report(report: Report) -> None:
        if output == "json":
            text = status_json(report)
            # With --watch one line for each look, for programs that read line by line.
            click.echo(json.dumps(json.loads(text), ensure_ascii=False) if watch else text)
            return
        if watch:
            click.clear()  # does nothing where there is no terminal
            click.echo(f"{datetime.now():%Y-%m-%d %H:%M:%S}")
        show(status_tables(report), status_heading(report))

    if watch:
        mesh.ask(partial(_follow, print_report=print_report, live=live))
    else:
        print_report(mesh.ask(partial(read_mesh, live=live)))


async def _follow(client: Client, keys: Keys, *, print_report: Callable[[Report], None], live: bool) -> None:
    """A report now, and one after each change in etcd, forever."""
    import trio

    from kilo_etcd.ctl.watch_changes import watch_changes

    changed = trio.Event()

    def changed_now() -> None:
        changed.set()

    requests = keys.requests_root.encode()

    def counts(key: bytes) -> bool:
        return not key.startswith(requests) and not isinstance(keys.parse(key), ResponseKey)

    shown: Report | None = None
    away = ""
    async with trio.open_nursery() as nursery:
        for prefix in (keys.root, keys.status_root):
            nursery.start_soon(partial(watch_changes, client, prefix, changed_now, retry=PAUSE_SECONDS, counts=counts))
        while True:
            try:
                report = await read_mesh(client, keys, live=live)
            except Unavailable as error:
                if str(error) != away:
                    away = str(error)
                    click.echo(f"kgctl: {away}; what was shown last may be old", err=True)
                await trio.sleep(PAUSE_SECONDS)
                continue
            if report != shown or away:
                print_report(report)
            shown, away = report, ""
            with trio.move_on_after(LIVE_SECONDS if live else float("inf")):
                await changed.wait()
            await trio.sleep(PAUSE_SECONDS)
            changed = trio.Event()
