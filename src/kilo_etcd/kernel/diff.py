"""`plan - observed = changes`: pure, and the only place that decides what is done to a kernel.

The problem. A host that forwards is brought from what it holds to what the plan wants, with as little loss as Linux
allows, and without touching what is not ours.

Why it is hard. Linux has no transaction over WireGuard, routes, rules and filters, so packets meet each state in
between. Changes have effects that nobody asked for: a device that goes takes its routes along, and an allowed IP that
is given to one peer is taken from another. WireGuard changes itself: an endpoint follows the peer's packets (roaming),
and what it holds is then better than the plan. And a late packet of the peer looks like roaming to the old endpoint.

The order of the changes is make before break:

1. the unreachable routes for the mesh's subnets, the device, its addresses and MTU, our nftables table, and the IPIP
   device that it guards, so that nothing later lacks what it needs;
2. one run of WireGuard changes, which the kernel layer sends as one transaction if they fit one message: peers that
   come, and allowed IPs that move to a peer (which takes them from the peer that had them, with no moment in between);
3. forwarding and the device up, reverse-path checks, then routes: added, or replaced by one message each; the main
   table's first, then those of our own tables, then the rules that lead there;
4. what goes: rules, routes, then peers, addresses and devices; reverse-path checks are as they were, and the mark
   goes last, since as long as a rule asks for it WireGuard's own packets would go into the tunnel without it.

The rules about peers:

* A peer changes alone, never with the whole list. If all that it loses is gained by others, only these are written: the
  kernel takes it away by itself.
* An endpoint is not set back to what it was before the peer roamed, as long as the peer answers where it is now
  (`kernel.unanswered`). The kernel cannot be asked which endpoint was set, so `Memory` has it. After a restart an
  endpoint in use is taken for one that was learnt.
* What looks like roaming to the very endpoint that was replaced a moment ago is none: then the new one is set again, at
  most `SET_AGAIN` times, and the last time the session is reset, so that what arrives late from there says nothing.

Why it is right. `kernel.predict` says what each change does, its implicit effects too, and tests hold it against a real
kernel. With it these properties are tested from any plan to any other, one change after the other: in the end a second
diff is empty; a destination that both plans route is never without a route, unless its device or source address is
replaced; an address that both plans encrypt never leaves in clear; a peer that stays equal is not written; a learnt
endpoint is not set back; no route with another protocol than ours is deleted or replaced; and leaving out what
`settled` has in common with the plan gives the same changes.

What it does not promise:

* That changes succeed. The kernel may refuse one, or another program may be faster. The kernel layer then reads the
  host anew and tries once what is still to be done; what fails again is reported, and the caller tries later.
* One moment for all. Packets meet the states in between; of those the properties above hold, and no others.
* What no change can bring about: a default route, a destination where another program has a route, IPv6 through an
  IPv4 gateway. It leaves that out and names it in `Difference.failures`.
* Knowledge of the present. It compares with what was read or predicted; what others change later is drift.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cache
from ipaddress import ip_network

from attrs import evolve, frozen

from kilo_etcd.base.mappings import changes as changed_keys
from kilo_etcd.kernel.errors import collision, shadow
from kilo_etcd.kernel.firewall import sizes
from kilo_etcd.kernel.firewall.forward import AddForward, DeleteForward, comment_prefix, rules_for
from kilo_etcd.kernel.firewall.openings import AddOpening, DeleteOpening, openings_for
from kilo_etcd.kernel.firewall.packet_filter import table_for
from kilo_etcd.kernel.firewall.table import DeleteTable, FirewallTable, ReplaceTable, element_changes
from kilo_etcd.kernel.predict import apply_changes
from kilo_etcd.kernel.routing import encrypted, policy
from kilo_etcd.kernel.routing.exit_node import MARK, route_of
from kilo_etcd.kernel.state import (
    KERNEL_PROTOCOL,
    MAIN_TABLE,
    AddAddress,
    AddRoute,
    Change,
    CreateLink,
    DeleteAddress,
    DeleteLink,
    DeleteRoute,
    DeviceTarget,
    FailedChange,
    Former,
    KeepAdvertisements,
    Link,
    LoosenReversePath,
    Memory,
    Observed,
    ObservedPeer,
    RemovePeer,
    ReplaceRoute,
    RestoreSysctl,
    Route,
    SetDevice,
    SetForwarding,
    SetMtu,
    SetPeer,
    SetUp,
    StartUserspace,
    Unanswered,
    reverse_path,
    unreachable_route,
)
from kilo_etcd.kernel.unanswered import accounts, next_endpoint
from kilo_etcd.model import SESSION_SECONDS, Endpoint, IPNetwork
from kilo_etcd.model.hostplan import HostPlan, PeerPlan, RoutePlan, Via

_NO_PEER = ObservedPeer(public_key="")
_NOTHING = Memory()

SET_AGAIN, LATE_SECONDS, FORMER_SECONDS = 3, 0.3, 5.0
"""How many times an endpoint is set again that WireGuard has left for the former one; how many seconds after it was
set, when what was under way to this host and what answers its own first packet has arrived on most paths; and how many
seconds after it was changed that ends."""


@frozen
class Difference:
    """The changes to make, and what no change can bring about."""

    changes: tuple[Change, ...]
    failures: tuple[FailedChange, ...]


def diff(plan: HostPlan, observed: Observed, memory: Memory, target: DeviceTarget) -> tuple[Change, ...]:
    """The changes that bring a host from `observed` to `plan`, in the order in which they are to be made."""
    return difference(plan, observed, memory, target).changes


def difference(
    plan: HostPlan,
    observed: Observed,
    memory: Memory,
    target: DeviceTarget,
    settled: HostPlan | None = None,
    *,
    reset: Collection[str] = (),
) -> Difference:
    """As `diff`, with the reasons for what is left out.

    `settled` is a plan that `observed` and `memory` are known to fulfil to the last: what `plan` has in common with it
    is not looked at, which changes nothing but the time that it takes. `reset` are public keys of peers that are
    removed and added, if they are there, whatever else is changed of them.
    """
    failures: list[FailedChange] = []
    device, base = _device(observed, target)
    ipip = tuple(_ipip(plan, base, target))
    if ipip:
        # A device that is replaced takes its routes along, and they have to come again.
        base = apply_changes(base, ipip, target.interface)
    if ipip or device:
        settled = None
    routes, stale = _routes(plan, base, target, failures, settled)
    failures.extend(
        FailedChange(subject=str(destination), text=shadow(destination, subnet), destination=destination)
        for destination, subnet in shadows(plan, base).items()
    )
    led, led_no_more = policy.changes(plan, base, target.interface, target.protocol, settled)
    opened, closed = _forward_rules(plan, base, target, failures)
    wanted_table = _wanted_table(plan, base, target)
    changes = (
        *(
            AddRoute(unreachable_route(network))
            for network in plan.unreachable_routes
            if network not in base.unreachable_routes
        ),
        *device,
        *_addresses(plan, base, target),
        *_table(wanted_table, base.table),
        *ipip,
        *_wireguard(plan, base, memory, target, settled, frozenset(reset)),
        *_up(plan, base, target),
        *_loosened(plan, base, ipip),
        *opened,
        *routes,
        *led,
        *led_no_more,
        *stale,
        *(
            DeleteRoute(unreachable_route(network))
            for network in sorted(base.unreachable_routes.difference(plan.unreachable_routes), key=str)
        ),
        *_removals(plan, base, target),
        *([] if base.table is None or wanted_table is not None else [DeleteTable(base.table.name)]),
        *closed,
        *_tightened(plan, base, target),
        *_unmarked(plan, base, target),
    )
    return Difference(changes, tuple(failures))


def remember(
    plan: HostPlan,
    memory: Memory,
    settled: HostPlan | None = None,
    *,
    made: Collection[Change] = (),
    failed: Iterable[Change] = (),
    observed: Observed | None = None,
    now: float = 0.0,
) -> Memory:
    """What to remember once `plan` is applied by the changes `made`, while `failed` did not succeed.

    A plan without an endpoint keeps what was set before, unless the peer was made anew. `settled`: a plan that `memory`
    is the memory of. `observed`: what was there before the changes, if it was read just now. `now`: Unix seconds.
    """
    created = {change.public_key for change in made if isinstance(change, SetPeer) and change.new}
    lost = {change.public_key for change in failed if isinstance(change, SetPeer)}
    with_endpoint = {
        change.public_key for change in made if isinstance(change, SetPeer) and change.endpoint is not None
    }
    news: Iterable[str] = plan.peers
    endpoints: dict[str, Endpoint | None] = {}
    if settled is not None:
        news = {*changed_keys(settled.peers, plan.peers), *created, *lost}
        if not news and not memory.former:
            return memory
        endpoints.update(memory.endpoints)
    for key in news:
        peer = plan.peers.get(key)
        endpoint: Endpoint | None = None
        # An observed endpoint may never have been set, and may have been set over what was: nothing is known then.
        if peer is not None and not peer.observed and key not in lost:
            endpoint = _address(peer) or (None if key in created else memory.endpoints.get(key))
        # Where none was ever set, one may have been learnt: that is for `_endpoint` to find out.
        if endpoint is not None:
            endpoints[key] = endpoint
        else:
            endpoints.pop(key, None)
    former = _former(memory, endpoints, made, now)
    if observed is None or settled is not None:
        unchanged = (
            {key for key in memory.unanswered if endpoints.get(key) == memory.endpoints.get(key)}
            - created
            - with_endpoint
        )
        unanswered: Mapping[str, Unanswered] = {key: memory.unanswered[key] for key in unchanged}
    else:
        unanswered = accounts(plan, memory, observed, endpoints, made, now)
    return Memory(endpoints=endpoints, former=former, unanswered=unanswered)


def _former(
    memory: Memory, endpoints: Mapping[str, Endpoint | None], made: Iterable[Change], now: float
) -> dict[str, Former]:
    former = {key: earlier for key, earlier in memory.former.items() if now <= earlier.until and key in endpoints}
    for change in made:
        if not isinstance(change, SetPeer) or (change.endpoint is None and not change.new):
            continue
        key = change.public_key
        earlier, before, stated = former.pop(key, None), memory.endpoints.get(key), endpoints.get(key)
        if change.new or stated is None or before is None:
            continue
        if before != stated:
            endpoints_before = {before} if earlier is None else {before, *earlier.endpoints}
            former[key] = Former(frozenset(endpoints_before - {stated}), now, now + FORMER_SECONDS, SET_AGAIN)
        elif earlier is not None and earlier.again > 1:
            former[key] = evolve(earlier, since=now, again=earlier.again - 1)
    return former


def may_go_back(memory: Memory, now: float) -> bool:
    """Whether WireGuard may take a late packet for roaming, so that its endpoints are to be looked at."""
    return any(now <= former.until for former in memory.former.values())


def is_drift(change: Change, observed: Observed, memory: Memory = _NOTHING) -> bool:
    """Whether somebody else must have made this change to `observed` necessary. An endpoint alone also grows old by
    itself, but it never vanishes, nor does it become the former one by itself."""
    if not isinstance(change, SetPeer) or change.public_key in memory.former:
        return True
    alone = SetPeer(name=change.name, public_key=change.public_key, endpoint=change.endpoint)
    return change != alone or observed.peers[change.public_key].endpoint is None


def must_look(plan: HostPlan, settled: HostPlan | None, memory: Memory = _NOTHING) -> bool:
    """Whether `difference` needs to know of which peers the device has recent handshakes, of which there is no event.
    `settled` as there."""
    news: Iterable[str] = plan.peers if settled is None else changed_keys(settled.peers, plan.peers)
    peers = (plan.peers.get(key) for key in news)
    return any(
        (peer.observed and peer.endpoint is not None)
        or _both_private(memory.endpoints.get(peer.public_key), _address(peer))
        for peer in peers
        if peer is not None
    )


def _device(observed: Observed, target: DeviceTarget) -> tuple[list[Change], Observed]:
    """The device itself, and what is there once it exists (a new device starts from nothing)."""
    kind = "wireguard" if target.backend == "kernel" else "tun"
    if observed.link is not None and observed.link.kind == kind:
        return [], observed
    changes: list[Change] = [] if observed.link is None else [DeleteLink(target.interface)]
    changes.append(
        CreateLink(target.interface, kind)
        if target.backend == "kernel"
        else StartUserspace(target.interface, target.userspace_command)
    )
    return changes, apply_changes(observed, changes, target.interface)


def _addresses(plan: HostPlan, observed: Observed, target: DeviceTarget) -> Iterator[Change]:
    assert observed.link is not None
    if observed.link.mtu != target.mtu:
        yield SetMtu(target.interface, target.mtu)
    for address in encrypted.addresses_of(plan):
        if address not in observed.addresses:
            yield AddAddress(target.interface, address)


def _table(planned: FirewallTable | None, table: FirewallTable | None) -> Iterator[Change]:
    if planned is None or planned == table:
        return
    moved = None if table is None else element_changes(table, planned)
    if moved is None:
        yield ReplaceTable(planned)
    else:
        yield from moved


def wants_sizes(plan: HostPlan, observed: Observed, target: DeviceTarget) -> bool:
    """Whether the plan has TCP made to fit into the tunnel if the kernel takes the rules for it."""
    return sizes.is_in(_wanted_table(plan, observed, evolve(target, clamp_mss=True)))


def _wanted_table(plan: HostPlan, observed: Observed, target: DeviceTarget) -> FirewallTable | None:
    check = {name for name in (*observed.strict, *observed.loosened) if name in observed.underlay}
    return table_for(plan, target.interface, strict=check, forwarding=observed.forwarding, clamp_mss=target.clamp_mss)


def _ipip(plan: HostPlan, observed: Observed, target: DeviceTarget) -> Iterator[Change]:
    if not plan.ipip_remotes:
        return
    link = observed.ipip
    if link is not None and (not observed.ipip_ours or observed.ipip_local != plan.ipip_local):
        yield DeleteLink(target.ipip)
        link = None
    if link is None:
        yield CreateLink(target.ipip, "ipip", plan.ipip_local)
        link = Link(name=target.ipip)
    if link.mtu != target.ipip_mtu:
        yield SetMtu(target.ipip, target.ipip_mtu)
    if not link.up:
        yield SetUp(target.ipip)


def _wireguard(
    plan: HostPlan,
    observed: Observed,
    memory: Memory,
    target: DeviceTarget,
    settled: HostPlan | None,
    reset: frozenset[str],
) -> Iterator[Change]:
    key = target.private_key if observed.public_key != target.public_key else None
    port = plan.listen_port if observed.listen_port != plan.listen_port else None
    mark = MARK if observed.mark != MARK and _marks(plan) else None
    if key is not None or port is not None or mark is not None:
        yield SetDevice(
            name=target.interface,
            listen_port=port,
            mark=mark,
            private_key=key,
            public_key="" if key is None else target.public_key,
        )
    peers: Collection[PeerPlan] = plan.peers.values()
    if settled is not None:
        news: Iterable[str] = changed_keys(settled.peers, plan.peers)
        if reset or memory.former:
            news = {*news, *reset, *memory.former}
        peers = [plan.peers[key] for key in news if key in plan.peers]
    gaining: list[SetPeer] = []
    gained = cache(lambda: _gained(peers, observed))
    for peer in peers:
        observed_peer = observed.peers.get(peer.public_key)
        if observed_peer is not None and (
            peer.public_key in reset or _is_stuck(peer, observed_peer, observed, memory, target)
        ):
            anew = _new_peer(peer, target, reset=True)
            if peer.public_key in reset and (learnt := _to_keep(plan, peer, observed_peer)) is not None:
                anew = evolve(anew, endpoint=learnt)
            gaining.append(anew)
            continue
        change = _peer(peer, observed_peer, observed, memory, target, gained)
        if change is None and observed_peer is not None and (endpoint := _address(peer)) is not None:
            change = _out_of_the_tunnel(plan, observed_peer, endpoint, target)
        if change is None:
            continue
        if change.replace_allowed_ips and not change.new:
            yield change
        else:
            gaining.append(change)
    yield from gaining


def _marks(plan: HostPlan) -> bool:
    """Whether WireGuard's packets need our fwmark."""
    return plan.encryption is not None or (plan.exit_route is not None and not plan.exit_route.held)


