"""The diff as a table: from one plan to another, the commands that a person would type."""

from __future__ import annotations

from collections.abc import Callable
from ipaddress import ip_interface, ip_network
from typing import Any

import pytest
from attrs import evolve
from kernel_worlds import GATEWAY4, PRIVATE, TARGET, host_with, key, lines, peer, plan, tunnel, via

from kilo_etcd.kernel.diff import diff, difference, is_drift, may_go_back, must_look, remember
from kilo_etcd.kernel.predict import apply_changes
from kilo_etcd.kernel.routing.returns import return_priority, return_table
from kilo_etcd.kernel.state import DeleteLink, DeviceTarget, Link, Memory, Observed, Route, ipip_name
from kilo_etcd.model import Endpoint
from kilo_etcd.model.hostplan import ExitRoute, HostPlan, RoutePlan, Via

MESH = tunnel("10.4.0.0/16", "10.4.0.1")


def step(before: HostPlan, after: HostPlan, memory: Memory | None = None) -> list[str]:
    return lines(diff(after, host_with(before), remember(before, Memory()) if memory is None else memory, TARGET))


def test_a_bare_host_gets_everything_in_an_order_without_gaps() -> None:
    wanted = plan(
        peer(2, "10.4.0.2/32", "10.5.0.0/24", endpoint="203.0.113.2:51820", keepalive=25, psk=key(90)),
        MESH,
        via("10.7.0.0/16", GATEWAY4, source="10.4.0.1"),
        forwarding=(4,),
    )
    assert lines(diff(wanted, Observed(), Memory(), TARGET)) == [
        "ip link add kilo0 type wireguard",
        "ip link set kilo0 mtu 1420",
        "ip address add 10.4.0.1/32 dev kilo0",
        "wg set kilo0 listen-port 51820 private-key (hidden)",
        "wg set kilo0 peer #2 preshared-key (hidden) endpoint 203.0.113.2:51820 persistent-keepalive 25 "
        "allowed-ips 10.4.0.2/32,10.5.0.0/24",
        "sysctl -w net.ipv4.ip_forward=1",
        "ip link set kilo0 up",
        "ip route add 10.4.0.0/16 dev kilo0 proto 107 src 10.4.0.1",
        "ip route add 10.7.0.0/16 via 192.168.9.77 proto 107 src 10.4.0.1",
    ]


def test_interfaces_that_accept_router_advertisements_go_on_when_ipv6_is_forwarded() -> None:
    bare = Observed(advertised=("default", "eth0", "eth0.100"))
    said = lines(diff(plan(MESH, forwarding=(4, 6)), bare, Memory(), TARGET))
    first = said.index("sysctl -w net.ipv4.ip_forward=1")
    assert said[first + 1 : first + 5] == [
        "sysctl -w net.ipv6.conf.default.accept_ra=2",
        "sysctl -w net.ipv6.conf.eth0.accept_ra=2",
        "sysctl -w net/ipv6/conf/eth0.100/accept_ra=2",
        "sysctl -w net.ipv6.conf.all.forwarding=1",
    ]
    changes = diff(plan(MESH, forwarding=(6,)), bare, Memory(), TARGET)
    assert apply_changes(bare, changes, "kilo0").advertised == ()
    assert "accept_ra" not in "".join(lines(diff(plan(MESH, forwarding=(4,)), bare, Memory(), TARGET)))


