"""What holds from any plan to any other, on a host in memory."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_worlds import NETWORKS, PRIVATE, TARGET, host_with, plan, plans, tunnel

from helpers import examples
from kilo_etcd.kernel.diff import diff, difference, fulfils, remember, route_for
from kilo_etcd.kernel.predict import apply_changes
from kilo_etcd.kernel.routing.encrypted import table_of
from kilo_etcd.kernel.routing.exit_node import MARK
from kilo_etcd.kernel.routing.returns import return_table
from kilo_etcd.kernel.state import MAIN_TABLE, DeleteRoute, Memory, Observed, ReplaceRoute, Route, SetPeer, Setup
from kilo_etcd.model import Endpoint, IPNetwork
from kilo_etcd.model.hostplan import HostPlan
from kilo_etcd.testing.fake_kernel import FakeHost, FakeKernel

FOREIGN = st.sets(st.sampled_from(NETWORKS), max_size=3).map(
    lambda some: {n: Route(destination=n, device="eth0", protocol=4) for n in some}
)
STRICT = Observed(underlay=("eth0",), strict={"eth0": "1", "kilo0": "0"}, forwarding=frozenset({4}))
BASES = st.one_of(st.sampled_from((Observed(), STRICT)), plans().map(host_with))
quick = settings(max_examples=examples(50), deadline=None)


@quick
@given(BASES, plans(), FOREIGN)
def test_applying_the_diff_yields_the_plan_and_a_second_time_nothing(
    base: Observed, wanted: HostPlan, foreign: dict[IPNetwork, Route]
) -> None:
    base = evolve(base, foreign=foreign)
    todo = difference(wanted, base, Memory(), TARGET)
    after = apply_changes(base, todo.changes, "kilo0")
    assert diff(wanted, after, remember(wanted, Memory()), TARGET) == ()
    assert after.link is not None
    assert after.link.up
    assert after.addresses == frozenset(wanted.addresses)
    assert {k: p.allowed_ips for k, p in after.peers.items()} == {k: p.allowed_ips for k, p in wanted.peers.items()}
    assert {k: p.preshared_key for k, p in after.peers.items()} == {k: p.preshared_key for k, p in wanted.peers.items()}
    assert set(after.routes) == set(wanted.routes) - set(foreign)
    assert all(fulfils(r, route_for(wanted.routes[d], TARGET), TARGET) for d, r in after.routes.items())
    assert after.unreachable_routes == set(wanted.unreachable_routes)
    assert after.policy.table(return_table("kilo0")).routes.keys() == wanted.returns.keys()
    assert after.policy.table(return_table("kilo0")).last.keys() == wanted.returns_refused.keys()
    back = {rule.version for rule in after.policy.rules if rule.inbound}
    assert back == {network.version for network in (*wanted.returns, *wanted.returns_refused)}
    assert wanted.forwarding <= after.forwarding
    assert (after.ipip is not None) == bool(wanted.ipip_remotes)
    assert len(todo.failures) == len(set(wanted.routes) & set(foreign))
    encryption = wanted.encryption
    assert (after.mark == MARK) == (encryption is not None)
    assert any(rule.not_mark for rule in after.policy.rules) == (encryption is not None)
    table = after.policy.table(table_of("kilo0"))
    assert set(table.routes) == (set(encryption.send) if encryption is not None else set())
    assert set(table.last) == ({*encryption.send, *encryption.hold} if encryption is not None else set())
    assert encryption is None or not after.strict
    assert encryption is not None or not after.loosened


@quick
@given(BASES, plans(), FOREIGN)
def test_routes_of_others_are_never_named(base: Observed, wanted: HostPlan, foreign: dict[IPNetwork, Route]) -> None:
    base = evolve(base, foreign=foreign)
    for change in diff(wanted, base, Memory(), TARGET):
        if isinstance(change, DeleteRoute | ReplaceRoute):
            assert change.route.protocol == 107
            if isinstance(change, ReplaceRoute) and change.route.table == MAIN_TABLE:
                assert change.route.destination in base.routes
                assert change.route.destination not in foreign


@quick
@given(plans(), plans())
def test_peers_and_routes_that_stay_equal_are_not_touched(before: HostPlan, after: HostPlan) -> None:
    changes = diff(after, host_with(before), remember(before, Memory()), TARGET)
    same = {k for k, p in after.peers.items() if before.peers.get(k) == p}
    assert not [c for c in changes if isinstance(c, SetPeer) and c.public_key in same]


@quick
@given(plans(), plans())
def test_no_destination_that_both_plans_have_is_ever_without_a_route(before: HostPlan, after: HostPlan) -> None:
    state = host_with(before)
    both = set(before.routes) & set(after.routes)
    if before.addresses != after.addresses or before.ipip_local != after.ipip_local:
        return  # a source address or a device that goes takes its routes with it
    for change in diff(after, state, remember(before, Memory()), TARGET):
        state = apply_changes(state, [change], "kilo0")
        assert both <= set(state.routes)


@quick
@given(plans(), plans())
def test_no_address_that_both_plans_encrypt_ever_leaves_in_clear(before: HostPlan, after: HostPlan) -> None:
    """Nor does a WireGuard packet ever go into the tunnel itself: the mark is there as long as a rule asks for it."""
    both: set[IPNetwork] = set()
    if (first := before.encryption) is not None and (second := after.encryption) is not None:
        both = {*first.send, *first.hold} & {*second.send, *second.hold}
    state = host_with(before)
    for change in diff(after, state, remember(before, Memory()), TARGET):
        state = apply_changes(state, [change], "kilo0")
        table = state.policy.table(table_of("kilo0"))
        into = {rule.version for rule in state.policy.rules if rule.not_mark}
        assert not both or into == {4, 6}
        assert both <= table.last.keys()
        assert not into or state.mark == MARK


def sharing(before: HostPlan, after: HostPlan) -> HostPlan:
    """`after` with the very objects of `before` where they are equal, as the topology yields plans."""
    peers = {k: before.peers[k] if before.peers.get(k) == p else p for k, p in after.peers.items()}
    routes = {d: before.routes[d] if before.routes.get(d) == r else r for d, r in after.routes.items()}
    return evolve(after, peers=peers, routes=routes)


@quick
@given(plans(), plans(), st.sampled_from((None, "192.168.9.2")))
def test_what_two_plans_have_in_common_may_be_left_out_of_the_comparison(
    before: HostPlan, after: HostPlan, local: str | None
) -> None:
    state, memory = host_with(before), remember(before, Memory())
    assert not difference(before, state, memory, TARGET).failures
    after = sharing(before, after)
    if local is not None and after.ipip_remotes:
        after = evolve(after, ipip_local=ip_address(local))
    short, whole = difference(after, state, memory, TARGET, before), difference(after, state, memory, TARGET)
    # In which order routes are set among each other says nothing.
    assert sorted(map(str, short.changes)) == sorted(map(str, whole.changes))
    assert apply_changes(state, short.changes, "kilo0") == apply_changes(state, whole.changes, "kilo0")
    assert set(short.failures) == set(whole.failures)
    assert remember(after, memory, before) == remember(after, memory)


@quick
@given(plans(), plans(), plans())
def test_a_state_yields_the_same_next_state_however_it_came_about(
    first: HostPlan, second: HostPlan, third: HostPlan
) -> None:
    state = host_with(first)
    for wanted in (second, third, second):
        changes = diff(wanted, state, Memory(), TARGET)
        later = apply_changes(state, changes, "kilo0")
        assert later == apply_changes(evolve(state, owners=None), changes, "kilo0")
        assert later == apply_changes(state, changes, "kilo0"), "what was computed once spoils nothing"
        state = later


@quick
@given(plans(), plans(), st.sampled_from(("198.51.100.9:1", "203.0.113.200:2")))
def test_a_learnt_endpoint_is_never_set_back(before: HostPlan, after: HostPlan, learnt: str) -> None:
    state = host_with(before)
    moved = {k: evolve(p, endpoint=Endpoint.parse(learnt), last_handshake=1.0) for k, p in state.peers.items()}
    changes = diff(after, evolve(state, peers=moved, time=2.0), remember(before, Memory()), TARGET)
    set_again = {c.public_key for c in changes if isinstance(c, SetPeer) and c.endpoint is not None}
    assert not {k for k in set_again if k in before.peers and before.peers[k].endpoint == after.peers[k].endpoint}
    assert not {k for k in set_again if k in before.peers and after.peers[k].observed}


@quick
@given(BASES, plans(), plans())
def test_no_peer_stays_without_an_endpoint_that_is_known(
    base: Observed, remembered: HostPlan, wanted: HostPlan
) -> None:
    changes = diff(wanted, base, remember(remembered, Memory()), TARGET)
    after = apply_changes(base, changes, "kilo0")
    known = {
        key for key, peer in wanted.peers.items() if peer.endpoint is not None and peer.endpoint.address is not None
    }
    assert all(after.peers[key].endpoint is not None for key in known)


async def test_the_kernel_in_memory_is_one() -> None:
    host = FakeHost()
    kernel = FakeKernel(host, Setup(private_key=PRIVATE))
    wanted = plan(tunnel("10.4.0.0/16", "10.4.0.1"))
    assert await kernel.preview(wanted) == (await kernel.apply(wanted)).changes
    assert (await kernel.apply(wanted)).changes == ()
    written = kernel.writes
    mesh = ip_network("10.4.0.0/16")
    host.tamper([DeleteRoute(host.observed.routes[mesh])], reason="route gone")
    assert await kernel.wait_drift() == "route gone"
    assert [str(c) for c in (await kernel.apply(wanted)).changes] == [
        "ip route add 10.4.0.0/16 dev kilo0 proto 107 src 10.4.0.1"
    ]
    assert kernel.writes == written + 1
    host.cleanup()
    assert host.observed.link is None
    assert host.observed.routes == {}
