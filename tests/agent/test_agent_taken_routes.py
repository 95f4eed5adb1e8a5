"""Which of the kernel's routes are another program's doing."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

from kilo_etcd.agent.probing.taken_routes import taken_directly, with_cause
from kilo_etcd.kernel import Route
from kilo_etcd.kernel.routing.rules import ForeignRule
from kilo_etcd.store.records import TakenRoute

HERE, THERE = ip_address("192.168.1.2"), ip_address("192.168.1.3")
NO_ROUTE = "Network is unreachable"
"""What the kernel answers for want of a route, and for a rule of kind `unreachable` too."""

KERNELS_OWN = tuple(
    ForeignRule(version=4, priority=priority, table=table) for priority, table in ((0, 255), (32766, 254), (32767, 253))
)


def test_the_kernels_own_rules_are_no_other_programs() -> None:
    """A member whose internal IP this host has too is on no link of this host; nobody must delete the kernel's rules
    for that."""
    for table, device in ((255, None), (254, "eth0"), (253, "eth0")):
        answer = Route(destination=ip_network("192.168.1.0/24"), device=device or "", table=table)
        assert not taken_directly(THERE, answer, KERNELS_OWN).foreign
        foreign = TakenRoute(str(THERE), "", "shown", True)
        assert with_cause(foreign, THERE, answer, KERNELS_OWN) == foreign


def test_a_rule_for_a_source_is_named_only_if_the_packet_is_from_there() -> None:
    other = ForeignRule(version=4, priority=100, table=99, source=ip_network("192.168.1.9/32"))
    mine = ForeignRule(version=4, priority=200, table=99, destination=ip_network("192.168.1.3/32"))
    answer = Route(destination=ip_network("192.168.1.3/32"), device="eth1", table=99)
    for source in ("", str(HERE)):
        foreign = TakenRoute(str(THERE), source, "shown", True)
        assert with_cause(foreign, THERE, answer, (other, mine)).route == f"shown, by {mine}"
    by_source = TakenRoute(str(THERE), "192.168.1.9", "shown", True)
    assert with_cause(by_source, THERE, answer, (other, mine)).route == f"shown, by {other}"


def test_no_route_is_another_programs_only_if_a_rule_refuses_the_packet() -> None:
    rule = ForeignRule(version=4, priority=5, table=0, destination=ip_network("192.168.1.3/32"), refuses="unreachable")
    assert not taken_directly(THERE, NO_ROUTE, KERNELS_OWN).foreign
    assert taken_directly(THERE, NO_ROUTE, (rule, *KERNELS_OWN)).foreign


def test_the_narrowest_route_of_another_program_is_named_where_no_rule_is() -> None:
    there = ip_address("10.4.0.3")
    foreign = {ip_network(n): Route(destination=ip_network(n)) for n in ("0.0.0.0/0", "10.4.0.0/17", "10.4.0.0/24")}
    for answer in ("Invalid argument", Route(destination=ip_network("10.4.0.0/24"), device="eth0")):
        taken = TakenRoute(str(there), "", "shown", True)
        assert with_cause(taken, there, answer, KERNELS_OWN, foreign).route == "shown, by ip -4 route 10.4.0.0/24"
        assert with_cause(taken, there, answer, KERNELS_OWN, {}).route == "shown"
        ours = taken._replace(foreign=False)
        assert with_cause(ours, there, answer, KERNELS_OWN, foreign) == ours
    # Another table's route is in no main table.
    elsewhere = Route(destination=ip_network("10.4.0.0/24"), device="eth0", table=99)
    assert with_cause(taken, there, elsewhere, KERNELS_OWN, foreign).route == "shown"