def test_what_comes_out_of_the_tunnel_has_a_table_of_its_own_while_a_member_encapsulates() -> None:
    ipip: dict[str, Any] = {"ipip": ("192.168.9.2",), "ipip_local": "192.168.9.1"}
    back = (via("192.168.9.2/32", "192.168.9.2", Via.IPIP), tunnel("fd00:9::3/128"))
    asked = plan(MESH, returns=back, **ipip)
    table, priority = return_table("kilo0"), return_priority("kilo0")
    routes = [
        f"192.168.9.2/32 via 192.168.9.2 dev kilo-ipip proto 107 onlink table {table}",
        f"fd00:9::3/128 dev kilo0 proto 107 table {table}",
    ]
    rules = [f"ip -{v} rule {{}} priority {priority} iif kilo0 lookup {table}" for v in (4, 6)]
    made = [f"ip route add {route}" for route in routes] + [rule.format("add") for rule in rules]
    gone = [rule.format("del") for rule in rules] + [f"ip route del {route}" for route in routes]
    assert step(plan(MESH, **ipip), asked) == made
    left = step(asked, plan(MESH, **ipip))
    assert [*sorted(left[:2]), *left[2:]] == gone
    assert step(asked, evolve(asked, returns={back[1].destination: back[1]})) == [gone[0], gone[2]]
    # One that is sealed now.
    sealed = evolve(asked, returns={**asked.returns, back[0].destination: tunnel("192.168.9.2/32")})
    assert step(asked, sealed) == [f"ip route replace 192.168.9.2/32 dev kilo0 proto 107 table {table}"]
    # Who does not answer is sent nothing, and least of all in clear by the main table.
    refusing = evolve(asked, returns={}, returns_refused={ip_network("192.168.9.2/32"): "it does not answer"})
    unreachable = f"unreachable 192.168.9.2/32 proto 107 metric 4294967295 table {table}"
    turned = step(asked, refusing)
    assert turned[0] == f"ip route add {unreachable}"
    assert turned[1] == gone[1]
    assert f"ip route del {routes[0]}" in turned
    assert step(plan(MESH), plan(MESH, returns_refused=("192.168.9.2/32",))) == [turned[0], rules[0].format("add")]
    # Devices take their routes along, and leave the rules.
    lost = apply_changes(host_with(asked), [DeleteLink("kilo-ipip")], "kilo0")
    assert lines(diff(asked, lost, Memory(), TARGET))[-1:] == made[:1]
    assert len(lost.policy.rules) == 2
    assert apply_changes(lost, [DeleteLink("kilo0")], "kilo0").policy.tables == {}
    lacking = evolve(host_with(plan(MESH, **ipip)), lacking=frozenset({6}))
    assert lines(diff(asked, lacking, Memory(), TARGET)) == made[::2], "a kernel without IPv6 is asked for none"
    # An exit node whose parts are not to be touched is another matter.
    held = evolve(asked, exit_route=ExitRoute(held=True))
    assert step(plan(MESH, **ipip), held) == made
    exits = ExitRoute(families=frozenset({4, 6}), sources=(ip_interface("192.168.9.1/24").ip,))
    both = step(evolve(plan(MESH, **ipip), exit_route=exits), evolve(asked, exit_route=exits))
    assert sorted(both) == sorted(made)


def test_the_fence_comes_first_and_goes_last() -> None:
    said = step(plan(), plan(MESH, unreachable_routes=("10.4.0.0/16", "fd00:4::/64")))
    assert said[:2] == [
        "ip route add unreachable 10.4.0.0/16 proto 107 metric 4294967295",
        "ip route add unreachable fd00:4::/64 proto 107 metric 4294967295",
    ]
    said = step(plan(MESH, unreachable_routes=("10.4.0.0/16",)), plan())
    assert said[-2:] == [
        "ip route del 10.4.0.0/16 dev kilo0 proto 107 src 10.4.0.1",
        "ip route del unreachable 10.4.0.0/16 proto 107 metric 4294967295",
    ]


def test_the_same_plan_again_changes_nothing() -> None:
    wanted = plan(
        peer(2, "10.4.0.2/32", endpoint="203.0.113.2:51820"),
        MESH,
        unreachable_routes=("10.4.0.0/16",),
        forwarding=(4, 6),
    )
    assert step(wanted, wanted) == []


def test_userspace_wireguard_is_started_by_its_command() -> None:
    target = evolve(TARGET, backend="userspace")
    assert lines(diff(plan(), Observed(), Memory(), target))[0] == "wireguard-go kilo0"


def test_a_device_of_the_other_backend_is_replaced() -> None:
    observed = host_with(plan(MESH), evolve(TARGET, backend="userspace"))
    said = lines(diff(plan(MESH), observed, Memory(), TARGET))
    assert said[:2] == ["ip link del kilo0", "ip link add kilo0 type wireguard"]
    assert said[-1] == "ip route add 10.4.0.0/16 dev kilo0 proto 107 src 10.4.0.1"


def test_a_failover_on_a_member_replaces_one_route() -> None:
    before = plan(via("10.4.0.0/16", "192.168.9.2", source="10.4.0.1"))
    after = plan(via("10.4.0.0/16", "192.168.9.3", source="10.4.0.1"))
    assert step(before, after) == ["ip route replace 10.4.0.0/16 via 192.168.9.3 proto 107 src 10.4.0.1"]


