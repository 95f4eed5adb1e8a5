"""How a command changes the mesh: it looks, says what will be different, asks where that disrupts, and writes.

An `Edit` is what is to be written; `carry_out` shows its impact (`ctl.impact`), stops there with
`--dry-run`, and else writes it in one transaction, which etcd takes only if the keys concerned are still as they were
when the impact was computed. So two operators at once do not undo each other unseen.

`carry_out_each` does the same with very many edits that have nothing to do with one another: it looks once, writes in
as many transactions as they need, and one that cannot be written does not keep the others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from enum import Enum
from functools import partial
from typing import Any, TypeVar

import click
from attrs import field, frozen

from kilo_etcd.base.quoting import first_of
from kilo_etcd.ctl.context import Failure, Mesh
from kilo_etcd.ctl.reports.render import clean
from kilo_etcd.ctl.trust import distrust_by_look
from kilo_etcd.etcd.api import (
    BadRequest,
    Client,
    Compare,
    CompareTarget,
    Delete,
    Event,
    EventType,
    Is,
    KeyValue,
    Op,
    PermissionDenied,
    Put,
    absent,
    prefix_end,
    unchanged,
)
from kilo_etcd.model import Snapshot
from kilo_etcd.store import operator
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import is_stub
from kilo_etcd.store.view import View

F = TypeVar("F", bound=Callable[..., Any])

MOST = 128
"""etcd's own limit (--max-txn-ops) on the conditions, and on the writes, of one transaction."""

MOST_NAMED = 10
"""Names in one sentence on many edits."""

_TOO_LARGE = (
    f"left as it was, since more than {MOST} keys are too many for one transaction of etcd's (--keep-labels leaves "
    "labels and annotations)"
)
_CAME_BACK = "left as it was, since its agent has come back or another writer has changed it meanwhile: look again"


class Outcome(Enum):
    """What has come of it."""

    WRITTEN = "written"
    NOTHING = "nothing to change"
    DRY_RUN = "dry run"


@frozen(kw_only=True)
class Edit:
    """Keys to put and to delete, in one transaction."""

    puts: Mapping[str, str] = field(factory=dict)
    leases: Mapping[str, int] = field(factory=dict)
    """Of the keys to put that are under a lease."""
    deletes: tuple[str, ...] = ()
    deletes_below: tuple[str, ...] = ()
    """Prefixes: all keys that begin with one are deleted, those too that come while the command looks."""
    as_seen: tuple[str, ...] = ()
    """Keys that must be as they were seen, although they are not among those to put or to delete by name."""
    refused_by: Mapping[str, str] = field(factory=dict)
    """Key -> the sentence that it is refused with where that key exists."""
    refuses_trouble: bool = False
    """Whether it is refused if there would be new trouble: something rejected, or not granted in full."""
    asks: str = ""
    """The question to ask before it is done; empty: none."""
    asks_if_disruptive: bool = False
    """Whether the command asks first if hosts lose packets by it (`impact.disruption`)."""
    forbids: Callable[[Snapshot], str | None] = lambda _after: None
    """Why it is refused, given the mesh as it would be; None: it is not."""


def change_options(command: F) -> F:
    """Give a command `--dry-run` and `--yes`."""
    yes: Callable[[F], F] = click.option("--yes", "-y", is_flag=True, help="Do not ask.")
    dry_run: Callable[[F], F] = click.option(
        "--dry-run", is_flag=True, help="Print what would change, and write nothing."
    )
    return dry_run(yes(command))


