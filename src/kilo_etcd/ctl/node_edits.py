"""What to write when a node leaves the mesh for good, or goes on under another name. Pure.

What a host writes and what the operator sets for it stand at different keys in etcd, each with the node's name. Both
have to be deleted, or moved to the new name.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from attrs import evolve

from kilo_etcd.base.quoting import first_of
from kilo_etcd.ctl.change import Edit
from kilo_etcd.ctl.context import Failure
from kilo_etcd.ctl.reports.render import clean
from kilo_etcd.etcd.api import KeyValue
from kilo_etcd.store.keys import AnnotationKey, Keys, LocationKey
from kilo_etcd.store.records import is_stub
from kilo_etcd.store.view import View

MOST_NAMED = 10
"""Labels and annotations in one question."""


def forgetting(node: str, view: View, keys: Keys, *, keep_labels: bool) -> Edit:
    """The keys that go with a node: all that its host wrote, and what the operator set for it unless that is kept.
    (What others have observed of it is under their leases.) Failure: there is no such node."""
    settings = () if keep_labels else settings_of(node, view, keys)
    registered = bool(view.kvs(keys.by(node)))
    if not registered and not settings:
        raise Failure(f"there is no node {clean(node)}; kgctl node list lists them")
    named = ", ".join(_named(settings, keys))
    question = f"{clean(node)} leaves the mesh" if registered else f"{clean(node)} has no record"
    if settings:
        question += f"; {named} {'goes' if len(settings) == 1 else 'go'} too (--keep-labels keeps them)"
    alive = (
        f"{node} has an agent that lives, and would register again at once: stop kilo-etcd there first "
        "(kg cleanup there takes everything away)"
    )
    return Edit(
        deletes=tuple(kv.key.decode() for kv in settings),
        deletes_below=(keys.by(node), keys.status_by(node)),
        refused_by={keys.status(node): alive},
        asks=f"{question}. Continue?",
    )


def forgetting_each(nodes: Iterable[str], view: View, keys: Keys, *, keep_labels: bool) -> Mapping[str, Edit]:
    """The same for each of several nodes, by name, unless it comes back meanwhile. One that is gone is none. One
    without a record may be joining for the first time, so what is set for it is kept."""
    return {
        node: evolve(
            forgetting(node, view, keys, keep_labels=keep_labels or view.kv(keys.node(node)) is None),
            as_seen=(keys.node(node), keys.reservation(node)),
        )
        for node in nodes
        if view.kvs(keys.by(node))
    }


def renaming(old: str, new: str, view: View, keys: Keys) -> Edit:
    """The keys that move if a host is called `new` and no longer `old`: label, annotations, `exit-node` of other nodes,
    and, unless a host has joined as `new`, the claims of its mesh addresses. What else the host wrote as `old` goes.
    Failure: there is nothing to move, or `new` has settings of its own."""
    if old == new:
        raise Failure(f"both names are {clean(old)}")
    settings, wrote = settings_of(old, view, keys), view.kvs(keys.by(old))
    if not settings and not wrote:
        raise Failure(f"nothing is known of {clean(old)}; kgctl node list lists the nodes")
    puts: dict[str, str] = {}
    leases: dict[str, int] = {}
    for kv in (*settings, *_exit_node_users(old, view, keys)):
        match keys.parse(kv.key):
            case LocationKey():
                key, value = keys.location(new), _text(kv)
            case AnnotationKey(node=node, name=name):
                uses = name == "exit-node" and _text(kv).strip() == old
                key, value = keys.annotation(new if node == old else node, name), new if uses else _text(kv)
            case _:
                continue
        there = view.kv(key)
        if key != kv.key.decode() and there is not None and there.value != value.encode():
            raise Failure(
                f"{clean(new)} has {_named([there], keys)[0]} of its own, with another value: remove one of the two "
                "first (kgctl location unset NODE, kgctl annotate NODE NAME-)"
            )
        puts[key] = value
    if not view.claimed_by(("node", new)):
        held = view.claimed_by(("node", old))
        claims = {keys.address(new, address): "" for address in held if view.holder(address) == ("node", old)}
        puts.update(claims)
        # They are kept for a host that is yet to join, for as long as they would have been for the former name.
        standing = (view.kv(keys.reservation(old)), view.kv(keys.node(old)))
        lease = next((kv.lease for kv in standing if kv is not None and kv.lease), 0)
        if claims and lease:
            puts[keys.reservation(new)], leases[keys.reservation(new)] = "", lease
    alive = (
        f"{old} has an agent that lives: give that host its new name and start kilo-etcd there again first, or stop it"
    )
    moved = f"{', '.join(_named(settings, keys))} of {clean(old)} will be {clean(new)}'s" if settings else ""
    gone = f"{clean(old)} leaves the mesh" if wrote else ""
    return Edit(
        puts=puts,
        leases=leases,
        deletes=tuple(kv.key.decode() for kv in settings),
        deletes_below=(keys.by(old), keys.status_by(old)),
        refused_by={keys.status(old): alive},
        asks=f"{'; '.join(text for text in (moved, gone) if text)}. Continue?",
    )


def settings_of(node: str, view: View, keys: Keys) -> tuple[KeyValue, ...]:
    """The label and the annotations of a node."""
    label = view.kv(keys.location(node))
    return (*(() if label is None else (label,)), *view.kvs(keys.annotations(node)))


def _exit_node_users(name: str, view: View, keys: Keys) -> Iterable[KeyValue]:
    """The annotations by which other nodes leave for the internet by `name`."""
    for kv in view.kvs(keys.annotations_root):
        key = keys.parse(kv.key)
        others = isinstance(key, AnnotationKey) and key.name == "exit-node" and key.node != name
        if others and kv.value.decode(errors="replace").strip() == name:
            yield kv


def _text(kv: KeyValue) -> str:
    if is_stub(kv.value):
        raise Failure(f"{clean(kv.key.decode(errors='replace'))} is rejected, as kgctl status says: put it right first")
    return kv.value.decode()


def _named(settings: Iterable[KeyValue], keys: Keys) -> list[str]:
    """Labels and annotations in a sentence."""
    names = []
    for kv in settings:
        key = keys.parse(kv.key)
        if isinstance(key, LocationKey):
            value = "(rejected)" if is_stub(kv.value) else clean(kv.value.decode(errors="replace"))
            names.append(f"label {value or '(default)'}")
        elif isinstance(key, AnnotationKey):
            names.append(f"annotation {clean(key.name)}")
    return names if len(names) <= MOST_NAMED else [first_of(names, MOST_NAMED)]