def test_a_new_leader_elsewhere_takes_the_networks_from_the_old_one_in_one_run() -> None:
    before = plan(peer(2, "10.4.0.2/32", "10.4.0.3/32", "10.5.0.0/24"), MESH)
    after = plan(peer(3, "10.4.0.2/32", "10.4.0.3/32", "10.5.0.0/24", endpoint="203.0.113.3:51820"), MESH)
    assert step(before, after) == [
        "wg set kilo0 peer #3 endpoint 203.0.113.3:51820 allowed-ips 10.4.0.2/32,10.4.0.3/32,10.5.0.0/24",
        "wg set kilo0 peer #2 remove",
    ]


def test_a_network_that_moves_between_peers_is_only_added_to_the_new_one() -> None:
    before = plan(peer(2, "10.4.0.2/32", "10.5.0.0/24"), peer(3, "10.4.0.3/32"))
    after = plan(peer(2, "10.4.0.2/32"), peer(3, "10.4.0.3/32", "10.5.0.0/24"))
    assert step(before, after) == ["wg set kilo0 peer #3 allowed-ips +10.5.0.0/24"]


def test_a_network_that_goes_costs_that_peer_its_whole_list_and_no_other() -> None:
    before = plan(peer(2, "10.4.0.2/32", "10.5.0.0/24"), peer(3, "10.4.0.3/32"))
    after = plan(peer(2, "10.4.0.2/32"), peer(3, "10.4.0.3/32"))
    assert step(before, after) == ["wg set kilo0 peer #2 allowed-ips 10.4.0.2/32"]


def test_a_peer_goes_after_the_routes_have_changed() -> None:
    before = plan(peer(2, "10.4.0.2/32"), peer(3, "10.4.0.3/32"), MESH)
    after = plan(peer(3, "10.4.0.3/32"), MESH, via("10.4.0.2/32", "192.168.9.2", source="10.4.0.1"))
    assert step(before, after) == [
        "ip route add 10.4.0.2/32 via 192.168.9.2 proto 107 src 10.4.0.1",
        "wg set kilo0 peer #2 remove",
    ]


def test_a_peer_is_reset_in_one_change() -> None:
    before = plan(peer(2, "10.4.0.2/32", "10.5.0.0/24", endpoint="203.0.113.2:51820", psk=key(90)), peer(3), MESH)
    after = plan(peer(2, "10.4.0.2/32", endpoint="203.0.113.2:51820", psk=key(90)), peer(3, "10.5.0.0/24"), MESH)
    host = host_with(before)
    active = evolve(host.peers[key(2)], last_handshake=5.0, endpoint=Endpoint.parse("198.51.100.2:4000"))
    host = evolve(host, peers={**host.peers, key(2): active})
    for settled in (None, before):
        memory = remember(before, Memory())
        todo = difference(after, host, memory, TARGET, settled, reset={key(2), key(4)}).changes
        assert sorted(lines(todo)) == [
            "wg set kilo0 peer #2 remove peer #2 preshared-key (hidden) endpoint 203.0.113.2:51820 "
            "allowed-ips 10.4.0.2/32",
            "wg set kilo0 peer #3 allowed-ips +10.5.0.0/24",
        ]
        then = apply_changes(host, todo, "kilo0")
        assert then.peers == host_with(after).peers
        assert diff(after, then, memory, TARGET) == ()


def test_keepalive_and_preshared_key_change_alone() -> None:
    before = plan(peer(2, "10.4.0.2/32", keepalive=25, psk=key(90)))
    assert step(before, plan(peer(2, "10.4.0.2/32"))) == [
        "wg set kilo0 peer #2 preshared-key /dev/null persistent-keepalive off"
    ]


@pytest.mark.parametrize("text", [str, repr])
def test_no_key_is_ever_shown(text: Callable[[object], str]) -> None:
    wanted = plan(peer(2, "10.4.0.2/32", psk=key(90)))
    changes = diff(wanted, Observed(), Memory(), TARGET)
    said = "".join(text(change) for change in changes) + repr(host_with(wanted)) + repr(TARGET)
    assert PRIVATE not in said
    assert key(90) not in said


# Endpoints