def _unmarked(plan: HostPlan, observed: Observed, target: DeviceTarget) -> Iterator[Change]:
    """Removes the fwmark if it is ours and no rule asks for it any more. An operator's own stays."""
    held = plan.exit_route is not None and plan.exit_route.held
    if observed.mark == MARK and not held and not _marks(plan):
        yield SetDevice(name=target.interface, mark=0)


def _loosened(plan: HostPlan, observed: Observed, ipip: Collection[Change]) -> Iterator[Change]:
    """Devices that packets come in by from nodes that are reached otherwise. `ipip`: what is done to that device."""
    strict = observed.strict.keys() - {"default"}
    if "default" in observed.strict:
        strict |= {change.name for change in ipip if isinstance(change, CreateLink)}
    yield from map(LoosenReversePath, encrypted.to_loosen(plan, strict))


def _tightened(plan: HostPlan, observed: Observed, target: DeviceTarget) -> Iterator[Change]:
    for name in encrypted.to_tighten(plan, observed.loosened, {*observed.underlay, target.interface, target.ipip}):
        yield RestoreSysctl(reverse_path(name), observed.loosened[name])


def _gained(peers: Collection[PeerPlan], observed: Observed) -> frozenset[IPNetwork]:
    """The networks that some peer gains, so that the former holder need not be written."""
    return frozenset(
        network
        for peer in peers
        if peer.allowed_ips != (present := observed.peers.get(peer.public_key, _NO_PEER)).allowed_ips
        for network in set(peer.allowed_ips) - set(present.allowed_ips)
    )


