"""Whether members of this host's location answer at their internal IPs: a record of answers, and the task that asks.

Each member is asked once when it joins, and rarely after that. What counts as an answer, in this order:

1. a signed answer to a query on UDP 1107 (`agent.leader_hints.peer_query`): it authenticates that very node;
2. an echo reply from the address;
3. on a link of this host, the address's link-layer address (ARP, ND): networks that filter the other two lose nothing.

Members that are reached through the tunnel (`--encapsulate wireguard`) are asked through it, and any answer will do, a
handshake too.

A member that has answered once counts as reachable from then on: a host that is down later is no reason to change a
route. A node that was moved, has another address or another key begins anew, and so do all if this host itself has
moved. A route that is in the kernel when the agent starts counts as an answer until its node has been silent a few
times although its agent lives.

`Records` is pure: targets, answers and times (seconds of one monotonic clock) come in, what is due and what is silent
goes out. `Reachability` acts; it never raises, and writes nowhere.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Collection, Mapping
from enum import IntEnum

import trio
from attrs import define, field

from kilo_etcd import kernel
from kilo_etcd.agent.probing.taken_routes import taken_directly, with_cause
from kilo_etcd.kernel.echo import EchoRequests
from kilo_etcd.kernel.state import Observed
from kilo_etcd.model import SESSION_SECONDS, IPAddress, Node
from kilo_etcd.model.hostplan import HostPlan
from kilo_etcd.planning.reach import MemberAddress, Silent, local_members, targets_of
from kilo_etcd.topology.segments import Topology, UnknownNode, host_network

NAMED_AFTER = 4
"""Attempts in a row without an answer after which a target is reported: they take about six seconds."""

AGAIN = 0.5
"""Seconds to the second attempt; each further one is twice as far away as the one before."""

LONGEST, LONGEST_OF_MANY, PER_SILENT = 60.0, 300.0, 0.3
"""Seconds at most between two attempts at a silent target: in general, where there are very many, and for each."""

RARELY, PER_TARGET = 600.0, 3.6
"""Seconds between two looks at a target that answers: at least, and for each target: 1,000 make it an hour."""

AT_ONCE, SPACING = 64, 0.002
"""Targets that are asked together at most, and seconds of pause for each: 500 queries in a second at most."""

TUNNEL_FIRST = 10.0
"""Seconds until a member is first asked through the tunnel: by then the two ends have had a handshake, one after the
other (decision 0004). Nothing waits for the answer."""

QUERY_SECONDS, ECHO_SECONDS = 0.25, 0.5
"""How long an answer may take."""

GATHER = 0.0005
"""Seconds for each target, until news of answers is passed on: those of a large location come in a row."""

MOST_GATHER = 0.25
ROUTES_CHANGE = 0.25
"""Seconds until it is looked again if the kernel holds the plan that makes a node a member of this host's segment."""


class MemberAnswer(IntEnum):
    """How well a target has answered so far."""

    NONE = 0
    ASSUMED = 1
    """Its route was in the kernel when the agent started."""
    UNSIGNED = 2
    """Something answers at the address."""
    SIGNED = 3
    """The node does."""


@define
class _Record:
    node: Node
    due: float
    best: MemberAnswer = MemberAnswer.NONE
    tunneled: bool = False
    silent: int = 0
    """Attempts in a row without an answer."""
    unsigned: int = 0
    """Attempts in a row with no signed one."""
    route: str = ""
    """That this host's kernel takes, if it is not the plan's, by the last attempt."""
    heard_from: bool = False
    """The node has asked this host since the last attempt ended: the one under way may have come too early for it."""


