"""`kgctl wait`: until every living agent has applied what etcd held when the command was given."""

from __future__ import annotations

from functools import partial

import click

from kilo_etcd.base.quoting import first_of, sentence
from kilo_etcd.ctl.context import Failure, Mesh
from kilo_etcd.ctl.reports.render import clean
from kilo_etcd.ctl.reports.report import newest_revision
from kilo_etcd.ctl.trust import distrust
from kilo_etcd.etcd.api import Client, Compacted, EventType
from kilo_etcd.store import operator
from kilo_etcd.store.keys import Keys, StatusKey
from kilo_etcd.store.records import RecordError, decode_status

SHOWN = 5
"""How many of those that have not are named."""


def _seconds(context: click.Context, parameter: click.Parameter, value: str) -> float:
    from kilo_etcd.runtime.parsing import parse_duration

    try:
        return parse_duration(value)
    except ValueError as error:
        raise click.BadParameter(sentence(error), context, parameter) from None


@click.command("wait", epilog="Example:\n\n\b\n  etcdctl put /kilo/locations/node-1 gcp && kgctl wait --timeout 10s")
@click.option("--timeout", default="30s", show_default=True, callback=_seconds, help="How long to wait: 10s, 2m.")
@click.pass_obj
def wait_command(mesh: Mesh, timeout: float) -> None:
    """Wait until every living agent has applied all that is in etcd now.

    Exit status 1: not in time; the hosts that have not are named.
    """

    target, living, behind = mesh.ask(partial(applied, timeout=timeout))
    if not living and (reason := mesh.ask(partial(distrust, registered=(), living=()))) is not None:
        raise Failure(reason)
    if behind:
        named = first_of((f"{clean(name)} (at {revision})" for name, revision in sorted(behind.items())), SHOWN)
        raise Failure(f"{len(behind)} of {living} agents have not applied revision {target} in time: {named}")
    click.echo(f"{living} agents have applied revision {target}.")


async def applied(client: Client, keys: Keys, *, timeout: float) -> tuple[int, int, dict[str, int]]:
    """Wait, at most `timeout` seconds, for the revision of the last change of the mesh, a deletion too.

    That revision, how many agents live, and the revision of each that has not applied it.
    """
    import trio

    _, view = await operator.snapshot(client, keys)
    target = await operator.newest_change(client, keys, newest_revision(view, keys), view.header.revision)
    reported: dict[str, int] = {}

    def behind() -> dict[str, int]:
        return {name: revision for name, revision in reported.items() if revision < target}

    def take(key: bytes, value: bytes | None) -> None:
        parsed = keys.parse(key)
        if not isinstance(parsed, StatusKey):
            return
        if value is None:  # Its lease has ended, so it lives no longer.
            reported.pop(parsed.node, None)
            return
        try:
            reported[parsed.node] = decode_status(value).revision
        except RecordError:
            reported.pop(parsed.node, None)

    with trio.move_on_after(timeout):
        while True:
            listing = await client.get_prefix(keys.status_by_root)
            reported.clear()
            for kv in listing.kvs:
                take(kv.key, kv.value)
            if not behind():
                break
            try:
                async with client.watch_prefix(
                    keys.status_by_root, start_revision=listing.header.revision + 1
                ) as watch:
                    async for batch in watch:
                        for event in batch.events:
                            take(event.kv.key, event.kv.value if event.type is EventType.PUT else None)
                        if not behind():
                            return target, len(reported), {}
            except Compacted:
                continue
    return target, len(reported), behind()