def _peer(
    plan: PeerPlan,
    peer: ObservedPeer | None,
    observed: Observed,
    memory: Memory,
    target: DeviceTarget,
    gained: Callable[[], frozenset[IPNetwork]],
) -> SetPeer | None:
    if peer is None:
        return _new_peer(plan, target)
    endpoint = _endpoint(plan, peer, observed, memory)
    keepalive = plan.persistent_keepalive if plan.persistent_keepalive != peer.persistent_keepalive else None
    preshared = (plan.preshared_key or "") if (plan.preshared_key or None) != peer.preshared_key else None
    allowed: tuple[IPNetwork, ...] = ()
    replace = False
    if plan.allowed_ips != peer.allowed_ips:
        present, planned = set(peer.allowed_ips), set(plan.allowed_ips)
        lost = present - planned
        replace = bool(lost) and not lost <= gained()
        allowed = plan.allowed_ips if replace else tuple(ip for ip in plan.allowed_ips if ip not in present)
    if endpoint is None and keepalive is None and preshared is None and not allowed and not replace:
        return None
    return SetPeer(
        name=target.interface,
        public_key=plan.public_key,
        endpoint=endpoint,
        persistent_keepalive=keepalive,
        preshared_key=preshared,
        allowed_ips=allowed,
        replace_allowed_ips=replace,
    )