@define
class Records:
    """What is known of each target."""

    rng: random.Random = field(factory=random.Random)
    _records: dict[MemberAddress, _Record] = field(factory=dict)
    _silent: int = 0
    _own: Node | None = None

    def follow(
        self,
        own: Node,
        nodes: Mapping[MemberAddress, Node],
        now: float,
        *,
        first: str = "",
        assumed: Collection[MemberAddress] = (),
    ) -> bool:
        """`nodes` is who there is now; `first` is asked before others: this host's leader. Whether anything is due."""
        self._forget(own)
        news = False
        spread = SPACING * len(nodes)
        records: dict[MemberAddress, _Record] = {}
        for target, node in nodes.items():
            record = self._records.get(target)
            if record is None or record.node.public_key != node.public_key:
                # Where a location is large, all of it must not ask a newcomer in one moment.
                due = now if target.node == first else now + self.rng.uniform(0.0, spread)
                record = _Record(node, due, MemberAnswer.ASSUMED if target in assumed else MemberAnswer.NONE)
                if target.address in node.mesh_addresses:
                    record = _Record(node, due + TUNNEL_FIRST, tunneled=True)
                news = True
            elif record.node is not node:
                if record.node != node and record.best is not MemberAnswer.SIGNED:
                    record.due, news = now, True
                record.node = node
            records[target] = record
        self._records = records
        self._silent = sum(record.silent > 0 for record in records.values())
        return news

    def _forget(self, own: Node) -> None:
        """What was found out from another place. An address of the other family that comes or goes, as IPv6's do, is no
        move: what answers at the first family's goes on answering."""
        before, self._own = self._own, own
        if before is None or (before.location, before.internal_ips) == (own.location, own.internal_ips):
            return

        def stays(target: MemberAddress, record: _Record) -> bool:
            version = target.address.version
            return not record.tunneled and before.internal_ip(version) == own.internal_ip(version)

        kept = self._records.items() if before.location == own.location else ()
        self._records = {target: record for target, record in kept if stays(target, record)}

    def node(self, target: MemberAddress) -> Node | None:
        """The node of a target; None: it is none any more."""
        record = self._records.get(target)
        return None if record is None else record.node

    def due(self, now: float) -> list[MemberAddress]:
        """The targets to query now: at most AT_ONCE, those that have waited longest first."""
        waiting = [(record.due, index, target) for index, (target, record) in enumerate(self._records.items())]
        return [target for due, _, target in sorted(entry for entry in waiting if entry[0] <= now)[:AT_ONCE]]

    def postpone(self, targets: Collection[MemberAddress], due: float) -> None:
        """Ask these at `due` and not now; their nodes may ask for an earlier attempt meanwhile."""
        for target in targets:
            if (record := self._records.get(target)) is not None:
                record.due = due

    def next_due(self) -> float:
        """When `due` has somebody."""
        return min((record.due for record in self._records.values()), default=float("inf"))

    def answered(self, target: MemberAddress, answer: MemberAnswer, now: float) -> bool:
        """An answer came; whether that changes what is reported or routed."""
        record = self._records.get(target)
        if record is None:
            return False
        if record.tunneled:
            answer = MemberAnswer.SIGNED  # By WireGuard.
        news = record.best in (MemberAnswer.NONE, MemberAnswer.ASSUMED) or record.silent >= NAMED_AFTER
        news = news or (answer is MemberAnswer.SIGNED and record.best is not MemberAnswer.SIGNED)
        record.best = max(record.best, answer)
        self._silent -= record.silent > 0
        record.silent = 0
        rarely = max(RARELY, PER_TARGET * len(self._records)) * self.rng.uniform(0.8, 1.2)
        if answer is MemberAnswer.SIGNED:
            record.unsigned, record.due = 0, now + rarely
        else:
            record.unsigned += 1
            news = news or record.unsigned == NAMED_AFTER
            record.due = now if record.heard_from else now + min(AGAIN * 2.0 ** min(record.unsigned, 20), rarely)
        record.heard_from = False
        return news

    def silent(self, target: MemberAddress, now: float) -> bool:
        """No answer came; whether that changes what is reported or routed."""
        record = self._records.get(target)
        if record is None:
            return False
        self._silent += record.silent == 0
        record.silent += 1
        longest = max(LONGEST, min(LONGEST_OF_MANY, PER_SILENT * self._silent))
        pause = min(AGAIN * 2.0 ** min(record.silent - 1, 20), longest)
        record.due = now if record.heard_from else now + pause * self.rng.uniform(0.8, 1.2)
        record.heard_from = False
        return record.silent == NAMED_AFTER

    def takes(self, target: MemberAddress, route: str) -> bool:
        """Note the kernel's route to a silent target, if it is not the plan's; whether that is news."""
        record = self._records.get(target)
        if record is None or record.route == route:
            return False
        record.route = route
        return record.silent >= NAMED_AFTER

    def heard_of(self, target: MemberAddress, now: float) -> bool:
        """The node itself has asked this host, so it is worth asking now; whether it is asked."""
        record = self._records.get(target)
        if record is None or (record.best is MemberAnswer.SIGNED and not record.silent):
            return False
        record.heard_from, record.due = True, min(record.due, now)
        return True

    def live_again(self, names: Collection[str], now: float) -> bool:
        """The agents of these nodes live, which they did not before: that they were silent meanwhile means nothing, and
        it is worth asking now. Whether anybody is asked."""
        news = False
        spread = SPACING * len(names)
        for target, record in self._records.items():
            if record.silent and target.node in names:
                self._silent -= 1
                record.silent, record.heard_from, news = 0, True, True
                record.due = min(record.due, now + self.rng.uniform(0.0, spread))
        return news

    def silent_ones(self, living: Collection[str]) -> tuple[Silent, ...]:
        """The targets that do not answer. Of nodes whose agents do not live nothing is concluded."""
        result = []
        for target, record in self._records.items():
            named = record.silent >= NAMED_AFTER and target.node in living
            if named and record.best is MemberAnswer.ASSUMED:
                record.best = MemberAnswer.NONE
            withheld = record.best is MemberAnswer.NONE and not record.tunneled
            if withheld or named:
                result.append(
                    Silent(
                        target=target, withheld=withheld, named=named, tunneled=record.tunneled, route=record.route
                    )
                )  # fmt: skip
        return tuple(result)

    def undecided(self, living: Collection[str]) -> tuple[str, ...]:
        """The nodes that have not answered so far, and are not named for it: they were not asked often enough, or their
        agents have not lived long enough."""
        return tuple(
            target.node
            for target, record in self._records.items()
            if record.best <= MemberAnswer.ASSUMED and not (record.silent >= NAMED_AFTER and target.node in living)
        )

    def unsigned(self) -> tuple[MemberAddress, ...]:
        """The targets that answer, but never with the node's key, although they were asked several times."""
        return tuple(
            target
            for target, record in self._records.items()
            if record.best is MemberAnswer.UNSIGNED and record.unsigned >= NAMED_AFTER
        )