def with_endpoint(endpoint: str | None) -> HostPlan:
    return plan(peer(2, "10.4.0.2/32", endpoint=endpoint))


def roamed(observed: Observed, endpoint: str, handshake: float = 0.0) -> Observed:
    moved = evolve(observed.peers[key(2)], endpoint=Endpoint.parse(endpoint), last_handshake=handshake)
    return evolve(observed, time=1000.0, peers={key(2): moved})


def test_a_roaming_peer_keeps_the_endpoint_that_wireguard_learnt() -> None:
    wanted = with_endpoint("203.0.113.2:51820")
    observed = roamed(host_with(wanted), "198.51.100.9:4711")
    assert diff(wanted, observed, remember(wanted, Memory()), TARGET) == ()


def test_a_learnt_endpoint_that_is_routed_into_the_tunnel_is_set_back() -> None:
    wanted = with_endpoint("203.0.113.2:51820")
    route = tunnel("10.2.0.7/32", "10.4.0.1")
    routed = evolve(wanted, routes={**wanted.routes, route.destination: route})
    observed = roamed(host_with(routed), "10.2.0.7:51820", 990.0)
    assert lines(diff(routed, observed, remember(routed, Memory()), TARGET)) == [
        "wg set kilo0 peer #2 endpoint 203.0.113.2:51820"
    ]
    elsewhere = roamed(host_with(routed), "10.2.0.8:51820", 990.0)
    assert diff(routed, elsewhere, remember(routed, Memory()), TARGET) == ()


def test_a_new_endpoint_in_the_plan_is_set() -> None:
    assert step(with_endpoint("203.0.113.2:51820"), with_endpoint("203.0.113.5:51820")) == [
        "wg set kilo0 peer #2 endpoint 203.0.113.5:51820"
    ]


def test_a_peer_that_had_no_endpoint_gets_one() -> None:
    assert step(with_endpoint(None), with_endpoint("203.0.113.5:51820")) == [
        "wg set kilo0 peer #2 endpoint 203.0.113.5:51820"
    ]


def test_an_endpoint_that_leaves_the_plan_stays_and_is_not_set_again_when_it_returns() -> None:
    first, without = with_endpoint("203.0.113.2:51820"), with_endpoint(None)
    memory = remember(without, remember(first, Memory()))
    assert diff(without, host_with(first), memory, TARGET) == ()
    assert diff(first, host_with(first), memory, TARGET) == ()


OLD, NEW = "198.51.100.2:51820", "[2001:db8::2]:51820"


def moved(memory: Memory, host: Observed, to: str, now: float) -> tuple[Memory, Observed]:
    """What is remembered and what the device has once a peer is stated to be elsewhere."""
    made = diff(with_endpoint(to), host, memory, TARGET)
    assert lines(made) == [f"wg set kilo0 peer #2 endpoint {to}"]
    return remember(with_endpoint(to), memory, made=made, now=now), apply_changes(host, made, "kilo0")


@pytest.mark.parametrize("first", [True, False], ids=["resets first", "resets last"])
def test_a_peer_that_a_late_packet_takes_back_to_its_former_endpoint_is_set_to_the_new_one_again(first: bool) -> None:
    """A bounded number of times, and the last time without its session, whose packets would take it back again."""
    target = evolve(TARGET, public_key="" if first else "~")
    wanted = with_endpoint(NEW)
    memory, host = moved(remember(with_endpoint(OLD), Memory()), host_with(with_endpoint(OLD)), NEW, 1000.0)
    host = evolve(host, time=1000.0, public_key=target.public_key)
    assert diff(wanted, host, memory, target) == ()
    assert diff(wanted, roamed(host, OLD, 999.0), memory, target) == (), "more may be under way"
    assert may_go_back(memory, 1000.0)
    said = []
    for number in range(1, 6):
        back = evolve(roamed(host, OLD, 999.0), time=1000.0 + number / 2)
        changes = diff(wanted, back, memory, target)
        if not changes:
            break
        assert all(is_drift(change, back, memory) for change in changes)
        assert difference(wanted, back, memory, target, wanted).changes == changes, "the plan is settled"
        said += lines(changes)
        memory = remember(wanted, memory, wanted, made=changes, now=back.time)
        assert diff(wanted, back, memory, target) == (), "not at once"
    again = f"wg set kilo0 peer #2 endpoint {NEW}"
    reset = f"wg set kilo0 peer #2 remove peer #2 endpoint {NEW} allowed-ips 10.4.0.2/32"
    assert said == [*([again] * (1 if first else 2)), reset]
    assert not may_go_back(memory, 1000.5)