def _new_peer(plan: PeerPlan, target: DeviceTarget, *, reset: bool = False) -> SetPeer:
    return SetPeer(
        name=target.interface,
        public_key=plan.public_key,
        new=True,
        endpoint=_address(plan),
        persistent_keepalive=plan.persistent_keepalive or None,
        preshared_key=plan.preshared_key or None,
        allowed_ips=plan.allowed_ips,
        replace_allowed_ips=True,
        reset=reset,
    )


def _to_keep(plan: HostPlan, peer: PeerPlan, observed: ObservedPeer) -> Endpoint | None:
    """The endpoint that was learnt, if nobody else knows where a peer is that is made anew: the plan has none for it,
    or one behind its NAT. Without it this host could not begin, and the peer may not have a reason to."""
    planned, learnt = _address(peer), observed.endpoint
    if learnt is None or learnt.address is None or plan.leads_into_tunnel(learnt.address):
        return None
    return learnt if planned is None or (learnt.public and not planned.public) else None


def _address(peer: PeerPlan) -> Endpoint | None:
    """The peer's endpoint, unless it is still a name."""
    return None if peer.endpoint is None or peer.endpoint.address is None else peer.endpoint


def _out_of_the_tunnel(plan: HostPlan, peer: ObservedPeer, planned: Endpoint, target: DeviceTarget) -> SetPeer | None:
    """The planned endpoint in place of one that was learnt, if a route of the plan leads there into the tunnel: what
    WireGuard sends there would never leave the host, and the other end has no reason to send from elsewhere."""
    learnt = None if peer.endpoint is None else peer.endpoint.address
    if learnt is None or peer.endpoint == planned or not plan.leads_into_tunnel(learnt):
        return None
    return SetPeer(name=target.interface, public_key=peer.public_key, endpoint=planned)


