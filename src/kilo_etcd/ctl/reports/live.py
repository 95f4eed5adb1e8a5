"""What the hosts' kernels have, asked of the living agents (`store.diagnostics`) and put into the mesh's own names.

`gather` asks; all else is pure. A host that does not answer is one that nothing is known of, which is neither good
nor bad; who was asked in vain is named.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterable, Mapping

from attrs import evolve, field, frozen

from kilo_etcd.etcd.api import Client, EtcdError, PermissionDenied
from kilo_etcd.model import SESSION_SECONDS
from kilo_etcd.runtime.parsing import shown_duration
from kilo_etcd.store.diagnostics import PATIENCE_SECONDS, request_diagnostics
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import DiagnosticsResponse, Tunnel
from kilo_etcd.topology.graph import Edge, EdgeKind, EdgeState
from kilo_etcd.topology.segments import Topology


@frozen(kw_only=True)
class Live:
    """The answers, by node; `silent` were asked and have not answered."""

    answers: Mapping[str, DiagnosticsResponse] = field(factory=dict)
    silent: tuple[str, ...] = ()
    refused: str = ""
    """Why nothing could be asked at all, in a sentence."""
    denied: bool = False
    """Nothing could be asked because etcd's user may not."""
    clocks: Mapping[str, float] = field(factory=dict)
    """Seconds by which a host's clock is ahead of ours, beyond what the asking itself explains; behind: negative."""

    def only(self, names: Collection[str]) -> Live:
        """The same, of these nodes alone."""
        return evolve(
            self,
            answers={name: answer for name, answer in self.answers.items() if name in names},
            silent=tuple(name for name in self.silent if name in names),
        )


@frozen(kw_only=True)
class LiveTunnel:
    """A tunnel from `node` to `other`, a node or a peer, as `node` has it."""

    node: str
    other: str
    handshake: int | None
    """Seconds since the last one; None: never."""
    received: int
    sent: int
    endpoint: str

    @property
    def up(self) -> bool:
        """Whether the session lives."""
        return self.handshake is not None and self.handshake <= SESSION_SECONDS


async def gather(
    client: Client,
    keys: Keys,
    names: Collection[str],
    *,
    patience: float = PATIENCE_SECONDS,
    tries: int = 0,
    targets: Collection[str] = (),
) -> Live:
    """Ask the agents of `names`, who should be known to live. The outcome has what etcd refuses. For `tries` and
    `targets` see `store.diagnostics.request_diagnostics`."""
    before = time.time()
    try:
        answers = await request_diagnostics(client, keys, names, patience=patience, tries=tries, targets=targets)
    except EtcdError as error:
        return Live(refused=str(error), denied=isinstance(error, PermissionDenied))
    after = time.time()
    return Live(
        answers=answers,
        silent=tuple(sorted(set(names) - answers.keys())),
        clocks={name: off for name, response in answers.items() if (off := _off(response.time / 1000, before, after))},
    )


def _off(theirs: float, before: float, after: float) -> float:
    return theirs - after if theirs > after else theirs - before if theirs < before else 0.0


def tunnels(topology: Topology, live: Live) -> dict[str, tuple[LiveTunnel, ...]]:
    """The tunnels of each leader that has answered, by the other end's name; keys that the mesh does not know are
    left out.

    Members have no entry: they keep the leaders' keys for the day when they lead, and send nothing to them.
    """
    names = {node.public_key: node.name for node in topology.snapshot.nodes.values()}
    names.update((peer.public_key, peer.name) for peer in topology.peers.values())
    leaders = {segment.leader.name for segment in topology.segments.values()}
    return {
        node: tuple(sorted((_named(node, tunnel, names) for tunnel in live.answers[node].tunnels
                            if tunnel.public_key in names), key=lambda tunnel: tunnel.other))
        for node in sorted(leaders & live.answers.keys())
    }  # fmt: skip


def _named(node: str, tunnel: Tunnel, names: Mapping[str, str]) -> LiveTunnel:
    return LiveTunnel(
        node=node,
        other=names[tunnel.public_key],
        handshake=tunnel.handshake if tunnel.handshake >= 0 else None,
        received=tunnel.received,
        sent=tunnel.sent,
        endpoint=tunnel.endpoint,
    )


@frozen(kw_only=True)
class Pair:
    """Two leaders that a tunnel joins, `one` before `other`, and what their two ends report of it."""

    one: str
    other: str
    ends: tuple[LiveTunnel, ...]
    """Of those that answered, at most two; an end that answered and has no such peer counts as one without a
    handshake."""

    @property
    def up(self) -> bool | None:
        """None: neither end has answered. One end that has a session is enough: a handshake takes both."""
        return any(end.up for end in self.ends) if self.ends else None

    @property
    def handshake(self) -> int | None:
        """Seconds since the last one, by the end that knows of the later."""
        handshakes = [end.handshake for end in self.ends if end.handshake is not None]
        return min(handshakes) if handshakes else None

    @property
    def last(self) -> str:
        """The same for people."""
        return "no handshake yet" if self.handshake is None else f"last handshake {ago(self.handshake)} ago"


def pairs(topology: Topology, by_node: Mapping[str, Iterable[LiveTunnel]]) -> tuple[Pair, ...]:
    """Every pair of leaders that should have a tunnel, by names; in a full mesh that is every pair of nodes.

    `by_node` is what `tunnels` gives.
    """
    by_name = {node: {tunnel.other: tunnel for tunnel in theirs} for node, theirs in by_node.items()}
    policy = topology.policy
    leaders = sorted((segment.leader for segment in topology.segments.values()), key=lambda node: node.name)
    result = []
    for index, one in enumerate(leaders):
        for other in leaders[index + 1 :]:
            if not policy.tunnel_between(one, other):
                continue
            ends = tuple(
                by_name[node].get(far)
                or LiveTunnel(node=node, other=far, handshake=None, received=0, sent=0, endpoint="")
                for node, far in ((one.name, other.name), (other.name, one.name))
                if node in by_name
            )
            result.append(Pair(one=one.name, other=other.name, ends=ends))
    return tuple(result)


def edge_states(topology: Topology, live: Live) -> dict[Edge, EdgeState]:
    """The state of each tunnel, by its edge in the picture; tunnels to sleeping laptops are in no state."""
    result = {}
    by_node = tunnels(topology, live)
    for pair in pairs(topology, by_node):
        if pair.ends:
            result[Edge(pair.one, pair.other, EdgeKind.TUNNEL)] = EdgeState(pair.up, pair.last)
    for node, theirs in by_node.items():
        for tunnel in theirs:
            if tunnel.other in topology.peers and tunnel.handshake is not None:
                state = EdgeState(True if tunnel.up else None, f"last handshake {ago(tunnel.handshake)} ago")
                result[Edge(node, tunnel.other, EdgeKind.PEER)] = state
    return result


def differs(answer: DiagnosticsResponse) -> str:
    """How a kernel differs from the plan, as `not as planned: 3 changes are missing, the first: ip route add ...`."""
    missing = "1 change is missing" if answer.undone == 1 else f"{answer.undone} changes are missing"
    separator = ": " if answer.undone == 1 else ", the first: "
    first = f"{separator}{answer.changes[0]}" if answer.changes else ""
    return f"not as planned: {missing}{first}"


def ago(seconds: int | None) -> str:
    """`never`, `12 s`, `3 min`, `2 h` or `4 d`."""
    if seconds is None:
        return "never"
    return shown_duration(seconds)


def amount(number: int) -> str:
    """Bytes for people: `312 B`, `1.5 MiB`."""
    value = float(number)
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"