def test_a_peer_that_roams_is_left_where_it_is_although_its_endpoint_was_changed_a_moment_ago() -> None:
    memory, host = moved(remember(with_endpoint(OLD), Memory()), host_with(with_endpoint(OLD)), NEW, 999.0)
    assert diff(with_endpoint(NEW), roamed(host, "203.0.113.9:4711", 999.0), memory, TARGET) == ()


@pytest.mark.parametrize("wanted", [with_endpoint(None), plan(peer(2, "10.4.0.2/32", endpoint=OLD, observed=True))])
def test_a_peer_is_not_reset_for_an_endpoint_that_is_stated_no_more(wanted: HostPlan) -> None:
    memory, host = moved(remember(with_endpoint(OLD), Memory()), host_with(with_endpoint(OLD)), NEW, 999.0)
    stuck = evolve(memory, former={key(2): evolve(memory.former[key(2)], again=1)})
    assert diff(wanted, roamed(host, OLD, 999.0), stuck, TARGET) == ()


def test_a_peer_that_roams_to_its_former_endpoint_later_is_left_there() -> None:
    memory, host = moved(remember(with_endpoint(OLD), Memory()), host_with(with_endpoint(OLD)), NEW, 994.0)
    assert diff(with_endpoint(NEW), roamed(host, OLD, 999.0), memory, TARGET) == ()
    assert not may_go_back(memory, 1000.0)


def test_an_endpoint_that_changes_twice_and_back_is_what_was_stated_last() -> None:
    """None of those before it counts; it itself does, although it is one of those."""
    third = "203.0.113.5:51820"
    memory, host = moved(remember(with_endpoint(OLD), Memory()), host_with(with_endpoint(OLD)), NEW, 998.0)
    memory, host = moved(memory, host, third, 999.5)
    for former in (OLD, NEW):
        assert lines(diff(with_endpoint(third), roamed(host, former, 999.0), memory, TARGET)) == [
            f"wg set kilo0 peer #2 endpoint {third}"
        ]
    memory, host = moved(memory, host, OLD, 999.6)
    assert diff(with_endpoint(OLD), roamed(host, OLD, 999.0), memory, TARGET) == ()
    assert lines(diff(with_endpoint(OLD), roamed(host, third, 999.0), memory, TARGET)) == [
        f"wg set kilo0 peer #2 endpoint {OLD}"
    ]


@pytest.mark.parametrize(
    ("found", "handshake", "set_now"),
    [("203.0.113.9:4711", 950.0, False), ("203.0.113.9:4711", 700.0, True), ("192.168.0.2:51820", 950.0, True)],
    ids=["heard through its NAT", "silent", "not behind NAT"],
)
def test_what_changes_behind_a_nat_takes_no_peer_from_where_it_is_heard(
    found: str, handshake: float, set_now: bool
) -> None:
    before, wanted = with_endpoint("192.168.0.2:51820"), with_endpoint("192.168.0.77:51820")
    memory, observed = remember(before, Memory()), roamed(host_with(before), found, handshake)
    assert must_look(wanted, before, memory)
    set_ = ["wg set kilo0 peer #2 endpoint 192.168.0.77:51820"]
    changes = diff(wanted, observed, memory, TARGET)
    assert lines(changes) == (set_ if set_now else [])
    memory = remember(wanted, memory, before, made=changes, now=1000.0)
    silent = roamed(apply_changes(observed, changes, "kilo0"), "203.0.113.9:4711", 700.0)
    assert diff(wanted, silent, memory, TARGET) == (), "nobody has sent it anything"


@pytest.mark.parametrize("settled", [False, True])
def test_an_endpoint_that_was_set_is_forgotten_with_the_peer(settled: bool) -> None:
    """Somebody deletes the device while the plan has no endpoint; another one learnt meanwhile may be out of date."""
    first, without = with_endpoint("203.0.113.2:51820"), with_endpoint(None)
    memory = remember(without, remember(first, Memory()))
    made = diff(without, Observed(), memory, TARGET)
    memory = remember(without, memory, without if settled else None, made=made)
    anew = apply_changes(Observed(), made, "kilo0")
    for host in (anew, roamed(anew, "198.51.100.9:4711", 700.0)):
        assert lines(diff(first, host, memory, TARGET)) == ["wg set kilo0 peer #2 endpoint 203.0.113.2:51820"]
    assert diff(first, roamed(anew, "198.51.100.9:4711", 950.0), memory, TARGET) == ()