def _went_back(peer: ObservedPeer, observed: Observed, memory: Memory) -> Former | None:
    """What the peer's endpoint was, if WireGuard has just left the present one for that."""
    former = memory.former.get(peer.public_key)
    if former is None or peer.endpoint not in former.endpoints:
        return None
    return former if former.since + LATE_SECONDS <= observed.time <= former.until else None


def _is_stuck(plan: PeerPlan, peer: ObservedPeer, observed: Observed, memory: Memory, target: DeviceTarget) -> bool:
    """Whether the peer goes back to its former endpoint however often the new one is set: packets of its session come
    from there without a pause. Where both ends find that, one resets first: both at once would hinder each other."""
    if plan.observed or memory.endpoints.get(plan.public_key) != _address(plan):
        return False
    former = _went_back(peer, observed, memory)
    return former is not None and former.again <= (2 if target.public_key < peer.public_key else 1)


def _both_private(before: Endpoint | None, now: Endpoint | None) -> bool:
    """Whether an endpoint that is no public one was replaced by another that is none."""
    return before is not None and now is not None and before != now and not (before.public or now.public)


def _endpoint(plan: PeerPlan, peer: ObservedPeer, observed: Observed, memory: Memory) -> Endpoint | None:
    """The endpoint to set on a peer that exists, or None for the one that it has."""
    planned = _address(plan)
    if planned is None or planned.address is None:
        return None
    if peer.endpoint is None:
        # WireGuard never unsets one, so the peer that one was set on was another: somebody removed it, and whoever
        # named it next made this one. A kernel without the family takes no endpoint of it.
        return None if planned.address.version in observed.lacking else planned
    in_use = peer.last_handshake and observed.time - peer.last_handshake < SESSION_SECONDS
    stated = memory.endpoints.get(plan.public_key)
    if stated is not None and not plan.observed:
        if in_use and peer.endpoint.public and _both_private(stated, planned):
            return None  # It is behind NAT: what changed behind that is not where it is heard, and has its turn later.
        if stated != planned or _went_back(peer, observed, memory):
            return planned
        return next_endpoint(memory.unanswered.get(plan.public_key), peer, planned, observed.time)
    # Adopted from a former run, or an observed endpoint: an endpoint in use may have been learnt, which is better.
    if peer.endpoint == planned or in_use:
        return None
    # One that was kept when the peer was made anew has its turn first.
    kept = not peer.last_handshake and peer.endpoint.public and not planned.public
    return None if kept else planned


