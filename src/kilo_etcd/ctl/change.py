"""How a command changes the mesh: it looks, says what will be different, asks where that disrupts, and writes.

An `Edit` is what is to be written; `carry_out` shows its impact (`ctl.impact`), stops there with
`--dry-run`, and else writes it in one transaction, which etcd takes only if the keys concerned are still as they were
when the impact was computed. So two operators at once do not undo each other unseen. `carry_out_all` does the same with
very many edits, in as many transactions as they need.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    Client,
    Compare,
    CompareTarget,
    Delete,
    Event,
    EventType,
    Is,
    KeyValue,
    Op,
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

NAMED = 10
"""Names in one sentence."""


class Outcome(Enum):
    """What has come of it."""

    WRITTEN = "written"
    NOTHING = "nothing to change"
    DRY_RUN = "dry run"


@frozen(kw_only=True)
class Edit:
    """Keys to put and to delete, in one transaction."""

    puts: Mapping[str, str] = field(factory=dict)
    deletes: tuple[str, ...] = ()
    deletes_below: tuple[str, ...] = ()
    """Prefixes: all keys that begin with one are deleted, those too that come while the command looks."""
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


def carry_out_all(
    mesh: Mesh,
    decide: Callable[[View, Keys], Mapping[str, Edit]],
    *,
    dry_run: bool,
    question: str,
    on_written: Callable[[Sequence[str]], object],
) -> Outcome:
    """Do what `decide` says, edits of single names that only delete and do not depend on each other. There is one look
    and one question for all; `on_written` gets the names of each transaction. Failure: some names are left; the others
    were written. An empty `question` is not asked.
    """
    from kilo_etcd.ctl.impact import impact
    from kilo_etcd.ctl.reports.report import registered_names

    before, view, keys = _look(mesh)
    edits = decide(view, keys)
    registered = registered_names(view, keys)
    # `after` uses the view up.
    groups = deque(_in_transactions({name: _conditions(edit, view) for name, edit in edits.items()}, edits))
    gone = [key for edit in edits.values() for key in _deleted(edit, view)]
    if not gone:
        return Outcome.NOTHING
    for line in impact(before, after(view, {}, gone)):
        click.echo(line)
    if dry_run:
        click.echo("Nothing was written (--dry-run).")
        return Outcome.DRY_RUN
    _say_distrust(mesh, registered)
    if question:
        confirm(question)
    left: list[str] = []

    async def write(client: Client, _keys: Keys) -> None:
        while groups:
            group = groups.popleft()
            conditions = tuple(condition for _, some in group for condition in some)
            operations = tuple(operation for name, _ in group for operation in _deletions(edits[name]))
            if (await client.txn(conditions, operations)).succeeded:
                on_written([name for name, _ in group])
            elif len(group) == 1:
                left.append(group[0][0])
            else:
                groups.extendleft([half] for half in reversed(group))

    mesh.ask(write)
    for name in left:
        _refuse(mesh, edits[name])
    if left:
        names = first_of([clean(name) for name in left], NAMED)
        raise Failure(f"another writer has just changed what there is of {names}; it stays as it is: look again")
    return Outcome.WRITTEN


_Group = list[tuple[str, tuple[Compare, ...]]]
"""Names with their conditions that are written in one transaction."""


def _in_transactions(
    conditions: Mapping[str, tuple[Compare, ...]], edits: Mapping[str, Edit]
) -> Iterator[_Group]:  # fmt: skip
    """All, in groups of which etcd takes each. Failure: it takes one alone in none."""
    group: _Group = []
    compared = written = 0
    for name, some in conditions.items():
        writes = len(_deletions(edits[name]))
        _check_size(max(len(some), writes))
        if max(compared + len(some), written + writes) > MOST:
            yield group
            group, compared, written = [], 0, 0
        group.append((name, some))
        compared, written = compared + len(some), written + writes
    if group:
        yield group


def _conditions(edit: Edit, view: View) -> tuple[Compare, ...]:
    return (*(_as_it_was(view, key) for key in (*edit.puts, *edit.deletes)), *map(absent, edit.refused_by))


def _deleted(edit: Edit, view: View) -> list[str]:
    """The keys that are there and go."""
    below = [kv.key.decode(errors="replace") for prefix in edit.deletes_below for kv in view.kvs(prefix)]
    return [*(key for key in edit.deletes if view.kv(key) is not None), *below]


def _deletions(edit: Edit) -> tuple[Op, ...]:
    return (*map(Delete, edit.deletes), *(Delete(prefix, prefix_end(prefix)) for prefix in edit.deletes_below))


def _check_size(number: int) -> None:
    if number > MOST:
        raise Failure(f"{number} keys are too many for one transaction of etcd's: change at most {MOST} in one go")


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
    _check_size(len(conditions))
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
        operations=(*(Put(key, value) for key, value in puts.items()), *_deletions(edit)),
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