class Reachability:
    """Of node `name`.

    `ask` sends a signed query to a node at an address, if it can, and hands over the query's nonce before that: the
    answer may be faster than the sender. `on_change` is called when there is news of who answers. `programmed` is the
    plan that the kernel holds: as long as that has a route of its own to an address, through a tunnel, an answer from
    there shows nothing of the location's own network.
    """

    def __init__(
        self,
        device: kernel.Kernel,
        name: str,
        *,
        ask: Callable[[Node, IPAddress, Callable[[bytes], None]], Awaitable[None]] | None,
        on_change: Callable[[], object],
        programmed: Callable[[], HostPlan | None],
        rng: random.Random | None = None,
    ) -> None:
        self._device = device
        self._programmed = programmed
        self._name = name
        self._ask = ask
        self._on_change = on_change
        self._records = Records(rng or random.Random())
        self._topology: Topology | None = None
        self._targets: dict[MemberAddress, Node] = {}
        self._own: Node | None = None
        self._by_node: dict[str, tuple[Node, tuple[MemberAddress, ...]]] = {}
        self._by_node_for: tuple[Node, frozenset[int]] | None = None
        """The node, and the families, for which these were computed."""
        self._observed: Observed | None = None
        self._waiting: dict[bytes, MemberAddress] = {}
        self._answered = trio.Event()
        self._news = trio.Event()
        self._undelivered = trio.Event()
        self._living: frozenset[str] = frozenset()
        """Members whose agents lived at the last `follow`."""
        self.ready = False
        """Whether `start` was called."""
        self.silent: tuple[Silent, ...] = ()
        """By the last `follow`."""

    def start(self, observed: Observed) -> None:
        """What the kernel held when the agent started: routes that are there are kept until more is known."""
        self.ready, self._observed = True, observed

    def follow(self, topology: Topology) -> tuple[Silent, ...]:
        """The members that do not answer; `topology` is in force. UnknownNode."""
        own = topology.snapshot.nodes.get(self._name)
        if own is None:
            raise UnknownNode(self._name)
        if self._changed(topology, own):
            self._targets = self._targets_now(topology, own)
            first = topology.segment_of(self._name).leader.name
            assumed = () if self._observed is None else _routed(self._observed, topology, self._targets, first)
            self._observed = None
            # With tunnels inside locations no answers are needed; the known ones stay for the switch back.
            if topology.policy.location_network_in_use and self._records.follow(
                own, self._targets, trio.current_time(), first=first, assumed=assumed
            ):  # fmt: skip
                self._news.set()
        self._topology, self._own = topology, own
        candidates = topology.snapshot.candidates.get(own.location, ()) if self._targets else ()
        living = frozenset(candidate.node for candidate in candidates)
        if (came := living - self._living) and self._records.live_again(came, trio.current_time()):
            self._news.set()
        self._living = living
        self.silent = self._records.silent_ones(living) if self._targets else ()
        return self.silent

    def _changed(self, topology: Topology, own: Node) -> bool:
        """Whether there may be other targets than before."""
        before = self._topology
        if before is None or self._own != own or topology.base is not before.identity:
            return before is not topology
        if (before.policy, before.families) != (topology.policy, topology.families):
            return True
        if not topology.policy.direct_within_location:
            return before.segment_of(self._name).members != topology.segment_of(self._name).members
        segments = (before.segments.get(key) or topology.segments.get(key) for key in topology.changed)
        location = own.location
        return any(segment is not None and segment.location == location for segment in segments) or any(
            segment.location == location
            for key in topology.changed
            if (segment := topology.segments.get(key)) is not None
        )

    def _targets_now(self, topology: Topology, own: Node) -> dict[MemberAddress, Node]:
        # Of a large location one member changes, and the others are the same objects.
        families = topology.families
        former = self._by_node if (own, families) == self._by_node_for else {}
        by_node: dict[str, tuple[Node, tuple[MemberAddress, ...]]] = {}
        for node in local_members(topology, self._name):
            former_entry = former.get(node.name)
            unchanged = former_entry is not None and former_entry[0] is node
            by_node[node.name] = former_entry if former_entry and unchanged else (node, targets_of(own, node, families))
        self._by_node, self._by_node_for = by_node, (own, families)
        return {target: node for node, ones in by_node.values() for target in ones}

    @property
    def undecided(self) -> tuple[str, ...]:
        """Members of whom it is not known yet whether they answer, by name."""
        return tuple(sorted(set(self._records.undecided(self._living)))) if self._targets else ()

    @property
    def unsigned(self) -> tuple[str, ...]:
        """The nodes at whose internal IPs something answers that may be another host."""
        if self._ask is None:
            return ()
        return tuple(sorted({target.node for target in self._records.unsigned()}))

    # -- what others send ---------------------------------------------------------------------------------------

    def asked_by(self, node: Node, address: IPAddress) -> None:
        """A node has asked this host from that address."""
        if self._records.heard_of(MemberAddress(node.name, address), trio.current_time()):
            self._news.set()

    def answered_by(self, nonce: bytes, node: Node) -> None:
        """A signed answer of a node has come."""
        target = self._waiting.get(nonce)
        if target is None or target.node != node.name:
            return
        del self._waiting[nonce]
        if self._records.answered(target, MemberAnswer.SIGNED, trio.current_time()):
            self._undelivered.set()
        self._answered.set()

    # -- asking -------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Ask until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._deliver)
            while True:
                self._news = trio.Event()
                now = trio.current_time()
                batch = self._records.due(now)
                if early := [target for target in batch if self._too_early(target)]:
                    self._records.postpone(early, now + ROUTES_CHANGE)
                    continue
                if not batch:
                    with trio.move_on_at(self._records.next_due()):
                        await self._news.wait()
                    continue
                await self._try(batch)
                await trio.sleep(SPACING * len(batch))

    def _too_early(self, target: MemberAddress) -> bool:
        """Whether packets for a target of the location's own network would go through a tunnel, this host's or its
        leader's: its node was in another segment until now, and the kernel does not know otherwise yet."""
        plan, node = self._programmed(), self._records.node(target)
        if node is None or target.address in node.mesh_addresses:
            return False
        return plan is None or plan.routes_alone(target.address)

    async def _deliver(self) -> None:
        while True:
            await self._undelivered.wait()
            await trio.sleep(min(GATHER * len(self._targets), MOST_GATHER))
            self._undelivered = trio.Event()
            self._on_change()

    async def _try(self, batch: list[MemberAddress]) -> None:
        signed = await self._query(batch)
        unsigned = [target for target in batch if target not in signed]
        own = {interface.ip for interface in self._own.internal_ips} if self._own is not None else set()
        # What this host has itself it cannot reach elsewhere, whoever answers.
        addresses = {target.address for target in unsigned} - own
        answering = await self._unsigned(addresses) if addresses else set()
        answering.update(await self._with_session([target for target in unsigned if target.address not in answering]))
        silent = [target for target in unsigned if target.address not in answering]
        routes = await self._other_routes(silent)
        now = trio.current_time()
        for target in unsigned:
            if target in silent and self._records.takes(target, routes.get(target.address, "")):
                self._undelivered.set()
            if target.address in answering:
                news = self._records.answered(target, MemberAnswer.UNSIGNED, now)
            else:
                news = self._records.silent(target, now)
            if news:
                self._undelivered.set()

    async def _other_routes(self, targets: Collection[MemberAddress]) -> dict[IPAddress, str]:
        """The kernel's routes to those of these targets, on the location's network, to which a rule or a route of
        another program leads."""
        nodes = ((target.address, self._records.node(target)) for target in targets)
        addresses = {address for address, node in nodes if node is not None and address not in node.mesh_addresses}
        if not addresses:
            return {}
        try:
            answers = await self._device.routes_taken(dict.fromkeys(addresses))
            rules = await self._device.foreign_rules()
        except (OSError, kernel.KernelError):
            return {}  # The reconciler will say so.
        routes = {address: taken_directly(address, answer, rules) for address, answer in answers.items()}
        return {
            address: with_cause(route, address, answers[address], rules).route
            for address, route in routes.items()
            if route.foreign
        }

    async def _query(self, batch: list[MemberAddress]) -> set[MemberAddress]:
        """Which of the targets send a signed answer."""
        if self._ask is None:
            await trio.lowlevel.checkpoint()
            return set()
        queries: dict[bytes, MemberAddress] = {}
        for target in batch:
            node = self._records.node(target)

            def note(nonce: bytes, target: MemberAddress = target) -> None:
                queries[nonce] = self._waiting[nonce] = target

            if node is not None:
                await self._ask(node, target.address, note)
        with trio.move_on_after(QUERY_SECONDS):
            while self._waiting:
                self._answered = trio.Event()
                await self._answered.wait()
        unanswered = set(self._waiting.values())
        self._waiting.clear()
        return set(queries.values()) - unanswered

    async def _with_session(self, targets: Collection[MemberAddress]) -> set[IPAddress]:
        """Which of the targets, asked through the tunnel just now, have a session: a firewall may drop all but that."""
        pairs = ((target, self._records.node(target)) for target in targets)
        keys = {node.public_key: target for target, node in pairs if node and target.address in node.mesh_addresses}
        if not keys:
            return set()
        try:
            activity = await self._device.peer_activity()
        except (OSError, kernel.KernelError):
            return set()
        peers = ((target, activity.peers.get(key)) for key, target in keys.items())
        return {target.address for target, peer in peers if peer and activity.silence(peer) <= SESSION_SECONDS}

    async def _unsigned(self, addresses: Collection[IPAddress]) -> set[IPAddress]:
        """Which of the addresses answer in another way."""
        answering: set[IPAddress] = set()
        try:
            answering.update(await self._device.ping(addresses, EchoRequests(times=2, patience=ECHO_SECONDS)))
        except kernel.KernelError:
            await trio.sleep(ECHO_SECONDS)  # It may not ping; ARP and ND need a moment, too.
        try:
            if unanswered := set(addresses) - answering:
                answering.update(await self._device.resolved(unanswered))
        except (OSError, kernel.KernelError):
            pass  # The reconciler will say so.
        return answering


def _routed(
    observed: Observed, topology: Topology, nodes: Mapping[MemberAddress, Node], leader: str
) -> set[MemberAddress]:
    """The targets to which routes of ours lead already."""
    routed: set[MemberAddress] = set()
    for target, node in nodes.items():
        networks = {*map(host_network, node.mesh_addresses)}
        if target.node == leader:
            networks.update(topology.snapshot.subnets)
        routes = (observed.routes.get(network) for network in networks)
        if any(route is not None and route.gateway == target.address for route in routes):
            routed.add(target)
    return routed