def _up(plan: HostPlan, observed: Observed, target: DeviceTarget) -> Iterator[Change]:
    assert observed.link is not None
    for family in sorted(plan.forwarding - observed.forwarding):
        if family == 6:
            yield from map(KeepAdvertisements, observed.advertised)
        yield SetForwarding(family)
    if 4 in plan.forwarding & observed.forwarding:
        yield from (SetForwarding(4, device) for device in observed.held_back)
    if not observed.link.up:
        yield SetUp(target.interface)


def route_for(plan: RoutePlan, target: DeviceTarget) -> Route:
    """The route of the main table that a plan's route asks for."""
    return route_of(plan, target.interface, target.protocol)


def fulfils(route: Route, planned: Route, target: DeviceTarget) -> bool:
    """Whether a route found is the one wanted. Which device leads to a gateway on the underlay is the kernel's."""
    if (route.gateway, route.source, route.protocol) != (planned.gateway, planned.source, target.protocol):
        return False
    if planned.device:
        return route.device == planned.device
    return route.device not in (target.interface, target.ipip)


def _routes(
    plan: HostPlan, observed: Observed, target: DeviceTarget, failures: list[FailedChange], settled: HostPlan | None
) -> tuple[list[Change], list[Change]]:
    made: list[Change] = []
    stale: list[Change] = [DeleteRoute(route) for route in observed.duplicate_routes]
    kept_destinations: set[IPNetwork] = set()
    wanted_routes, found_routes = plan.routes, observed.routes
    if settled is not None:
        news = changed_keys(settled.routes, plan.routes)
        wanted_routes = {destination: plan.routes[destination] for destination in news if destination in plan.routes}
        found_routes = {destination: found_routes[destination] for destination in news if destination in found_routes}
    for destination, planned in wanted_routes.items():
        if (text := _impossible(planned)) is not None:
            failures.append(FailedChange(subject=str(destination), text=text, destination=destination))
            continue
        if destination in observed.foreign:
            failures.append(
                FailedChange(subject=str(destination), text=collision(destination), destination=destination)
            )
            continue
        kept_destinations.add(destination)
        planned_route = route_for(planned, target)
        present = found_routes.get(destination)
        if present is None:
            made.append(AddRoute(planned_route))
        elif not fulfils(present, planned_route, target):
            made.append(ReplaceRoute(planned_route))
    stale.extend(
        DeleteRoute(route) for destination, route in found_routes.items() if destination not in kept_destinations
    )
    return made, stale