def test_a_peer_that_somebody_made_anew_without_an_endpoint_gets_one_at_once() -> None:
    """As a change of a peer does that somebody removed just before: WireGuard adds it, with no more than the change."""
    wanted = with_endpoint("203.0.113.2:51820")
    bare = host_with(with_endpoint(None))
    (change,) = diff(wanted, bare, remember(wanted, Memory()), TARGET)
    assert lines((change,)) == ["wg set kilo0 peer #2 endpoint 203.0.113.2:51820"]
    assert is_drift(change, bare)


def test_a_kernel_without_ipv6_is_not_given_an_endpoint_again_and_again() -> None:
    wanted = with_endpoint("[2001:db8::2]:51820")
    bare = evolve(host_with(with_endpoint(None)), lacking=frozenset({6}))
    assert diff(wanted, bare, remember(wanted, Memory()), TARGET) == ()


def test_an_endpoint_that_could_not_be_set_is_not_remembered() -> None:
    before, wanted = with_endpoint("203.0.113.2:51820"), with_endpoint("203.0.113.5:51820")
    host, memory = host_with(before), remember(before, Memory())
    for settled in (None, before, wanted):
        failed = diff(wanted, host, memory, TARGET)
        assert diff(wanted, host, remember(wanted, memory, settled, failed=failed), TARGET) == failed


def test_a_name_that_is_not_resolved_is_left_out() -> None:
    assert step(with_endpoint(None), with_endpoint("node.example.org:51820")) == []


@pytest.mark.parametrize(
    ("handshake", "said"),
    [(950.0, []), (700.0, ["wg set kilo0 peer #2 endpoint 203.0.113.2:51820"])],
)
def test_an_adopted_peer_keeps_an_endpoint_that_is_in_use(handshake: float, said: list[str]) -> None:
    wanted = with_endpoint("203.0.113.2:51820")
    observed = roamed(host_with(wanted), "198.51.100.9:4711", handshake)
    assert lines(diff(wanted, observed, Memory(), TARGET)) == said


def by_observers(endpoint: str) -> HostPlan:
    return plan(peer(2, "10.4.0.2/32", endpoint=endpoint, observed=True))


@pytest.mark.parametrize("remembered", [True, False])
@pytest.mark.parametrize(
    ("handshake", "said"),
    [
        (950.0, []),
        (700.0, ["wg set kilo0 peer #2 endpoint 198.51.100.2:40002"]),
        (0.0, ["wg set kilo0 peer #2 endpoint 198.51.100.2:40002"]),
    ],
    ids=("in use", "long silent", "never heard"),
)
def test_an_observed_endpoint_counts_only_if_nothing_is_received(
    handshake: float, said: list[str], remembered: bool
) -> None:
    before, wanted = with_endpoint("192.168.0.2:51820"), by_observers("198.51.100.2:40002")
    memory = remember(before, Memory()) if remembered else Memory()
    observed = roamed(host_with(before), "198.51.100.9:4711", handshake)
    changes = diff(wanted, observed, memory, TARGET)
    assert lines(changes) == said
    after = apply_changes(observed, changes, "kilo0")
    assert diff(wanted, after, remember(wanted, memory), TARGET) == ()


def test_a_new_peer_gets_its_observed_endpoint() -> None:
    assert step(plan(), by_observers("198.51.100.2:40002")) == [
        "wg set kilo0 peer #2 endpoint 198.51.100.2:40002 allowed-ips 10.4.0.2/32"
    ]


def test_before_an_observed_endpoint_is_used_the_device_is_asked_for_recent_handshakes() -> None:
    first, second = by_observers("198.51.100.2:40002"), by_observers("198.51.100.2:40003")
    assert must_look(first, None)
    assert must_look(second, first)
    assert not must_look(first, first)
    assert not must_look(with_endpoint("198.51.100.2:1"), first)
    assert not must_look(plan(), first)
    assert not must_look(evolve(plan(peer(2, "10.4.0.2/32", observed=True))), None)


