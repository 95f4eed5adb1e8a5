"""What lost packets say: who lets none through, who is reached by nobody, and what is said elsewhere already."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from ipaddress import ip_address, ip_interface
from itertools import pairwise
from types import MappingProxyType

import pytest
from attrs import evolve

from kilo_etcd.ctl.reports.arrivals import across, losses, path, reached_by
from kilo_etcd.ctl.reports.live import Live
from kilo_etcd.ctl.reports.lossy import limited, lossy, unsteady
from kilo_etcd.ctl.reports.narrow import narrow
from kilo_etcd.model import Candidate, CandidateClass, Endpoint, Node, Snapshot
from kilo_etcd.store.records import DiagnosticsResponse, EchoCount, EchoSize, Tunnel
from kilo_etcd.topology.segments import Topology, build_topology

PLACES = {"a1": "a", "a2": "a", "a3": "a", "b1": "b", "b2": "b", "c1": "c"}
NOTHING = "it leads its location and does not forward: through it nothing arrives "
Lost = Callable[[str, str], bool]


def mesh() -> Topology:
    """Locations a, b and c, led by a1, b1 and c1."""
    nodes = {
        name: Node(
            name=name,
            public_key=name,
            location=place,
            internal_ips=(ip_interface(f"192.168.{ord(place)}.{number}/24"),),
            mesh_addresses=(ip_address(f"10.4.0.{number}"),),
            endpoint=Endpoint.parse(f"203.0.113.{number}:51820"),
        )
        for number, (name, place) in enumerate(PLACES.items(), 1)
    }
    first = {place: Candidate(node=f"{place}1", rank=CandidateClass.PUBLIC, create_revision=1) for place in "abc"}
    return build_topology(
        Snapshot(revision=1, nodes=nodes, candidates={p: (candidate,) for p, candidate in first.items()})
    )


def asked(topology: Topology, lost: Lost, names: Iterable[str] = PLACES) -> Live:
    answers = {}
    for name in names:
        found: dict[bool, list[str]] = {False: [], True: []}
        for other, node in topology.snapshot.nodes.items():
            if other != name:
                found[lost(name, other)].append(str(node.mesh_addresses[0]))
        answers[name] = DiagnosticsResponse(reached=tuple(found[False]), unreached=tuple(found[True]))
    return Live(answers=answers)


def behind(leader: str) -> Lost:
    """What is lost if a leader does not forward."""
    return lambda one, other: (
        (PLACES[one] == PLACES[leader]) != (PLACES[other] == PLACES[leader]) and leader not in (one, other)
    )


CASES: dict[str, tuple[Lost, list[tuple[str, str]]]] = {
    "nothing": (lambda one, other: False, []),
    "a leader does not forward": (
        behind("a1"),
        [("a1", NOTHING + "between a2, a3 and b1, b2, c1")],
    ),
    "two leaders do not": (
        lambda one, other: behind("a1")(one, other) or behind("b1")(one, other),
        [("a1", NOTHING + "between a2, a3 and b1, b2, c1"),
         ("b1", NOTHING + "between b2 and a1, a2, a3, c1")],
    ),
    "one way only": (
        lambda one, other: behind("a1")(one, other) and PLACES[one] == "a",
        [("a1", NOTHING + "from a2, a3 to b1, b2, c1")],
    ),
    "a host that is reached by nobody, and reaches nobody": (
        lambda one, other: "a3" in (one, other),
        [("a3", "no echo request to it at 10.4.0.3 was answered (tried by a1, a2, b1, b2, c1), nor one of its own")],
    ),
    "a host that filters echo requests": (
        lambda one, other: other == "a3",
        [("a3", "its own packets are answered, but echo requests to 10.4.0.3 are not (tried by a1, a2, b1, b2, c1)")],
    ),
    "where all hosts but one filter echo requests that one is not to blame": (
        lambda one, other: other != "a3",
        [(name, "its own packets are answered, but echo requests to ") for name in ("a1", "a2", "b1", "b2", "c1")],
    ),
    "two members that do not reach each other": (
        lambda one, other: {one, other} == {"a2", "a3"}, [("a2 - a3", "a2 and a3 do not reach each other")],
    ),
    "two members of two locations lose each other's packets only, so no leader is blamed": (
        lambda one, other: {one, other} == {"a2", "b2"}, [("a2 - b2", "a2 and b2 do not reach each other")],
    ),
    "a leader that forwards nothing is blamed, and not the leader at the other end, nor for a single pair": (
        lambda one, other: behind("b1")(one, other) or {one, other} == {"a2", "c1"},
        [("b1", NOTHING + "between b2 and a1, a2, a3, c1"), ("a2 - c1", "a2 and c1 do not reach each other")],
    ),
    "a host whose packets the other locations do not get is no fault of the leaders": (
        lambda one, other: one == "a3",
        [("a3", "none of the echo requests that it sends to a1, a2, b1, b2, c1 is answered, although it answers those "
                "of a1, a2, b1, b2, c1")],
    ),
    "a member that one other location loses is no fault of a leader that forwards other packets": (
        lambda one, other: {one, other} in ({"a2", "b1"}, {"a2", "b2"}),
        [("a2", "a2 and b1, b2 do not reach each other")],
    ),
    "a member that does not reach its leader is no leader's fault": (
        lambda one, other: "a3" in (one, other) and "a2" not in (one, other),
        [("a1 - a3", "a1 and a3 do not reach each other")],
    ),
    "a leader that all lost packets to a host pass, and none that arrive there, is named first": (
        lambda one, other: PLACES[one] == "a" and other == "b2",
        [("a1 - b2", "a1, a2, a3 do not reach b2, and all that is lost passes a1; what arrives there does not")],
    ),
    "two locations whose leaders do not meet": (
        lambda one, other: {PLACES[one], PLACES[other]} == {"b", "c"},
        [("c1", "c1 and b1, b2 do not reach each other")],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_lost_packets_say(case: str) -> None:
    lost, said = CASES[case]
    topology = mesh()
    found = losses(topology, asked(topology, lost))
    assert [loss.subject for loss in found] == [subject for subject, _ in said]
    for loss, (_, text) in zip(found, said, strict=True):
        assert loss.text.startswith(text), loss.text
        assert loss.filtered == ("its own packets are answered" in text)


def in_two_families(lost: Lost) -> tuple[Topology, Live]:
    """A mesh of both families, and the answers of its hosts where only IPv6 is `lost`."""
    usual = mesh()
    nodes = {
        name: evolve(node, mesh_addresses=(*node.mesh_addresses, ip_address(f"fd00::{number}")))
        for number, (name, node) in enumerate(usual.snapshot.nodes.items(), 1)
    }
    topology = build_topology(evolve(usual.snapshot, nodes=nodes))
    answers = {}
    for name, answer in asked(topology, lambda one, other: False).answers.items():
        found: dict[bool, list[str]] = {False: [], True: []}
        for other, node in nodes.items():
            if other != name:
                found[lost(name, other)].append(str(node.mesh_addresses[1]))
        answers[name] = evolve(answer, reached=(*answer.reached, *found[False]), unreached=tuple(found[True]))
    return topology, Live(answers=answers)


@pytest.mark.parametrize(
    ("lost", "said"),
    [
        (behind("a1"), "it leads its location and does not forward IPv6: through it no IPv6 arrives between a2, a3 and "
                       "b1, b2, c1"),
        (lambda one, other: {one, other} == {"a2", "a3"}, "a2 and a3 do not reach each other in IPv6"),
        (lambda one, other: one == "a3",
         "none of the IPv6 echo requests that it sends to a1, a2, b1, b2, c1 is answered, although it answers "),
        (lambda one, other: "a3" in (one, other),
         "no echo request to it at fd00::3 was answered (tried by a1, a2, b1, b2, c1), nor an IPv6 one of its own, "
         "although in IPv4 it is reached"),
    ],
)  # fmt: skip
def test_what_is_lost_in_one_family_is_said_of_that_one(lost: Lost, said: str) -> None:
    (loss,) = losses(*in_two_families(lost))
    assert loss.text.startswith(said), loss.text
    assert "is the host up" not in loss.remedy


def test_where_all_ipv6_is_lost_the_hosts_are_said_to_answer() -> None:
    topology, live = in_two_families(lambda one, other: True)
    assert all("no echo request to it at fd00::" in loss.text for loss in losses(topology, live))
    (loss,) = losses(topology, live, queries_answered=True)
    assert loss.text.startswith("none of the IPv6 echo requests that 6 hosts sent to mesh addresses was answered")
    assert reached_by(topology, live)["a2"] == ("a1", "a3", "b1", "b2", "c1")


def test_the_remedy_for_a_pair_names_the_leaders_between_the_two() -> None:
    topology = mesh()
    (loss,) = losses(topology, asked(topology, lambda one, other: {one, other} == {"a2", "b2"}))
    assert loss.next_steps == f"{loss.remedy}; kgctl explain a2 b2 --live"
    assert loss.remedy.endswith("on one of the two, on a1 or b1, or on the way")
    (loss,) = losses(topology, asked(topology, lambda one, other: {one, other} == {"a2", "a3"}))
    assert loss.remedy.endswith(
        "on one of the two, or on the way; and for a wrong entry in the neighbour table (ip neigh)"
    )


def test_a_tunnel_that_is_known_to_be_down_explains_what_is_lost() -> None:
    topology = mesh()
    lost: Lost = lambda one, other: {PLACES[one], PLACES[other]} == {"a", "c"}  # noqa: E731
    live = asked(topology, lost)
    assert losses(topology, live)
    assert losses(topology, live, [frozenset({"a1", "c1"})]) == ()


def test_who_does_not_live_is_not_missed() -> None:
    topology = mesh()
    assert losses(topology, asked(topology, lambda one, other: other == "c1", set(PLACES) - {"c1"})) == ()


def with_sessions(topology: Topology, live: Live, *pairs: tuple[str, str]) -> Live:
    """The same, with tunnels that have a session."""
    answers = dict(live.answers)
    for one, other in (*pairs, *(pair[::-1] for pair in pairs)):
        key = topology.snapshot.nodes[other].public_key
        answers[one] = evolve(answers[one], tunnels=(*answers[one].tunnels, Tunnel(key, 5, 1, 1, "")))
    return evolve(live, answers=answers)


def test_where_no_host_answers_echo_requests_it_is_said_what_was_asked_and_no_more() -> None:
    topology = mesh()
    live = asked(topology, lambda one, other: True)
    assert all("no echo request to it" in loss.text and not loss.filtered for loss in losses(topology, live))
    (loss,) = losses(topology, live, queries_answered=True)
    assert (loss.subject, loss.filtered) == ("packets", True)
    assert "although members of a location answer each other's peer queries" in loss.text
    (loss,) = losses(topology, with_sessions(topology, live, ("a1", "b1"), ("a1", "c1"), ("b1", "c1")))
    assert (loss.subject, loss.filtered) == ("packets", True)
    assert loss.text == (
        "none of the echo requests that 6 hosts sent to mesh addresses was answered, although 3 tunnels have sessions: "
        "it is not known whether other packets arrive"
    )


def test_a_host_that_neither_answers_nor_is_answered_although_its_tunnel_has_a_session() -> None:
    topology = mesh()
    live = asked(topology, lambda one, other: "c1" in (one, other))
    (loss,) = losses(topology, with_sessions(topology, live, ("a1", "b1"), ("a1", "c1")))
    assert (loss.subject, loss.filtered) == ("c1", False)
    assert loss.text == (
        "no echo request to it at 10.4.0.6 was answered (tried by a1, a2, a3, b1, b2), nor one of its own, although "
        "its tunnel to a1 has a session"
    )
    silent = evolve(
        live, answers={name: response for name, response in live.answers.items() if name != "c1"}, silent=("c1",)
    )
    (loss,) = losses(topology, silent)
    assert loss.text == "no echo request to it at 10.4.0.6 was answered (tried by a1, a2, a3, b1, b2)"


@pytest.mark.parametrize(
    ("small_only", "told"),
    [
        (lambda one, other: False, []),
        # What goes by b1's tunnels, whoever sends it.
        (lambda one, other: (PLACES[one] == "b") != (PLACES[other] == "b"),
         [("b1", "small packets arrive between it and a1, c1, and none of 1420 bytes does")]),
        (lambda one, other: "a2" in (one, other),
         [("a2", "small packets arrive between it and a1, a3, and none of 1420 bytes does")]),
        # Its own are answered, so that no hop is to blame.
        (lambda one, other: other == "a2",
         [("a2", "small packets arrive between it and a1, a3, b1, b2, c1, and none of 1420 bytes does")]),
        (lambda one, other: {PLACES[one], PLACES[other]} == {"b", "c"},
         [("b1 - c1", "small packets arrive between them, and none of 1420 bytes does")]),
        (lambda one, other: {one, other} == {"a2", "a3"},
         [("a2 - a3", "small packets arrive between them, and none of 1420 bytes does")]),
    ],
    ids=["none", "a host", "a member", "what a member takes", "a pair of locations", "within a location"],
)  # fmt: skip
def test_where_no_large_packet_arrives_the_tunnel_is_named(small_only: Lost, told: list[tuple[str, str]]) -> None:
    topology = mesh()
    live = asked(topology, lambda one, other: False)
    addresses = {name: str(node.mesh_addresses[0]) for name, node in topology.snapshot.nodes.items()}
    live = Live(answers={
        name: evolve(answer, mtu=1420, small_only=tuple(
            addresses[other] for other in PLACES if other != name and small_only(name, other)
        ))
        for name, answer in live.answers.items()
    })  # fmt: skip
    found = list(narrow(topology, live))
    assert [(loss.subject, loss.text) for loss in found] == told
    assert all("KILO_MTU" in loss.remedy for loss in found)
    assert losses(topology, live) == ()


def counted(topology: Topology, missing: Callable[[str, str], int], silent: str = "") -> Live:
    """The answers if so many of 20 echo requests to one host by another got no answer; `silent` does not tell."""
    live = asked(topology, lambda one, other: missing(one, other) == 20)
    addresses = {name: str(node.mesh_addresses[0]) for name, node in topology.snapshot.nodes.items()}
    return Live(
        answers={
            name: evolve(answer, mtu=1420, echoes=tuple(
                EchoCount(addresses[other], 20, 20 - missing(name, other))
                for other in PLACES if other != name and missing(name, other) < 20
            ))
            for name, answer in live.answers.items() if name != silent
        },
        silent=(silent,) if silent else (),
    )  # fmt: skip


def told(topology: Topology, live: Live) -> list[tuple[str, str]]:
    """The sentences on packets that get lost in part. Nothing is said of large ones that are lost there too."""
    large = Live(answers={
        name: evolve(answer, small_only=tuple(echo.address for echo in answer.echoes if echo.answered < 17))
        for name, answer in live.answers.items()
    })  # fmt: skip
    assert list(narrow(topology, large)) == []
    return [(loss.subject, loss.text) for loss in unsteady(topology, lossy(topology, live))]


def test_where_several_requests_are_not_answered_packets_get_lost() -> None:
    topology = mesh()

    def between(*names: str) -> Callable[[str, str], int]:
        return lambda one, other: 8 * (one in names and other in names)

    assert told(topology, counted(topology, lambda one, other: 0)) == []
    # Two of 600 are no matter.
    assert told(topology, counted(topology, lambda one, other: (one, other) in (("a1", "b1"), ("a2", "b2")))) == []
    assert told(topology, counted(topology, between("a2", "a3"))) == [
        ("a2 - a3", "between them packets get lost: 16 of 40 echo requests got no answer")
    ]
    # Between the two alone: no host on the way loses anything else.
    assert told(topology, counted(topology, between("a2", "b2"))) == [
        ("a2 - b2", "between them packets get lost: 16 of 40 echo requests got no answer")
    ]


@pytest.mark.parametrize("lost", [8, 10, 14])
@pytest.mark.parametrize(
    ("ends", "way"), [(("b2", "c1"), "b1"), (("a3", "c1"), "a1"), (("a3", "b2"), "a1, b1"), (("a1", "b1"), "")]
)
def test_hosts_on_whose_hops_no_other_packets_get_lost_are_named_themselves(
    ends: tuple[str, str], way: str, lost: int
) -> None:
    """The printed command sends what does get lost, and the hosts on the way are places to look at."""
    topology = mesh()
    live = counted(topology, lambda one, other: lost // 2 if {one, other} == {*ends} else 0)
    assert told(topology, live) == [
        (" - ".join(ends), f"between them packets get lost: {lost // 2 * 2} of 40 echo requests got no answer")
    ]
    (loss,) = unsteady(topology, lossy(topology, live))
    address = topology.snapshot.nodes[ends[1]].mesh_addresses[0]
    assert loss.remedy.startswith(f"`ping -c 100 -i 0.1 {address}` on {ends[0]} shows how many")
    assert loss.remedy.endswith(f"on {', '.join(ends)}" + (f", or on {way}, on the way" if way else ""))


def test_the_place_that_lost_packets_alone_pass_is_the_first_to_look_at() -> None:
    topology = mesh()
    (loss,) = losses(topology, asked(topology, lambda one, other: PLACES[one] == "a" and other == "b2"))
    assert "(snat), another program's rule (ip rule) or IPsec policy (ip xfrm policy), on a1 first, then" in loss.remedy


def test_of_two_ends_the_one_whose_requests_get_lost_is_told_to_ping() -> None:
    topology = mesh()
    live = counted(
        topology, lambda one, other: 14 if (one, other) == ("c1", "b2") else 2 * ((one, other) == ("b2", "c1"))
    )
    (loss,) = unsteady(topology, lossy(topology, live))
    address = topology.snapshot.nodes["b2"].mesh_addresses[0]
    assert loss.subject == "b2 - c1"
    assert loss.remedy.startswith(f"`ping -c 100 -i 0.1 {address}` on c1 shows how many")


def test_a_leader_that_loses_some_of_what_it_forwards_is_named() -> None:
    """Its own packets arrive, so it is no hop to or from it."""
    topology = mesh()
    live = counted(topology, lambda one, other: 6 * behind("a1")(one, other))
    assert told(topology, live) == [
        ("a1", "packets get lost that it forwards, and none between it and other hosts: 72 of 240 echo requests got no "
               "answer, of a2 to b1 for instance")
    ]  # fmt: skip


ANYWHERE = [
    ("a1 - b1", ""), *((place, silent) for place in ("a1", "a2", "b1", "c1") for silent in ("", place))
]  # fmt: skip


@pytest.mark.parametrize("loss", [0.08, 0.15, 0.3, 0.6, 0.8])
@pytest.mark.parametrize(("place", "silent"), ANYWHERE)
def test_a_place_that_loses_packets_in_part_is_named_whatever_share_it_loses(
    place: str, silent: str, loss: float
) -> None:
    """In both directions, so that of `loss` 0.08 some 15 % of the echo requests get no answer."""
    topology, rng, wrong = mesh(), random.Random(f"{place} {loss} {silent}"), []
    for _ in range(12):
        # A host loses what comes in by the network; within its location that is a way of its own.
        hops = [frozenset(place.split(" - "))] if " - " in place else [
            frozenset((place, other)) for other in PLACES if other != place
        ]  # fmt: skip

        def missing(one: str, other: str, hops: list[frozenset[str]] = hops) -> int:
            passed = sum(hop in hops for hop in map(frozenset, pairwise(path(topology, one, other))))
            return sum(any(rng.random() < loss for _ in range(2 * passed)) for _ in range(20))

        results = {(one, other): missing(one, other) for one in PLACES for other in PLACES if one != other}
        live = counted(topology, partial(lambda results, *pair: results.get(pair, 0), results), silent)
        subjects = {subject for subject, _ in told(topology, live)}
        assert list(limited(lossy(topology, live))) == []
        explained = partial(across, topology, pairs=lossy(topology, live).heavy)
        # Where nearly nothing arrives, that may be said of some pairs.
        subjects |= {error.subject for error in losses(topology, live, explained=explained)}
        if not subjects or not all({*place.split(" - ")} <= {*subject.split(" - ")} for subject in subjects):
            wrong.append(subjects)
    assert len(wrong) <= 1, wrong


@pytest.mark.parametrize("answered", [1, 8])
def test_a_host_that_limits_echo_requests_loses_no_packets(answered: int) -> None:
    topology = mesh()
    live = counted(topology, lambda one, other: 20 - answered if other == "a3" else 0)
    assert told(topology, live) == []
    (note,) = limited(lossy(topology, live))
    assert (note.subject, note.text) == (
        "a3", "it leaves echo requests of a1, a2, b1, b2, c1 unanswered, whose number its firewall limits"
    )  # fmt: skip
    # It has tried one other host only, as in a large mesh.
    alone = evolve(live.answers["a3"], echoes=live.answers["a3"].echoes[:1])
    assert told(topology, Live(answers={**live.answers, "a3": alone})) == []


def test_where_every_firewall_limits_echo_requests_no_lost_one_is_an_error() -> None:
    topology, rng = mesh(), random.Random("limits")
    missing = {(one, other): rng.choice((3, 12, 20)) for one in PLACES for other in PLACES}
    live = counted(topology, lambda one, other: missing[one, other])
    limits = Live(answers={name: evolve(answer, limits_echoes=True) for name, answer in live.answers.items()})
    assert list(unsteady(topology, lossy(topology, live))) != []
    assert (told(topology, limits), losses(topology, limits)) == ([], ())
    assert [note.subject for note in limited(lossy(topology, limits))] == sorted(PLACES)
    # One that answers nobody is named all the same.
    alone = counted(topology, lambda one, other: 20 * ("a3" in (one, other)))
    limits = Live(answers={name: evolve(answer, limits_echoes=True) for name, answer in alone.answers.items()})
    assert [loss.subject for loss in losses(topology, limits)] == ["a3"]


def test_a_leader_that_forwards_nothing_is_named_as_before_though_some_packets_get_lost_too() -> None:
    topology = mesh()
    nothing = behind("a1")
    live = counted(topology, lambda one, other: 20 if nothing(one, other) else 3)
    (loss,) = losses(
        topology, live, explained=lambda one, other: across(topology, one, other, lossy(topology, live).heavy)
    )
    assert loss.subject == "a1"
    assert loss.text.startswith(NOTHING)


def test_the_remedy_pings_the_address_of_the_family_that_is_lost() -> None:
    topology = mesh()
    nodes = {
        name: evolve(node, mesh_addresses=(*node.mesh_addresses, ip_address(f"fd00::{number}")))
        for number, (name, node) in enumerate(topology.snapshot.nodes.items(), 1)
    }
    both = build_topology(evolve(topology.snapshot, nodes=nodes))
    four, six = (str(address) for address in nodes["a3"].mesh_addresses)
    answer = DiagnosticsResponse(echoes=(EchoCount(four, 20, 20), EchoCount(six, 20, 9)))
    (loss,) = unsteady(both, lossy(both, Live(answers={"a2": answer})))
    assert loss.remedy.startswith(f"`ping -c 100 -i 0.1 {six}` on a2 shows how many")


@pytest.mark.parametrize("host", ["a1", "a2", "c1"])
@pytest.mark.parametrize(("mtu", "wanted", "least"), [(700, "more", 620), (9000, "less", 1420)])
def test_a_device_with_another_mtu_is_named_wherever_it_is(host: str, mtu: int, wanted: str, least: int) -> None:
    topology = mesh()
    (loss,) = narrow(topology, sized(topology, {host: mtu}))
    assert loss.subject == host
    assert loss.remedy == (
        f"the MTU of eth0 on {host} is {mtu} bytes, and that of other hosts' devices 1500: if its network carries "
        f"{wanted}, ip link set dev eth0 mtu 1500 there, and in the configuration of its interfaces; if not, give all "
        f"hosts {least} as --mtu (KILO_MTU) and restart the agents"
    )


def sized(topology: Topology, mtus: Mapping[str, int], carried: Mapping[str, int] = MappingProxyType({})) -> Live:
    """The answers if the hosts' devices have these MTUs (1500 if none is given), and their networks carry so many bytes
    (as many as the device if none is given)."""
    addresses = {name: str(node.mesh_addresses[0]) for name, node in topology.snapshot.nodes.items()}

    def passes(one: str, other: str) -> bool:
        return all(
            mtus.get(one, 1500) <= min(mtus.get(name, 1500), carried.get(name, 9000))
            for name in path(topology, one, other)
        )

    return Live(answers={
        name: evolve(
            answer, mtu=mtus.get(name, 1500) - 80, uplink="eth0", uplink_mtu=mtus.get(name, 1500),
            small_only=tuple(addresses[other] for other in PLACES if other != name and not passes(name, other)),
        )
        for name, answer in asked(topology, lambda one, other: False).answers.items()
    })  # fmt: skip


@pytest.mark.parametrize("host", ["a2", "c1"])
def test_a_device_that_is_too_small_for_ipv6_is_named(host: str) -> None:
    """Its tunnel keeps the 1280 bytes that IPv6 demands, and these do not pass."""
    topology = mesh()
    live = sized(topology, {host: 1200})
    sent = evolve(live.answers[host], mtu=1280, small_only=live.answers[host].reached)
    (loss,) = narrow(topology, Live(answers={**live.answers, host: sent}))
    assert host in loss.subject
    assert loss.remedy == (
        f"the MTU of eth0 on {host} is 1200 bytes, and that of other hosts' devices 1500: if its network carries more, "
        "ip link set dev eth0 mtu 1500 there, and in the configuration of its interfaces; if not, it carries no mesh "
        "with IPv6 addresses, which needs 1340 bytes or more"
    )


def test_where_nothing_comes_back_while_requests_are_counted_nothing_is_said_of_large_ones() -> None:
    topology = mesh()
    live = asked(topology, lambda one, other: False)
    six = str(topology.snapshot.nodes["c1"].mesh_addresses[0])
    answer = evolve(live.answers["b1"], mtu=1420, echoes=(EchoCount(six, 20, 0),), small_only=(six,))
    assert list(narrow(topology, Live(answers={**live.answers, "b1": answer}))) == []


def test_a_network_that_carries_less_than_the_device_is_measured() -> None:
    topology = mesh()
    # A host with PPPoE, whose packets are lost although they are smaller than others'.
    (loss,) = narrow(topology, sized(topology, {"c1": 1492}, {"c1": 1350}))
    assert loss.subject == "c1"
    assert loss.remedy.startswith("the way carries less")


def test_the_size_that_passes_is_the_mtu_to_set() -> None:
    topology = mesh()
    addresses = {name: str(node.mesh_addresses[0]) for name, node in topology.snapshot.nodes.items()}

    def said(*sizes: tuple[str, str, int], nodes: Topology = topology) -> list[tuple[str, str]]:
        answers = {
            sender: DiagnosticsResponse(
                mtu=1420,
                small_only=tuple(addresses[target] for one, target, _ in sizes if one == sender),
                largest=tuple(EchoSize(addresses[target], size) for one, target, size in sizes if one == sender),
            )
            for sender in {one for one, *_ in sizes}
        }
        return [(loss.text, loss.remedy) for loss in narrow(nodes, Live(answers=answers))]

    ((text, remedy),) = said(("b1", "c1", 1340), ("c1", "b1", 1300))
    assert text.endswith("and none of 1420 bytes does (with don't-fragment, up to 1300 bytes pass)")
    assert remedy.startswith(
        "give both ends 1300 as --mtu (KILO_MTU) and restart the agents; or let large UDP packets "
    )
    for nonsense in (575, 1420, 10**30):
        ((text, remedy),) = said(("b1", "c1", nonsense))
        assert text.endswith("and none of 1420 bytes does"), nonsense
        assert remedy.startswith("the way carries less")
    ((text, remedy),) = said(("b1", "c1", 1340), ("a1", "c1", 1310), ("b2", "c1", 108))
    assert text.endswith("up to 1310 bytes pass)"), "what a tunnel could not have as its MTU is left out"
    ((text, remedy),) = said(("b1", "c1", 1340), ("a1", "c1", 1310))
    assert remedy.startswith("give c1, a1, b1 1310 as --mtu")
    nodes = topology.snapshot.nodes
    both = evolve(nodes["c1"], mesh_addresses=(*nodes["c1"].mesh_addresses, ip_address("fd00::6")))
    six = build_topology(evolve(topology.snapshot, nodes={**nodes, "c1": both}))
    ((_, remedy),) = said(("b1", "c1", 1200), nodes=six)
    assert remedy.startswith(
        "1200 is less than 1280, which the mesh's IPv6 needs: the way has to carry 1360 bytes; let "
    )


@pytest.mark.parametrize(
    ("endpoint", "told", "overhead"),
    [
        ("203.0.113.6:51820", "less than 1480 bytes: ", "60)"),
        ("[2001:db8::6]:51820", "less than 1500 bytes: ", "80)"),
        ("", "less than their tunnels take it to: ", "60 in IPv4, less 80 in IPv6)"),
    ],
)
def test_the_mtu_to_set_follows_from_what_a_ping_through_the_tunnel_finds(
    endpoint: str, told: str, overhead: str
) -> None:
    topology = mesh()
    answer = DiagnosticsResponse(mtu=1420, small_only=("10.4.0.6",), tunnels=(Tunnel("c1", 3, 1, 1, endpoint),))
    (loss,) = narrow(topology, Live(answers={"b1": answer}))
    assert loss.remedy.startswith(
        f"the way carries {told}find on b1 the largest N for which `ping -M do -s N 10.4.0.6` is answered, give both "
        f"ends N + 28 as --mtu (KILO_MTU) and restart the agents (if you know the path MTU: that less {overhead}; "
    )
    nodes = topology.snapshot.nodes
    both = evolve(nodes["c1"], mesh_addresses=(*nodes["c1"].mesh_addresses, ip_address("fd00::6")))
    six = build_topology(evolve(topology.snapshot, nodes={**nodes, "c1": both}))
    (loss,) = narrow(six, Live(answers={"b1": answer}))
    least = "1340" if "1480" in told else "1360"
    assert f"(not under 1280, which the mesh's IPv6 needs: the way has to carry {least} bytes)" in loss.remedy