def carry_out(
    mesh: Mesh,
    decide: Callable[[Snapshot, View, Keys], Edit],
    *,
    dry_run: bool,
    yes: bool = False,
    aside: bool = False,
    adopts: bool = False,
) -> Outcome:
    """Do what `decide` says to what it is shown. Failure, in one sentence: nothing was written.

    What it says goes to standard output; with `aside` to standard error, where the output is for a program. That agents
    do not follow this etcd goes to standard error, unless the change `adopts` it.
    """

    prepared = prepare(mesh, decide)
    if prepared is None:
        return Outcome.NOTHING
    for line in prepared.lines or (("the mesh stays as it is",) if dry_run else ()):
        click.echo(line, err=aside)
    if dry_run:
        click.echo("Nothing was written (--dry-run).", err=aside)
        return Outcome.DRY_RUN
    if not adopts:
        _say_distrust(mesh, prepared.registered)
    if prepared.question and not yes:
        confirm(prepared.question)
    prepared.write()
    return Outcome.WRITTEN


def _say_distrust(mesh: Mesh, registered: frozenset[str]) -> None:
    if (sentence := mesh.ask(partial(distrust_by_look, registered=registered))) is not None:
        click.echo(f"kgctl: {sentence}", err=True)


def carry_out_each(
    mesh: Mesh,
    decide: Callable[[Snapshot, View, Keys], Mapping[str, Edit]],
    *,
    question: Callable[[int], str],
    still: Callable[[], Collection[str]],
    done: str,
    dry_run: bool,
    yes: bool = False,
) -> Outcome:
    """Delete what `decide` says, by name, each on its own: several in one transaction, and those that cannot be deleted
    are named. `question` is asked before, with how many there are; that may take minutes, so of these only those are
    deleted that `still` names then. `done` is what has become of those that are. Failure if one is left, or etcd goes
    away; what was done until then is said.

    Of each edit only what it deletes counts, and what it is refused by, if that is under a lease."""

    from kilo_etcd.ctl.impact import impact
    from kilo_etcd.ctl.reports.report import registered_names

    before, view, keys = _look(mesh)
    parts = {name: _Deletion.of(edit, view) for name, edit in decide(before, view, keys).items()}
    if not parts:
        click.echo("Nothing to change.")
        return Outcome.NOTHING
    registered = registered_names(view, keys)
    for line in impact(before, after(view, {}, [key for part in parts.values() for key in part.keys])):
        click.echo(line)
    if dry_run:
        click.echo("Nothing was written (--dry-run).")
        return Outcome.DRY_RUN
    _say_distrust(mesh, registered)
    written: list[str] = []
    left: dict[str, list[str]] = {}
    if not yes:
        confirm(question(len(parts)))
        # One that came back and is gone again may have written nothing: it found its keys as it wants them.
        if back := parts.keys() - set(still()):
            left[_CAME_BACK] = [*back]
            parts = {name: part for name, part in parts.items() if name not in back}

    async def write(client: Client, _keys: Keys) -> None:
        await _write_each(client, parts, written, left)

    try:
        mesh.ask(write)
    finally:
        if written:
            click.echo(f"{first_of(map(clean, sorted(written)), MOST_NAMED)}: {done}")
    if left:
        reasons = (f"{first_of(map(clean, sorted(names)), MOST_NAMED)}: {reason}" for reason, names in left.items())
        raise Failure("; ".join(reasons))
    return Outcome.WRITTEN


@frozen
class _Deletion:
    """An edit of many: its conditions, its operations, and the keys that it deletes."""

    conditions: tuple[Compare, ...]
    operations: tuple[Op, ...]
    keys: Sequence[str]

    @classmethod
    def of(cls, edit: Edit, view: View) -> _Deletion:
        # A key under no lease is nobody's sign of life; one that is not there is under none.
        unleased = [Compare(key, CompareTarget.LEASE, Is.EQUAL, 0) for key in edit.refused_by]
        return cls(
            conditions=(*_as_they_were(edit, view), *unleased), operations=_deletions(edit), keys=_deleted(edit, view)
        )

    @property
    def size(self) -> int:
        """How much of a transaction it takes."""
        return max(len(self.conditions), len(self.operations))