def superseded(failed: Iterable[Change], observed: Observed) -> tuple[Change, ...]:
    """What to do after changes have failed: a route that could not be replaced leads where no packet is to go now."""
    replaced = [change.route for change in failed if isinstance(change, ReplaceRoute)]
    places = [
        (observed.routes if route.table == MAIN_TABLE else observed.policy.table(route.table).routes, route.destination)
        for route in replaced
    ]
    return tuple(DeleteRoute(routes[destination]) for routes, destination in places if destination in routes)


def shadows(plan: HostPlan, observed: Observed) -> dict[IPNetwork, IPNetwork]:
    """Somebody else's routes within the mesh's subnets (those that hold the host's own addresses) -> the subnet.

    They take precedence, being narrower. What the kernel sets for the operator's addresses is left to who knows those.
    """
    narrow = [d for d, route in observed.foreign.items() if d.prefixlen and route.protocol != KERNEL_PROTOCOL]
    if not narrow:
        return {}
    subnets = [
        subnet
        for own in plan.addresses
        for length in range(1, own.max_prefixlen)
        if (subnet := ip_network((own.ip, length), strict=False)) in plan.routes
    ]
    return {
        destination: subnet
        for destination in narrow
        for subnet in subnets
        if destination.version == subnet.version
        and destination.prefixlen > subnet.prefixlen
        and destination.network_address in subnet
    }


def _forward_rules(
    plan: HostPlan, observed: Observed, target: DeviceTarget, failures: list[FailedChange]
) -> tuple[list[Change], list[Change]]:
    planned_rules = (
        rules_for(plan, target.interface, target.ipip, observed.forward_chains) if target.forward_rules else ()
    )
    if target.forward_rules:
        for version in sorted(plan.forwarding - observed.forward_chains.keys()):
            program = "iptables" if version == 4 else "ip6tables"
            text = f"--forward-rules needs the program {program}, which is not installed or does not work: install it"
            failures.append(FailedChange(subject="--forward-rules", text=text, aside=True))
    made: list[Change] = [AddForward(rule) for rule in planned_rules if rule not in observed.forward_rules]
    stale: list[Change] = [DeleteForward(rule) for rule in observed.forward_rules.difference(planned_rules)]
    openings = (
        openings_for(plan, target.interface, target.ipip, observed.dropping, comment_prefix(target.interface))
        if target.forward_rules
        else ()
    )
    made += [AddOpening(opening) for opening in openings if opening not in observed.openings]
    stale += [DeleteOpening(opening) for opening in observed.openings.difference(openings)]
    return made, sorted(stale, key=str)


def _impossible(route: RoutePlan) -> str | None:
    if route.destination.prefixlen == 0:
        return f"{route.destination} is a default route: the mesh never takes it; name the networks themselves"
    if route.via is Via.TUNNEL:
        return None
    if route.gateway is None:
        return f"the route to {route.destination} has no gateway, although it does not lead into the tunnel"
    if route.destination.version == 6 and route.gateway.version == 4:
        return (
            f"{route.destination} cannot be reached via {route.gateway}: IPv6 needs an IPv6 gateway; "
            "give the node an IPv6 internal IP, or use --encapsulate wireguard"
        )
    if route.via is Via.IPIP and (route.destination.version, route.gateway.version) != (4, 4):
        return (
            f"{route.destination} cannot be reached via {route.gateway} encapsulated: IPIP carries IPv4 over IPv4 "
            "only; use --encapsulate never or --encapsulate wireguard"
        )
    return None


def _removals(plan: HostPlan, observed: Observed, target: DeviceTarget) -> Iterator[Change]:
    for public_key in observed.peers:
        if public_key not in plan.peers:
            yield RemovePeer(target.interface, public_key)
    planned_addresses = set(encrypted.addresses_of(plan))
    for address in sorted(observed.addresses, key=str):
        if address not in planned_addresses:
            yield DeleteAddress(target.interface, address)
    if observed.ipip is not None and observed.ipip_ours and not plan.ipip_remotes:
        yield DeleteLink(target.ipip)
