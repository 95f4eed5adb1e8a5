"""Serves diagnostics requests: the tunnels and traffic of this host's kernel, and what differs from the plan.

Requests come through etcd (`store.diagnostics`). A response reads the kernel and writes nothing to it, except that a
reading which finds drift has it repaired as any other would. It never stops the agent: where etcd does not let the
agent receive requests, a warning says so once, and it tries again now and then.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from ipaddress import ip_address
from itertools import islice

import trio
from attrs import define, field, frozen

from kilo_etcd import kernel
from kilo_etcd.agent.probing.packet_sizes import SizeSearch
from kilo_etcd.agent.probing.ping_targets import addresses_to_try, nodes_to_try, offered_to_try
from kilo_etcd.agent.probing.taken_routes import taken_directly, taken_route, with_cause
from kilo_etcd.etcd import api as etcd
from kilo_etcd.kernel.echo import EchoRequests
from kilo_etcd.kernel.firewall.chains import Refusal
from kilo_etcd.kernel.routing.rules import ForeignRule
from kilo_etcd.kernel.state import IPIP_OVERHEAD, WIREGUARD_OVERHEAD, Link, Observed, ObservedPeer
from kilo_etcd.model import SESSION_SECONDS, SMALLEST_MTU, IPAddress
from kilo_etcd.model.hostplan import HostPlan, PeerPlan
from kilo_etcd.planning.reach import targets
from kilo_etcd.runtime.handshakes import trigger_handshakes
from kilo_etcd.runtime.logs import Once
from kilo_etcd.store.diagnostics import serve
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.mirror import Mirror
from kilo_etcd.store.records import DiagnosticsRequest, DiagnosticsResponse, EchoCount, EchoSize, TakenRoute, Tunnel
from kilo_etcd.topology.segments import Topology, host_network

SHOWN = 20
"""How many changes an answer names; it counts all."""

MOST_TUNNELS = 10_000
"""What fits into one value of etcd, which takes 1.5 MiB; a tunnel with an IPv6 endpoint has about 140 bytes."""

HANDSHAKE_SECONDS = 1.5
"""How long the tunnels have for their handshakes after they are triggered."""

HANDSHAKE_POLL_SECONDS = 0.1

PINGS, PING_SECONDS = 8, 1.2
"""Echo requests to each address, and how long an answer to the last one may take: a tunnel may need a handshake
first."""

MORE_PINGS, MORE_SECONDS = 24, 0.3
"""The same for those that have not answered these. One that answers now is not cut off: packets get lost on the way. If
half of them get lost each way, one address in ten answers none of 8 requests, and one in 10,000 none of 32."""

COUNTED_PINGS, COUNTED_SECONDS = 20, 1.2
"""The same for those that have answered, whose answers are counted: many hosts' counts together show where packets get
lost in part."""

FIRST_LARGE_SECONDS = 0.3
"""How long an answer may take to a first request as large as the tunnel's MTU, which goes to each of those that have
answered small ones: mostly it is the only one."""

LARGE_PINGS, LARGE_SECONDS = 9, 0.6
"""Those that follow, to who has not answered it. The first ones may be lost while the host learns of a smaller MTU on
the way."""

MOST_SIZED = 8
"""Nodes for which the size of the largest packet that arrives is looked for, each with one large packet on its way."""

SIZE_SECONDS = 1.0
"""How long an answer may take to a packet whose size is tried, and to the small one that follows it."""

SIZED_BY_SECONDS = 6.3
"""How long after the request's arrival sizes are tried at most: kgctl waits a little longer (`PATIENCE_SECONDS`)."""

QUIET_SECONDS = 2.0
"""How long after the last echo requests a firewall's limit may still be used up."""

MOST_TRIED = 128
"""Nodes that one request has tried at most, of this host's choice, and as many addresses besides: kgctl asks for half.
A requester must not be able to have a whole mesh flood a host."""

MOST_INTERNAL = 256
"""Internal IPs that one request has tried at most: a node may have several."""

RETRY_SECONDS = 30.0
AWAY_SECONDS = 2.0


@frozen(kw_only=True)
class AppliedPlan:
    """What the agent has brought about."""

    plan: HostPlan | None
    """None: nothing yet."""
    revision: int
    topology: Topology | None
    sends: bool
    """Whether the host's own packets leave through its tunnels, so that a packet tries them."""
    undecided: tuple[str, ...] = ()
    """Members of the location that may not have answered yet."""