def test_what_was_learnt_is_not_set_back_when_the_observed_endpoint_ends() -> None:
    registered, told = with_endpoint("192.168.0.2:51820"), by_observers("198.51.100.2:40002")
    memory = remember(told, remember(registered, Memory()))
    learnt = roamed(host_with(told), "198.51.100.2:40777", 950.0)
    assert diff(registered, learnt, memory, TARGET) == ()
    assert diff(registered, learnt, remember(registered, memory), TARGET) == ()


def test_an_endpoint_that_has_grown_old_is_no_drift() -> None:
    wanted = by_observers("198.51.100.2:40002")
    old = roamed(host_with(wanted), "198.51.100.9:4711", 700.0)
    (change,) = diff(wanted, old, remember(wanted, Memory()), TARGET)
    assert not is_drift(change, old)
    for found, now in ((plan(), wanted), (wanted, plan())):
        host = host_with(found)
        changes = diff(now, host, Memory(), TARGET)
        assert changes
        assert all(is_drift(change, host) for change in changes)


# Routes of ours and of others


def foreign(observed: Observed, destination: str, **values: Any) -> Observed:
    route = Route(destination=ip_network(destination), device="eth0", protocol=4, **values)
    return evolve(observed, foreign={route.destination: route})


def test_an_operators_route_is_left_alone_and_reported() -> None:
    todo = difference(plan(MESH), foreign(host_with(plan()), "10.4.0.0/16"), Memory(), TARGET)
    assert todo.changes == ()
    assert [failure.text for failure in todo.failures] == [
        "the host already has a route to 10.4.0.0/16 that is not ours; it was left alone and the mesh's was not set: "
        "remove one of the two (see `ip route show 10.4.0.0/16`)"
    ]


@pytest.mark.parametrize(
    ("destination", "protocol", "reported"),
    [
        ("10.4.7.0/24", 4, True),
        ("10.4.7.7/32", 4, True),
        ("10.5.0.0/24", 4, False),
        ("10.0.0.0/8", 4, False),
        ("0.0.0.0/0", 4, False),
        ("fd00::/64", 4, False),
        # What the kernel sets for an address is told by whoever looks at the addresses.
        ("10.4.7.0/24", 2, False),
    ],
)
def test_an_operators_route_within_the_meshs_subnet_is_reported(
    destination: str, protocol: int, reported: bool
) -> None:
    wanted = plan(MESH, tunnel("172.16.0.0/12"))
    route = Route(destination=ip_network(destination), device="eth0", protocol=protocol)
    observed = evolve(host_with(wanted), foreign={route.destination: route})
    todo = difference(wanted, observed, Memory(), TARGET)
    assert todo.changes == ()
    assert [failure.text for failure in todo.failures] == (
        [
            f"the host's own route to {destination} lies within the mesh's subnet 10.4.0.0/16; it was left alone, and "
            f"mesh addresses in it are not reached from here: remove it (see `ip route show {destination}`)"
        ]
        if reported
        else []
    )


def test_a_default_route_is_never_set() -> None:
    todo = difference(plan(tunnel("0.0.0.0/0"), tunnel("::/0"), MESH), host_with(plan()), Memory(), TARGET)
    assert lines(todo.changes) == ["ip route add 10.4.0.0/16 dev kilo0 proto 107 src 10.4.0.1"]
    assert len(todo.failures) == 2


@pytest.mark.parametrize(
    ("route", "word"),
    [
        (via("fd00:5::/64", "192.168.9.77"), "IPv6 needs an IPv6 gateway"),
        (via("fd00:5::/64", "fd00:9::77", Via.IPIP), "IPIP carries IPv4 over IPv4 only"),
    ],
)
def test_what_linux_cannot_do_is_a_sentence(route: RoutePlan, word: str) -> None:
    todo = difference(plan(route), host_with(plan()), Memory(), TARGET)
    assert todo.changes == ()
    assert word in todo.failures[0].text


