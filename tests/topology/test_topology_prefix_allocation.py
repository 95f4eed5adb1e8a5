"""Who gets a network that several offer: the same on every host, whatever the way there, and each refusal named."""

from __future__ import annotations

from functools import partial
from ipaddress import ip_address, ip_network
from itertools import combinations

import pytest
from attrs import evolve
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import examples
from kilo_etcd.model import IPNetwork, Peer, Snapshot
from kilo_etcd.topology.prefix_allocation import NetworkOwner, NetworkRequest, PrefixAllocation, allocate
from kilo_etcd.topology.segments import build_topology
from topology_worlds import MESH, node, peer, plans, snapshot

A = node("a", 1, "gcp", "10.0.0.1/24", "203.0.113.1")
B = node("b", 2, "aws", "10.0.1.1/24", "203.0.113.2")
C = node("c", 3, "home", "10.0.2.1/24", "203.0.113.3")


def nets(text: str) -> tuple[IPNetwork, ...]:
    return tuple(map(ip_network, text.split()))


def world(
    subnets: tuple[str, str] = ("", ""), location_ips: tuple[str, str] = ("", ""), peers: tuple[Peer, ...] = ()
) -> Snapshot:
    """What a and b offer, beside c's own network; a registered first."""
    offering = [
        evolve(one, subnets=nets(subnets[i]), allowed_location_ips=nets(location_ips[i]))
        for i, one in enumerate((A, B))
    ]
    return snapshot([*offering, evolve(C, subnets=nets("172.30.0.0/24"))], peers=peers)


FIRST = "which comes first; take it out of one of the two"
PEER = (peer("laptop", "172.20.0.0/16"),)


@pytest.mark.parametrize(
    ("offered", "problem"),
    [
        (world(("172.20.1.0/24", "172.20.0.0/16")),
         f"172.20.0.0/16 of node b is left out: it overlaps 172.20.1.0/24 of node a, {FIRST}"),
        (world(("172.20.0.0/16", "172.20.1.0/24")),
         f"172.20.1.0/24 of node b is left out: it overlaps 172.20.0.0/16 of node a, {FIRST}"),
        (world(("172.20.0.0/16", "172.20.0.0/16")),
         f"172.20.0.0/16 of node b is left out: it overlaps 172.20.0.0/16 of node a, {FIRST}"),
        (world(("172.20.0.0/16", ""), ("", "172.20.1.5/32")),
         f"172.20.1.5/32 of node b (allowed-location-ips) is left out: it overlaps 172.20.0.0/16 of node a, {FIRST}"),
        (world(("", "172.20.1.0/24"), ("172.20.1.5/32", "")),
         "172.20.1.0/24 of node b is left out: "
         f"it overlaps 172.20.1.5/32 of node a (allowed-location-ips), {FIRST}"),
        (world(("", ""), ("172.20.1.0/24", "172.20.1.5/32")),
         "172.20.1.5/32 of node b (allowed-location-ips) is left out: "
         f"it overlaps 172.20.1.0/24 of node a (allowed-location-ips), {FIRST}"),
        (world(("", "172.20.1.0/24"), peers=PEER),
         f"172.20.0.0/16 of peer laptop is left out: it overlaps 172.20.1.0/24 of node b, {FIRST}"),
        (world(("", ""), ("", "172.20.1.5/32"), PEER),
         "172.20.0.0/16 of peer laptop is left out: "
         f"it overlaps 172.20.1.5/32 of node b (allowed-location-ips), {FIRST}"),
        (world(("10.0.0.0/8", "")),
         "10.0.0.0/8 of node a is left out: it covers the mesh's own subnet; offer smaller networks"),
        (world(("10.4.0.0/24", "")),
         "10.4.0.0/24 of node a is left out: "
         "it holds the mesh address of a node; choose one outside the mesh's subnet"),
        (world(("0.0.0.0/0", "")),
         "0.0.0.0/0 of node a is left out: a default route is never taken into the mesh; offer smaller networks"),
        (world(("", ""), ("", "::/0")),
         "::/0 of node b (allowed-location-ips) is left out: "
         "a default route is never taken into the mesh; offer smaller networks"),
    ],
)  # fmt: skip
def test_an_overlap_is_settled_alike_on_every_host_and_named(offered: Snapshot, problem: str) -> None:
    network = ip_network(problem.split()[0])
    holder = ip_network(problem.partition("it overlaps ")[2].split()[0]) if "it overlaps" in problem else None
    for host, plan in plans(offered).items():
        assert [found.text for found in plan.problems] == [problem], host
        holders = {p.name: p.allowed_ips for p in plan.peers.values() if network in p.allowed_ips}
        assert network == holder or (not holders and network not in plan.routes), host
        assert len(holders) <= 1
        if holder is not None and host == "c":
            assert holder in plan.routes
        # Others' networks are not touched by it.
        assert host == "c" or ip_network("172.30.0.0/24") in plan.routes