class DiagnosticsServer:
    """Answers for one agent. `run` is its task; `programmed` says what is in force when it is asked, `untrusted` why
    etcd is not followed; None: it is. `asked` is called if packets are to be tried: kgctl reads the status
    afterwards."""

    def __init__(
        self,
        client: etcd.Client,
        keys: Keys,
        name: str,
        device: kernel.Kernel,
        programmed: Callable[[], AppliedPlan],
        once: Once,
        *,
        untrusted: Callable[[], str | None] = lambda: None,
        asked: Callable[[], None] = lambda: None,
    ) -> None:
        self._client = client
        self._keys = keys
        self._name = name
        self._kernel = device
        self._programmed = programmed
        self._untrusted = untrusted
        self._asked = asked
        self._once = once
        self._rng = random.Random()
        self._quiet_at = 0.0
        """From when on no echo requests of an answer are on their way, and firewalls with a limit take some again."""

    @property
    def sends_many(self) -> bool:
        """Whether this host, and perhaps others, send echo requests for `kgctl` now, or did a moment ago."""
        return trio.current_time() < self._quiet_at

    async def follow(self, mirror: Mirror) -> None:
        """Answer until cancelled, and begin anew in another etcd: there a watch would wait for a revision that is far
        away."""
        trust = mirror.trust
        while True:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.run)
                trust = await mirror.wait_trust_change(trust)
                nursery.cancel_scope.cancel()

    async def run(self) -> None:
        """Answer until cancelled."""
        while True:
            try:
                await serve(self._client, self._keys, self._name, self._respond)
            except etcd.Unavailable:
                # The rest of the agent says so, louder; who comes back to etcd with us wants an answer soon.
                await trio.sleep(AWAY_SECONDS * self._rng.uniform(0.5, 1.5))
                continue
            except etcd.EtcdError as error:
                self._once.warning("diagnostics", "diagnostics requests of kgctl cannot be served", error=str(error))
            await trio.sleep(RETRY_SECONDS * self._rng.uniform(0.5, 1.5))

    async def _respond(self, request: DiagnosticsRequest) -> DiagnosticsResponse | None:
        """Nothing where only agents are asked that do not follow this etcd; such a one says that alone."""
        reason = self._untrusted()
        if reason is not None:
            await trio.lowlevel.checkpoint()
            return DiagnosticsResponse(
                time=int(time.time() * 1000), revision=self._programmed().revision, untrusted=reason
            )
        return None if request.trust_only else await self.answer(request)

    async def answer(self, request: DiagnosticsRequest) -> DiagnosticsResponse:
        """What is on the host now, and whether packets arrive, if that is asked."""
        if not (request.tries or request.targets):
            return await self._answer(request)
        self._asked()
        self._quiet_at = math.inf
        try:
            return await self._answer(request)
        finally:
            self._quiet_at = trio.current_time() + QUIET_SECONDS

    async def _answer(self, request: DiagnosticsRequest) -> DiagnosticsResponse:
        programmed = self._programmed()
        plan = programmed.plan
        trouble: list[str] = []
        possible_obstacles: list[str] = []
        untested_obstacles: list[str] = []
        refusals: tuple[Refusal, ...] = ()
        named: set[str] = set()
        tried = _PingResults()
        commands: tuple[str, ...] = ()
        observed = Observed()
        try:
            if plan is not None:
                # The status names the changes that failed.
                commands = tuple(map(str, await self._kernel.preview(plan, failed=False)))
            observed = await self._kernel.observe()
            if plan is not None:
                async with trio.open_nursery() as nursery:
                    mtu = observed.link.mtu if observed.link is not None else 0
                    nursery.start_soon(self._send, request, programmed, plan, observed, mtu, tried, trouble)
                    if programmed.sends:
                        try:
                            observed = await self._trigger_handshakes(plan, observed)
                        except kernel.KernelError as error:
                            # Caught in here: a nursery would make a group of it.
                            trouble.append(str(error))
            trouble += await self._kernel.bypasses()
            if plan is not None and plan.forwarding:
                for obstacle in await self._kernel.obstacles():
                    # On a member most harm nobody until it leads.
                    forwards = programmed.sends or not obstacle.leading
                    if obstacle.certain and forwards:
                        trouble.append(obstacle.text)
                        named |= set() if obstacle.networks else {obstacle.chain}
                    elif obstacle.certain or forwards:
                        possible_obstacles.append(obstacle.text)
                        if obstacle.untested and forwards:
                            untested_obstacles.append(obstacle.text)
            if plan is not None:
                refusals = await self._kernel.refusals()
        except kernel.KernelError as error:
            trouble.append(str(error))
        if tried.routes and self._programmed().plan != plan:
            # The kernel's choice may have been that of the new plan, and was compared with the routes of the old one.
            tried.routes.clear()
        uplink = _uplink(plan, observed)
        return DiagnosticsResponse(
            time=int(time.time() * 1000),
            revision=programmed.revision,
            backend=self._kernel.backend,
            mtu=observed.link.mtu if observed.link is not None else 0,
            uplink=uplink.name if uplink is not None else "",
            uplink_mtu=uplink.mtu if uplink is not None else 0,
            tunnels=tunnels(observed),
            undone=len(commands),
            changes=commands[:SHOWN],
            trouble=tuple(dict.fromkeys(trouble)),
            possible_obstacles=tuple(possible_obstacles),
            untested_obstacles=tuple(untested_obstacles),
            # What is dropped of others' packets too, in the same chain, is named as that.
            own_losses=tuple(r.text for r in refusals if not r.meant and not (r.chain and r.chain in named)),
            refused=tuple(refusal.text for refusal in refusals if refusal.meant),
            limits_echoes=any(refusal.limits_echoes for refusal in refusals),
            reached=tuple(address for address, answered in tried.answered.items() if answered),
            unreached=tuple(address for address, answered in tried.answered.items() if not answered),
            routes=tuple(tried.routes),
            unanswered_peers=tuple(tried.unanswered_peers),
            unsent_peers=tuple(tried.unsent_peers),
            echoes=tuple(tried.echoes),
            small_only=tuple(tried.small_only),
            largest=tuple(tried.largest),
            # As it was before the packets went out: what is decided meanwhile is in the status by now.
            undecided=programmed.undecided,
            clear=() if plan is None or plan.encryption is None else tuple(map(str, plan.encryption.clear)),
        )

    async def _send(
        self,
        request: DiagnosticsRequest,
        programmed: AppliedPlan,
        plan: HostPlan,
        observed: Observed,
        mtu: int,
        tried: _PingResults,
        trouble: list[str],
    ) -> None:
        """Send echo requests to the targets of the request, small ones and then some as large as `mtu`, and note which
        answers which, which routes the kernel takes, and what WireGuard sends and receives meanwhile."""
        topology, started = programmed.topology, trio.current_time()
        if topology is None:
            return
        chosen = nodes_to_try(topology, self._name, min(request.tries, MOST_TRIED))
        to_try = addresses_to_try(topology, self._name, plan, chosen)
        if request.targets:
            # Nobody is to learn, or to reach, by this host what is not the mesh's.
            nodes = topology.snapshot.nodes.values()
            allowed = addresses_to_try(topology, self._name, plan, nodes, endpoints=True)
            targets = tuple(dict.fromkeys(_addresses(request.targets)))
            # Looking up what is not a node's takes long, and whoever may write a request may ask for thousands.
            others = [address for address in targets if address not in allowed]
            allowed.update(offered_to_try(topology, plan, others[:MOST_TRIED]))
            requested = [address for address in targets if address in allowed]
            to_try.update((address, allowed[address]) for address in requested[:MOST_TRIED])
        routes = {address: route for address, route in to_try.items() if route is not None}
        for address in list(routes)[MOST_INTERNAL:]:
            del routes[address], to_try[address]
        if not to_try:
            return
        sources = {address: route.source for address, route in routes.items() if route.source is not None}
        try:
            with_sources = {address: sources.get(address) for address in to_try}
            tried.routes += await self._routes(topology, plan, with_sources, routes, observed)
            if programmed.sends:
                tried.routes += await self._routes_to_endpoints(plan, observed)
            answers = await self._kernel.ping(to_try, EchoRequests(sources=sources, times=PINGS, patience=PING_SECONDS))
            mesh = [address for address in answers if address not in routes]
            silent = [address for address in to_try if address not in answers]
            tried.answered.update((str(address), address in answers) for address in to_try)

            async def try_again() -> None:
                more = EchoRequests(sources=sources, times=MORE_PINGS, patience=MORE_SECONDS)
                late = await self._kernel.count_echoes(silent, more)
                tried.answered.update((str(address), True) for address in late)
                tried.count(late, PINGS + MORE_PINGS)

            async def count() -> None:
                requests = EchoRequests(times=COUNTED_PINGS, patience=COUNTED_SECONDS)
                counts = await self._kernel.count_echoes(mesh, requests)
                tried.count({address: counts.get(address, 0) for address in mesh}, COUNTED_PINGS)

            async def try_large() -> None:
                large: set[IPAddress] = set()

                async def send(addresses: Collection[IPAddress], *, dont_fragment: bool) -> None:
                    for times, patience in ((1, FIRST_LARGE_SECONDS), (LARGE_PINGS, LARGE_SECONDS)):
                        requests = EchoRequests(times=times, patience=patience, size=mtu, dont_fragment=dont_fragment)
                        large.update(await self._kernel.ping([a for a in addresses if a not in large], requests))

                # The tunnel itself takes such packets; beyond its far end a network may take less, which packets tell.
                direct = _far_ends(topology, plan) if programmed.sends else set()
                async with trio.open_nursery() as nursery:
                    for far_end in (True, False):
                        chosen = [address for address in mesh if (address in direct) is far_end]
                        nursery.start_soon(noted, partial(send, chosen, dont_fragment=far_end))
                if errors:
                    return
                small_only = [address for address in mesh if address not in large]
                tried.small_only += map(str, small_only)
                small_only.sort(key=lambda address: address not in direct)
                with trio.move_on_at(started + SIZED_BY_SECONDS):
                    async with trio.open_nursery() as nursery:
                        for address in small_only[:MOST_SIZED]:
                            nursery.start_soon(noted, partial(measure, address))

            async def measure(address: IPAddress) -> None:
                search = SizeSearch(floor=SMALLEST_MTU[address.version], too_large=mtu)
                while (largest := search.largest) is None:
                    size = search.next_size
                    passes = await self._kernel.passes(address, size, SIZE_SECONDS)
                    if passes is not None:
                        search = search.tried(size, passes=passes)
                if largest:
                    tried.largest.append(EchoSize(str(address), largest))

            # Of a nursery's errors a group would be made.
            errors: list[kernel.KernelError] = []

            async def noted(attempt: Callable[[], Awaitable[None]]) -> None:
                try:
                    await attempt()
                except kernel.KernelError as error:
                    errors.append(error)

            async with trio.open_nursery() as nursery:
                if silent:
                    nursery.start_soon(noted, try_again)
                if mesh:
                    nursery.start_soon(noted, count)
            # Not meanwhile: small packets could get lost in a queue that is full of large ones.
            if mtu and mesh:
                await noted(try_large)
            if errors:
                raise errors[0]
            if programmed.sends:
                tried.compare(observed, (await self._kernel.peer_activity()).peers)
        except kernel.KernelError as error:
            trouble.append(str(error))

    async def _routes(
        self,
        topology: Topology,
        plan: HostPlan,
        sources: Mapping[IPAddress, IPAddress | None],
        internal: Collection[IPAddress],
        observed: Observed,
    ) -> list[TakenRoute]:
        """The kernel's routes to these addresses, with the source address of each, and to members of the location. All
        that are not the plan's, and all to the internal IPs among them."""
        members = {target.address for target in targets(topology, self._name)} - sources.keys()
        answers = await self._kernel.routes_taken({**dict.fromkeys(members), **sources})
        result: list[TakenRoute] = []
        rules: tuple[ForeignRule, ...] | None = None
        for address, answer in answers.items():
            if address in members:
                if not isinstance(answer, str):
                    continue  # Whether it is another program's only matters if there is no answer.
                rules = await self._kernel.foreign_rules() if rules is None else rules
                route = taken_directly(address, answer, rules)
            else:
                route = taken_route(address, sources[address], answer, observed)
            if route.foreign and rules is None:
                rules = await self._kernel.foreign_rules()
            if address in internal or (route.foreign and host_network(address) not in plan.refused):
                foreign = {} if address in members else observed.foreign
                result.append(with_cause(route, address, answer, rules or (), foreign))
        return result

    async def _routes_to_endpoints(self, plan: HostPlan, observed: Observed) -> list[TakenRoute]:
        """Why WireGuard cannot send to endpoints of its peers, of those to which the kernel has no route."""
        peers = (observed.peers.get(key) for key, peer in plan.peers.items() if peer.in_use)
        endpoints = (peer.endpoint.address for peer in peers if peer is not None and peer.endpoint is not None)
        addresses = islice(dict.fromkeys(address for address in endpoints if address is not None), MOST_TRIED)
        answers = await self._kernel.routes_taken(dict.fromkeys(addresses), by_wireguard=True)
        return [
            TakenRoute(str(address), "", f"none: {answer}", True)
            for address, answer in answers.items()
            if isinstance(answer, str)
        ]

    async def _trigger_handshakes(self, plan: HostPlan, observed: Observed) -> Observed:
        """Send one packet through each tunnel at rest, and give handshakes a moment: without traffic there are none.

        Only to peers that the plan has an endpoint for: a laptop that sleeps is no news.
        """
        at_rest = {
            key
            for key, peer in plan.peers.items()
            if peer.endpoint is not None and peer.in_use and _asleep(observed, key)
        }
        if not at_rest:
            return observed
        trigger_handshakes([address for key in at_rest if (address := _someone(plan.peers[key])) is not None])
        deadline = trio.current_time() + HANDSHAKE_SECONDS
        while trio.current_time() < deadline and any(_asleep(observed, key) for key in at_rest):
            await trio.sleep(HANDSHAKE_POLL_SECONDS)
            observed = await self._kernel.observe()
        return observed