def test_leftovers_of_ours_go_wherever_they_lead() -> None:
    left = Route(destination=ip_network("10.99.0.0/16"), device="eth0", metric=7)
    stray = Route(destination=ip_network("10.4.0.0/16"), device="kilo0", metric=50)
    observed = evolve(host_with(plan(MESH)), duplicate_routes=(stray,))
    observed = evolve(
        observed,
        routes={**observed.routes, left.destination: left},
        addresses=observed.addresses | {ip_interface("10.4.7.7/32")},
    )
    assert lines(diff(plan(MESH), observed, Memory(), TARGET)) == [
        "ip route del 10.4.0.0/16 dev kilo0 proto 107 metric 50",
        "ip route del 10.99.0.0/16 dev eth0 proto 107 metric 7",
        "ip address del 10.4.7.7/32 dev kilo0",
    ]


def test_ipip_comes_and_goes_with_its_routes() -> None:
    encapsulated = plan(
        via("10.4.0.0/16", "192.168.9.2", Via.IPIP, "10.4.0.1"), ipip=("192.168.9.2",), ipip_local="192.168.9.1"
    )
    assert step(plan(), encapsulated) == [
        # First the guard, then what it guards.
        "nft 'add table inet kilo; delete table inet kilo; table inet kilo { counter ipip_accepted { }; "
        "counter ipip_dropped { }; set ipip_nodes { type ipv4_addr; elements = { 192.168.9.2 }; }; "
        "chain input { type filter hook input priority 0; policy accept; "
        "meta l4proto 4 ip daddr 192.168.9.1 ip saddr @ipip_nodes counter name ipip_accepted accept; "
        "meta l4proto 4 ip daddr 192.168.9.1 counter name ipip_dropped drop; }; }'",
        "ip link add kilo-ipip type ipip local 192.168.9.1",
        "ip link set kilo-ipip mtu 1480",
        "ip link set kilo-ipip up",
        "ip route add 10.4.0.0/16 via 192.168.9.2 dev kilo-ipip proto 107 src 10.4.0.1 onlink",
    ]
    assert step(encapsulated, plan()) == [
        "ip route del 10.4.0.0/16 via 192.168.9.2 dev kilo-ipip proto 107 src 10.4.0.1 onlink",
        "ip link del kilo-ipip",
        "nft delete table inet kilo",
    ]


def test_ipip_from_another_address_takes_its_routes_along_and_they_come_again() -> None:
    route = via("10.4.0.0/16", "192.168.9.2", Via.IPIP, "10.4.0.1")
    before = plan(route, ipip=("192.168.9.2",), ipip_local="192.168.9.1")
    after = plan(route, ipip=("192.168.9.2",), ipip_local="192.168.9.5")
    said = lines(diff(after, host_with(before), Memory(), TARGET))
    assert "ip daddr 192.168.9.5" in said[0]
    assert said[1:] == [
        "ip link del kilo-ipip",
        "ip link add kilo-ipip type ipip local 192.168.9.5",
        "ip link set kilo-ipip mtu 1480",
        "ip link set kilo-ipip up",
        "ip route add 10.4.0.0/16 via 192.168.9.2 dev kilo-ipip proto 107 src 10.4.0.1 onlink",
    ]


def test_a_device_named_like_our_ipip_but_of_another_kind_is_not_deleted_for_want_of_ipip() -> None:
    observed = evolve(host_with(plan()), ipip=Link(name="kilo-ipip", index=7, kind="bridge"), ipip_ours=False)
    assert diff(plan(), observed, Memory(), TARGET) == ()


def test_interface_names_fit_the_kernel() -> None:
    assert ipip_name("kilo0") == "kilo-ipip"
    assert all(len(ipip_name(name)) <= 15 for name in ("wg-datacentre-1", "a"))


def test_ipv4_through_an_ipv6_gateway_says_so() -> None:
    said = step(plan(), plan(via("10.7.0.0/16", "fd00:9::77")))
    assert said == ["ip route add 10.7.0.0/16 via inet6 fd00:9::77 proto 107"]


def test_a_deleted_device_takes_routes_and_addresses_with_it() -> None:
    target = DeviceTarget(public_key=key(200))
    wanted = plan(MESH, via("10.7.0.0/16", GATEWAY4, source="10.4.0.1"))
    left = plan(via("10.8.0.0/16", GATEWAY4))
    both = plan(*wanted.routes.values(), *left.routes.values())
    from kilo_etcd.kernel.state import DeleteLink

    after = apply_changes(host_with(both, target), [DeleteLink("kilo0")], "kilo0")
    assert after.link is None
    assert set(after.routes) == set(left.routes)