def test_a_node_that_offers_everything_takes_nothing_from_others() -> None:
    greedy = evolve(A, subnets=nets("0.0.0.0/0 ::/0 10.0.0.0/8 172.21.0.0/16"))
    topology = build_topology(snapshot([greedy, evolve(B, subnets=nets("172.20.1.0/24 10.7.0.0/24"))]))
    assert topology.allocation(("node", "a")) == nets("172.21.0.0/16")
    assert topology.allocation(("node", "b")) == nets("10.7.0.0/24 172.20.1.0/24")


# -- any offers, any way there --------------------------------------------------------------------------------

NETWORKS = [
    *("0.0.0.0/0", "10.0.0.0/8", "10.4.0.0/16", "10.4.0.0/28", "10.4.9.0/24", "10.4.9.64/26", "127.0.0.0/8"),
    *(
        f"172.{second}.0.0/{length}"
        for second in (16, 17, 18)
        for length in (12, 16, 24)
        if length > 12 or second == 16
    ),
    *(f"172.16.{third}.0/{length}" for third in (0, 1) for length in (23, 24, 25) if length > 23 or not third),
    *("::/0", "fd00::/16", "fd00:1::/64", "fd00:1::7/128"),
]
owners = st.sampled_from([("node", "a"), ("node", "b"), ("location", "x"), ("location", "y"), ("peer", "p")])
offers = st.builds(
    lambda owner, number, networks: NetworkRequest(
        (int(owner[0] == "peer"), number, str(number)), f"{owner} {number}", tuple(map(ip_network, networks))
    ),
    owners,
    st.integers(1, 6),
    st.lists(st.sampled_from(NETWORKS), min_size=1, max_size=3),
)
changes = st.dictionaries(owners, st.lists(offers, max_size=2).map(tuple), max_size=5)
addresses = st.lists(st.sampled_from(["10.4.0.3", "10.4.9.70", "10.4.9.1"]), max_size=2)


def by_hand(
    requests: dict[NetworkOwner, tuple[NetworkRequest, ...]], taken: list[str]
) -> dict[NetworkOwner, set[IPNetwork]]:
    """The rule, one network after the other, each compared with all."""
    asked = sorted(
        (request.priority, owner, network.prefixlen, int(network.network_address), network.version, network)
        for owner, offered in requests.items()
        for request in offered
        for network in request.networks
    )
    granted: list[tuple[NetworkOwner, IPNetwork]] = []
    for _, owner, length, _, version, network in asked:
        near = [(who, n) for who, n in granted if n.version == version and n.overlaps(network)]
        own = any(who == owner and n.prefixlen <= length for who, n in near)
        void = not length or network in nets("10.0.0.0/8 10.4.0.0/16 127.0.0.0/8")
        held = version == 4 and network.overlaps(MESH) and any(ip_address(address) in network for address in taken)
        if not (own or void or held) and all(who == owner for who, _ in near):
            granted = [(who, n) for who, n in granted if (who, n) not in near] + [(owner, network)]
    return {owner: {n for who, n in granted if who == owner} for owner, offered in requests.items() if offered}


@settings(max_examples=examples(200), deadline=None)
@given(st.lists(st.tuples(changes, addresses), min_size=1, max_size=5))
def test_granted_networks_are_disjoint_and_do_not_depend_on_the_way_there(
    steps: list[tuple[dict[NetworkOwner, tuple[NetworkRequest, ...]], list[str]]],
) -> None:
    allocation = PrefixAllocation((MESH,))
    requests: dict[NetworkOwner, tuple[NetworkRequest, ...]] = {}
    for change, taken in steps:
        requests.update(change)
        mine = list(map(ip_address, taken))
        allocation = allocate(allocation, change, partial(list, mine))
        offering = {owner: offered for owner, offered in requests.items() if offered}
        backwards = allocate(PrefixAllocation((MESH,)), dict(reversed(offering.items())), partial(list, mine))
        assert allocation == backwards
        assert allocation.versions == backwards.versions
        assert {owner: set(networks) for owner, networks in allocation.granted.items()} == by_hand(offering, taken)
        every = [(owner, network) for owner, networks in allocation.granted.items() for network in networks]
        for (owner, one), (_, other) in combinations(every, 2):
            assert one.version != other.version or not one.overlaps(other)
            assert allocation.offered_by(one), owner
        refused = {network for offered in offering.values() for request in offered for network in request.networks} - {
            network for _, network in every
        }
        covered = {network for network in refused for _, wide in every if network.version == wide.version
                   and network.overlaps(wide)}  # fmt: skip
        named = {ip_network(problem.subject) for problem in allocation.problems}
        assert refused - covered <= named, "what is left out is named"


def test_of_two_peers_the_older_one_gets_the_network_and_keeps_the_key() -> None:
    old = peer("old", "172.20.0.0/16", registered_revision=4)
    young = peer("a-young-one", "172.20.1.0/24", registered_revision=9)
    topology = build_topology(world(peers=(old, young)))
    assert topology.peers["old"].allowed_ips == old.allowed_ips
    assert topology.peers["a-young-one"].allowed_ips == ()
    # Not from a view, which lets only one of them through.
    topology = build_topology(world(peers=(old, evolve(young, public_key=old.public_key))))
    assert set(topology.peers) == {"old"}
    assert [problem.text for problem in topology.problems] == [
        "peer a-young-one is left out: it has the public key of peer old; give it its own"
    ]