@define
class _PingResults:
    """The results of the echo requests of one request."""

    answered: dict[str, bool] = field(factory=dict)
    echoes: list[EchoCount] = field(factory=list)
    small_only: list[str] = field(factory=list)
    largest: list[EchoSize] = field(factory=list)
    routes: list[TakenRoute] = field(factory=list)
    unanswered_peers: list[str] = field(factory=list)
    unsent_peers: list[str] = field(factory=list)

    def count(self, answers: Mapping[IPAddress, int], sent: int) -> None:
        """Note how many of `sent` requests were answered."""
        self.echoes += (EchoCount(str(address), sent, answered) for address, answered in answers.items())

    def compare(self, before: Observed, after: Mapping[str, ObservedPeer]) -> None:
        """Note the peers with whom packets go one way only."""
        for key, peer in sorted(after.items()):
            if (former := before.peers.get(key)) is not None:
                sent, received = peer.tx_bytes > former.tx_bytes, peer.rx_bytes > former.rx_bytes
                if sent != received:
                    (self.unanswered_peers if sent else self.unsent_peers).append(key)


def _uplink(plan: HostPlan | None, observed: Observed) -> Link | None:
    """The device whose MTU gives that of the tunnel."""
    uplink, link = observed.uplink, observed.link
    if uplink is None or link is None or plan is None:
        return None
    overhead = WIREGUARD_OVERHEAD + (IPIP_OVERHEAD if plan.ipip_remotes else 0)
    # A mesh with IPv6 addresses keeps what these need, whatever the network carries.
    least = SMALLEST_MTU[6] if any(address.version == 6 for address in plan.addresses) else 0
    return uplink if link.mtu == max(uplink.mtu - overhead, least) else None