async def _write_each(
    client: Client, parts: Mapping[str, _Deletion], written: list[str], left: dict[str, list[str]]
) -> None:
    """Write all of them, in as few transactions as it takes. One that fails is halved, until it is known which parts
    cannot be written: those are put into `left`, by the reason. EtcdError."""
    rest = [*_bundles({name: part for name, part in parts.items() if part.size <= MOST})]
    if large := [name for name, part in parts.items() if part.size > MOST]:
        left[_TOO_LARGE] = large
    while rest:
        names = rest.pop()
        conditions = [compare for name in names for compare in parts[name].conditions]
        operations = [op for name in names for op in parts[name].operations]
        reason = _CAME_BACK
        try:
            if (await client.txn(conditions, operations)).succeeded:
                written += names
                continue
        except PermissionDenied as error:
            reason = f"left as it was: {error}; or take an operator's user (--user, ETCDCTL_USER)"
        except BadRequest as error:
            # Its --max-txn-ops may be less than usual.
            reason = f"left as it was: {error}"
        if len(names) > 1:
            rest += [names[len(names) // 2 :], names[: len(names) // 2]]
        else:
            left.setdefault(reason, []).extend(names)


def _bundles(parts: Mapping[str, _Deletion]) -> Iterator[Sequence[str]]:
    """Names whose parts fit into one transaction."""
    bundle: list[str] = []
    conditions = operations = 0
    for name, part in parts.items():
        conditions += len(part.conditions)
        operations += len(part.operations)
        if bundle and max(conditions, operations) > MOST:
            yield bundle
            bundle, conditions, operations = [], len(part.conditions), len(part.operations)
        bundle.append(name)
    if bundle:
        yield bundle


def _conditions(edit: Edit, view: View) -> tuple[Compare, ...]:
    return (*_as_they_were(edit, view), *map(absent, edit.refused_by))


def _as_they_were(edit: Edit, view: View) -> tuple[Compare, ...]:
    return tuple(_as_it_was(view, key) for key in (*edit.puts, *edit.deletes, *edit.as_seen))


def _deleted(edit: Edit, view: View) -> list[str]:
    """The keys that are there and go."""
    below = [kv.key.decode(errors="replace") for prefix in edit.deletes_below for kv in view.kvs(prefix)]
    return [*(key for key in edit.deletes if view.kv(key) is not None), *below]


def _deletions(edit: Edit) -> tuple[Op, ...]:
    return (*map(Delete, edit.deletes), *(Delete(prefix, prefix_end(prefix)) for prefix in edit.deletes_below))


def _look(mesh: Mesh) -> tuple[Snapshot, View, Keys]:
    async def look(client: Client, keys: Keys) -> tuple[Snapshot, View, Keys]:
        return *await operator.snapshot(client, keys), keys

    return mesh.ask(look)


@frozen(kw_only=True)
class Prepared:
    """A change that is allowed, and not yet made. `lines` say what it does to the mesh."""

    mesh: Mesh
    edit: Edit
    lines: tuple[str, ...]
    question: str = ""
    """To be answered before it is made; empty: none."""
    conditions: tuple[Compare, ...]
    operations: tuple[Op, ...]
    backwards: tuple[Op, ...]
    registered: frozenset[str] = frozenset()
    """The nodes that have a record, before it."""

    def write(self) -> None:
        """Make it, or nothing of it. Failure."""
        if not self._transact(self.conditions, self.operations):
            _refuse(self.mesh, self.edit)
            raise Failure("another writer has just changed the same; nothing was written: look again")

    def take_back(self) -> bool:
        """Restore what was there, if it was not changed since; whether that was done. Failure."""
        as_made = [
            Compare(op.key, CompareTarget.VALUE, Is.EQUAL, _raw(op.value)) if isinstance(op, Put) else absent(op.key)
            for op in self.operations
            if isinstance(op, Put) or (isinstance(op, Delete) and op.range_end is None)
        ]
        return self._transact(tuple(as_made), self.backwards)

    def _transact(self, conditions: tuple[Compare, ...], operations: tuple[Op, ...]) -> bool:
        async def write(client: Client, _keys: Keys) -> bool:
            return (await client.txn(conditions, operations)).succeeded

        return self.mesh.ask(write)


def prepare(mesh: Mesh, decide: Callable[[Snapshot, View, Keys], Edit]) -> Prepared | None:
    """Look, and compute what `decide` wants and what it does; None where all is so already. Failure: it is refused."""

    from kilo_etcd.ctl.impact import disruption, impact, new_trouble
    from kilo_etcd.ctl.reports.report import registered_names

    before, view, keys = _look(mesh)
    edit = decide(before, view, keys)
    registered = registered_names(view, keys)
    conditions = _conditions(edit, view)
    puts = {key: value for key, value in edit.puts.items() if _value(view, key) != value}
    gone = _deleted(edit, view)
    if not puts and not gone:
        return None
    if len(conditions) > MOST:
        raise Failure(
            f"{len(conditions)} keys are too many for one transaction of etcd's: change at most {MOST} in one go"
        )
    _refuse(mesh, edit)
    held = _full_values(mesh, {key: view.kv(key) for key in (*puts, *gone)})
    then = after(view, puts, gone)
    if edit.refuses_trouble and (trouble := new_trouble(before, then)):
        raise Failure("; ".join(trouble) + "; nothing was written")
    if (reason := edit.forbids(then)) is not None:
        raise Failure(f"{reason}; nothing was written")
    return Prepared(
        mesh=mesh,
        edit=edit,
        lines=impact(before, then),
        question=edit.asks or (disruption(before, then) if edit.asks_if_disruptive else ""),
        conditions=conditions,
        operations=(
            *(Put(key, value, lease=edit.leases.get(key, 0)) for key, value in puts.items()),
            *_deletions(edit),
        ),
        registered=registered,
        backwards=tuple(Delete(key) if kv is None else Put(key, kv.value, kv.lease) for key, kv in held.items()),
    )


def _full_values(mesh: Mesh, held: dict[str, KeyValue | None]) -> dict[str, KeyValue | None]:
    """What is to be restored, as etcd holds it: of a rejected value a view has the reason alone."""
    stubs = [key for key, kv in held.items() if kv is not None and is_stub(kv.value)]

    async def look(client: Client, _keys: Keys) -> dict[str, KeyValue | None]:
        return {key: await client.get(key) for key in stubs}

    return {**held, **mesh.ask(look)} if stubs else held


def _refuse(mesh: Mesh, edit: Edit) -> None:
    async def existing_key(client: Client, _keys: Keys) -> str | None:
        for key in edit.refused_by:
            if await client.get(key) is not None:
                return key
        return None

    if edit.refused_by and (key := mesh.ask(existing_key)) is not None:
        raise Failure(edit.refused_by[key])


def after(view: View, puts: Mapping[str, str], deletes: list[str]) -> Snapshot:
    """The snapshot if this were written. `view` is used up."""
    revision = view.revision + 1
    events = []
    for key, value in puts.items():
        held = view.kv(key)
        kv = KeyValue(
            key=key.encode(),
            value=value.encode(),
            # The older record has the key or the address.
            create_revision=revision if held is None else held.create_revision,
            mod_revision=revision,
        )
        events.append(Event(type=EventType.PUT, kv=kv))
    events += [
        Event(type=EventType.DELETE, kv=KeyValue(key=key.encode(), value=b"", mod_revision=revision)) for key in deletes
    ]
    view.apply(events, view.header)
    return view.snapshot()


def confirm(question: str) -> None:
    """Ask at the terminal. Failure where there is none, click.Abort where the answer is no."""
    if not sys.stdin.isatty():
        raise Failure(f"{question} Nothing was written: there is no terminal to ask at, so say --yes")
    click.confirm(question, abort=True)


def _raw(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


def _value(view: View, key: str) -> str | None:
    kv = view.kv(key)
    return None if kv is None else kv.value.decode(errors="replace")


def _as_it_was(view: View, key: str) -> Compare:
    kv = view.kv(key)
    return absent(key) if kv is None else unchanged(kv)