def tunnels(observed: Observed) -> tuple[Tunnel, ...]:
    """The peers that the device has, by public key."""
    result = []
    for key in sorted(observed.peers)[:MOST_TUNNELS]:
        peer = observed.peers[key]
        ago = max(0, int(observed.time - peer.last_handshake)) if peer.last_handshake else -1
        result.append(Tunnel(key, ago, peer.rx_bytes, peer.tx_bytes, str(peer.endpoint) if peer.endpoint else ""))
    return tuple(result)


def _far_ends(topology: Topology, plan: HostPlan) -> set[IPAddress]:
    """The mesh addresses of the nodes to which this host has tunnels of its own."""
    nodes = (topology.snapshot.nodes.get(peer.name) for peer in plan.peers.values() if peer.in_use)
    return {address for node in nodes if node is not None for address in node.mesh_addresses}


def _addresses(texts: Iterable[str]) -> Iterator[IPAddress]:
    for text in texts:
        with suppress(ValueError):
            yield ip_address(text)


def _someone(peer: PeerPlan) -> IPAddress | None:
    """An address behind the peer that belongs to one host."""
    return next((n.network_address for n in peer.allowed_ips if n.prefixlen == n.max_prefixlen), None)


def _asleep(observed: Observed, key: str) -> bool:
    peer = observed.peers.get(key)
    return peer is None or not peer.last_handshake or observed.time - peer.last_handshake > SESSION_SECONDS
