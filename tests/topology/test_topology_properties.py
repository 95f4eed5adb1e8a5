"""What holds in any snapshot: everyone reaches everyone, nothing crosses locations in clear, and the quick way of
computing a change gives what computing everything gives."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from ipaddress import ip_address, ip_interface, ip_network
from itertools import permutations
from typing import Any

from attrs import evolve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

from helpers import examples
from kilo_etcd.base.mappings import changes
from kilo_etcd.model import (
    Candidate,
    CandidateClass,
    Encapsulate,
    EncryptionStage,
    Endpoint,
    Granularity,
    InternalIPs,
    IPNetwork,
    Node,
    Peer,
    ProbeReport,
    Snapshot,
    is_public,
)
from kilo_etcd.model.hostplan import HostPlan, Via
from kilo_etcd.planning.encryption import Living, Outside, awaited, encrypt, waited_for
from kilo_etcd.planning.exit_node import with_exit_node
from kilo_etcd.planning.peerplan import peer_plan
from kilo_etcd.planning.plan import host_plan
from kilo_etcd.planning.render import render
from kilo_etcd.planning.route_filter import filter_routes
from kilo_etcd.planning.walk import walk, walk_both
from kilo_etcd.topology.graph import edges, graph
from kilo_etcd.topology.inclear import back_in_clear, in_clear
from kilo_etcd.topology.next_hop import NextHop as Way
from kilo_etcd.topology.next_hop import next_hop as way_to
from kilo_etcd.topology.places import Places, exchanged
from kilo_etcd.topology.prefix_allocation import network_key
from kilo_etcd.topology.segments import Topology, build_topology, host_network, routed_at
from topology_worlds import MESH, MESH6, node, snapshot

QUICK = settings(max_examples=examples(25), deadline=None, suppress_health_check=[HealthCheck.too_slow])
LABELS = ("", "a", "b", "self")
OVERLAPPING = [
    *("10.4.0.0/30", "10.4.9.0/24", "10.0.0.0/8", "172.16.0.0/16", "172.16.1.0/24", "172.17.0.0/24"),
    *("0.0.0.0/0", "fd00:9::/64", "203.0.113.0/29"),
]


def a_links(draw: DrawFn, *, tame: bool) -> tuple[IPNetwork, ...] | None:
    """What a host reaches over its own links beside the networks of its internal IPs; None: its agent is older."""
    if not tame and draw(st.integers(0, 9)) == 0:
        return None
    near = ["10.101.0.0/16", "10.102.0.3/32", "10.103.0.0/30", "192.168.1.0/24", "fd00:a1::/64", "10.100.0.0/14"]
    return tuple(map(ip_network, draw(st.lists(st.sampled_from(near), max_size=2)) if draw(st.booleans()) else ()))


def a_node(
    draw: DrawFn,
    number: int,
    *,
    tame: bool,
    alike: Collection[str] | None = None,
    at_site: bool = False,
    any_mode: bool = False,
) -> Node:
    """Node `number`; at the locations `alike` networks have the same numbers. Tame: nothing that legitimately keeps
    others from reaching it, but for `any_mode` of encapsulation. `at_site`: at one of two locations, with an internal
    IP, in any mode."""
    name = f"n{number}"
    location = draw(st.sampled_from(("a", "b") if at_site else LABELS))
    families = draw(st.sampled_from([(4,), (4, 6)] if at_site else [(), (4,), (6,), (4, 6)]))
    far = draw(st.booleans())
    # Sites have networks of their own, or the one that every home has, where hosts may even have one address.
    site = 20 + number if location == "self" else LABELS.index(location)
    common = draw(st.booleans()) if alike is None else location in alike
    host = 77 if common and location == "self" else number + 1
    internal = {
        4: f"192.168.{int(far)}.{host}/24" if common else f"10.{100 + site}.{int(far)}.{host}/24",
        6: f"fd00:a{0 if common else site}::{host:x}/64",
    }
    modes = [mode for mode in Encapsulate if not tame or at_site or any_mode or mode is not Encapsulate.NEVER]
    subnets: tuple[str, ...] = (f"172.30.{number}.0/24",) if draw(st.booleans()) else ()
    networks: list[str] = [] if tame else draw(st.lists(st.sampled_from(OVERLAPPING), max_size=2))
    endpoint: Endpoint | None = Endpoint(ip_address(f"203.0.113.{number}"), 51820)
    seen: tuple[Endpoint, ...] = ()
    if 4 in families and draw(st.integers(0, 3)) == 0:
        endpoint = Endpoint(ip_interface(internal[4]).ip, 51820)
        seen = (Endpoint(ip_address(f"203.0.114.{number}"), 1024),) if draw(st.booleans()) else ()
    if not tame and draw(st.integers(0, 3)) == 0:
        endpoint = None
    return Node(
        name=name,
        public_key=f"key-{draw(st.integers(0, 1)) if not tame else 0}-{number}",
        location=name if location == "self" else location,
        endpoint=endpoint,
        internal_ips=tuple(ip_interface(internal[family]) for family in families),
        underlay=a_links(draw, tame=tame),
        observed_endpoints=seen,
        mesh_addresses=(ip_address(f"10.4.0.{number + 1}"), ip_address(f"fd00:4::{number + 1:x}")),
        subnets=tuple(map(ip_network, (*subnets, *networks))),
        allowed_location_ips=(ip_network(f"172.31.{number}.0/24"),) if draw(st.booleans()) else (),
        persistent_keepalive=draw(st.sampled_from([0, 25])),
        leader_wanted=draw(st.booleans()),
        encapsulate=draw(st.sampled_from(modes)),
        registered_revision=draw(st.integers(1, 20)),
        **({} if tame else a_stage(draw)),
    )


def a_stage(draw: DrawFn) -> dict[str, Any]:
    """How far a node is with the switch to `encrypted`: most are through."""
    stage = draw(st.sampled_from([EncryptionStage.SENDS] * 4 + [None, *EncryptionStage]))
    return {"encryption": stage, "accepts_since": draw(st.integers(0, 9))}


def elections(draw: DrawFn, nodes: dict[str, Node]) -> dict[str, Any]:
    candidates: dict[str, tuple[Candidate, ...]] = {}
    for name in draw(st.lists(st.sampled_from([*nodes, "stranger"]), unique=True)):
        location = nodes[name].location if name in nodes else ""
        rank, revision = draw(st.sampled_from(CandidateClass)), draw(st.integers(1, 50))
        candidates[location] = (
            *candidates.get(location, ()),
            Candidate(node=name, rank=rank, create_revision=revision),
        )
    leaders = draw(st.dictionaries(st.sampled_from(LABELS[:3]), st.sampled_from([*nodes, "stranger"]), max_size=2))
    probe_reports: dict[str, tuple[ProbeReport, ...]] = {}
    for location, candidates_of in candidates.items():
        found = []
        for prober in draw(st.lists(st.sampled_from([*nodes, "stranger"]), unique=True, max_size=4)):
            reports_on = draw(st.sampled_from(candidates_of))
            answers, members_reachable, can_take_over, unconfirmed = draw(st.tuples(*[st.booleans()] * 4))
            found.append(
                ProbeReport(
                    prober=prober, leader=reports_on.node, candidacy=reports_on.create_revision,
                    leader_reachable=answers, members_reachable=members_reachable, can_take_over=can_take_over,
                    unconfirmed=unconfirmed,
                )
            )  # fmt: skip
        if found:
            probe_reports[location] = tuple(found)
    return {"candidates": candidates, "leaders": leaders, "probe_reports": probe_reports}


def outside(draw: DrawFn, *, tame: bool) -> dict[str, Peer]:
    peers = {}
    for number in range(draw(st.integers(0, 2))):
        networks = () if tame else draw(st.lists(st.sampled_from(OVERLAPPING), max_size=2))
        key = f"key-peer-{number}" if tame else draw(st.sampled_from([f"key-peer-{number}", "key-0-0", "key-peer-0"]))
        allowed = tuple(map(ip_network, (f"10.99.0.{number}/32", *networks)))
        peers[f"p{number}"] = Peer(name=f"p{number}", public_key=key, allowed_ips=allowed, persistent_keepalive=7)
    return peers


@st.composite
def worlds(draw: DrawFn, *, tame: bool = True) -> Snapshot:
    alike = draw(st.sets(st.sampled_from(LABELS)))
    nodes = {f"n{n}": a_node(draw, n, tame=tame, alike=alike) for n in range(draw(st.integers(1, 7)))}
    subnets = draw(st.sampled_from([(MESH,), (MESH6,), (MESH, MESH6)]))
    versions = {subnet.version for subnet in subnets}
    nodes = {
        name: evolve(node, mesh_addresses=tuple(a for a in node.mesh_addresses if a.version in versions))
        for name, node in nodes.items()
    }
    return Snapshot(
        revision=draw(st.integers(1, 1000)),
        granularity=draw(st.sampled_from(Granularity)),
        subnets=subnets,
        internal_ips=draw(st.sampled_from(InternalIPs)),
        nodes=nodes,
        peers=outside(draw, tame=tame),
        **elections(draw, nodes),
    )


@st.composite
def sites(draw: DrawFn) -> Snapshot:
    """Two sites of several hosts in any modes, with networks of their own, whose internal IPs are routed."""
    nodes = {f"n{n}": a_node(draw, n, tame=True, alike=(), at_site=True) for n in range(draw(st.integers(3, 6)))}
    return Snapshot(
        revision=1,
        subnets=(MESH, MESH6),
        internal_ips=InternalIPs.ROUTED,
        nodes=nodes,
        **elections(draw, nodes),
    )


@st.composite
def with_old_agents(draw: DrawFn) -> Snapshot:
    """A mesh that encrypts, and nodes whose agents do not know the setting."""
    world = draw(worlds() | sites())
    old = draw(st.sets(st.sampled_from([*world.nodes]), max_size=2))
    nodes = {
        name: evolve(node, underlay=None) if name in old else evolve(node, encryption=EncryptionStage.SENDS)
        for name, node in world.nodes.items()
    }
    return evolve(world, internal_ips=InternalIPs.ENCRYPTED, nodes=nodes)


@st.composite
def mixed(draw: DrawFn, *, any_mode: bool = True) -> Snapshot:
    """Labels and granularities of any kind, NATs, outside peers, and exit nodes that some use; internal IPs are
    routed."""
    alike = draw(st.sets(st.sampled_from(LABELS)))
    nodes = {
        f"n{n}": a_node(draw, n, tame=True, alike=alike, any_mode=any_mode) for n in range(draw(st.integers(2, 7)))
    }
    exits = draw(st.sets(st.sampled_from(sorted(nodes)), max_size=2))
    users = draw(st.sets(st.sampled_from(sorted(nodes)))) - exits if exits else set()
    nodes = {
        name: evolve(
            node,
            advertises_exit_node=name in exits,
            exit_node=draw(st.sampled_from(sorted(exits))) if name in users else "",
        )
        for name, node in nodes.items()
    }
    return Snapshot(
        revision=1,
        granularity=draw(st.sampled_from(Granularity)),
        subnets=(MESH, MESH6),
        internal_ips=InternalIPs.ROUTED,
        nodes=nodes,
        peers=outside(draw, tame=True),
        **elections(draw, nodes),
    )


@st.composite
def histories(draw: DrawFn) -> list[Snapshot]:
    """A snapshot and what becomes of it, step by step; what does not change stays the same object."""
    world = draw(worlds(tame=False))
    snapshots = [world]
    for _ in range(draw(st.integers(1, 5))):
        step = draw(
            st.sampled_from(["node", "node", "node", "go", "candidates", "peers", "granularity", "internal", "nothing"])
        )
        number = draw(st.integers(0, 8))
        if step == "node":
            world = evolve(world, nodes={**world.nodes, f"n{number}": a_node(draw, number, tame=False)})
        elif step == "go":
            world = evolve(world, nodes={name: n for name, n in world.nodes.items() if name != f"n{number}"})
        elif step == "candidates":
            world = evolve(world, **elections(draw, dict(world.nodes)))
        elif step == "peers":
            world = evolve(world, peers=outside(draw, tame=False))
        elif step == "granularity":
            world = evolve(world, granularity=draw(st.sampled_from(Granularity)))
        elif step == "internal":
            world = evolve(world, internal_ips=draw(st.sampled_from(InternalIPs)))
        world = evolve(world, revision=world.revision + 1)
        snapshots.append(world)
    return snapshots


@st.composite
def around_a_host(draw: DrawFn) -> tuple[Living, dict[str, Any]]:
    """Who lives, and what a host knows of its own addresses."""
    names = st.sampled_from([f"n{n}" for n in range(9)])
    asked = draw(st.frozensets(names)) if draw(st.booleans()) else frozenset(f"n{n}" for n in range(9))
    applied = draw(st.dictionaries(names, st.integers(0, 2000)))
    addresses = draw(st.sampled_from([frozenset(), frozenset({ip_address("192.168.1.77")})]))
    return Living(asked=asked, applied=applied), {"addresses": addresses}


def all_plans(topology: Topology) -> dict[str, HostPlan]:
    return {name: with_exit_node(host_plan(topology, name), topology, bypass=()) for name in topology.snapshot.nodes}


def can_carry(world: Snapshot, name: str, version: int) -> bool:
    """IPv6 does not travel over an IPv4 underlay: a location with nodes that have nothing else is excused."""
    if version == 4 or world.granularity is Granularity.FULL:
        return True
    here = [node for node in world.nodes.values() if node.location == world.nodes[name].location]
    return not any(node.internal_ips and node.internal_ip(6) is None for node in here)


def pairs(world: Snapshot) -> Iterator[tuple[str, str, int]]:
    for one, other in permutations(world.nodes, 2):
        for subnet in world.subnets:
            if can_carry(world, one, subnet.version) and can_carry(world, other, subnet.version):
                yield one, other, subnet.version


@settings(QUICK, max_examples=examples(50))
@given(worlds() | mixed(any_mode=False))
def test_everyone_reaches_everyone_and_nothing_crosses_locations_in_clear(world: Snapshot) -> None:
    topology = build_topology(world)
    plans = all_plans(topology)
    for one, other, version in pairs(world):
        for path in walk_both(plans, topology, one, other, version):
            assert path.delivered, (str(path), [render(plan) for plan in plans.values()])
            for hop in path.hops:
                source, target = world.nodes[hop.source], world.nodes[hop.target]
                local = source.location == target.location and source.internal_ips and target.internal_ips
                assert hop.encrypted or local, str(path)
            if world.granularity is Granularity.FULL:
                assert [hop.medium for hop in path.hops] == [Via.TUNNEL]


@settings(QUICK, max_examples=examples(90))
@given(worlds() | sites() | mixed() | with_old_agents())
def test_every_internal_ip_that_is_routed_is_reached_and_answers(world: Snapshot) -> None:
    topology = build_topology(world)
    plans = all_plans(topology)
    for one, other in permutations(world.nodes, 2):
        here, there = topology.segment_of(one), topology.segment_of(other)
        if here is there:
            continue
        for ip in world.nodes[other].internal_ips:
            route = plans[one].routes.get(host_network(ip.ip))
            if world.nodes[one].underlay is None or not routed_at(ip.ip, there, here, topology.policy):
                # An agent that does not know the setting routes none.
                assert route is None or host_network(ip.ip) in there.networks
                continue
            out = way_to(world.nodes[one], here.leader, ip.version) if one != here.leader.name else True
            if route is None:
                lone = world.nodes[one].mesh_address(ip.version) is None
                assert out is None or lone or (isinstance(out, Way) and out.trouble), (one, other, ip)
                continue
            path = walk(plans, topology, one, ip.ip)
            assert path.delivered, str(path)
            assert path.hops[-1].target == other
            assert path.source == route.source
            assert path.source is not None
            own = any(path.source == mine.ip for mine in world.nodes[one].internal_ips)
            if not own and here.leader.encapsulate is Encapsulate.NEVER:
                continue  # Its members on other subnets it does not reach, and says so.
            answer = walk(plans, topology, other, path.source, sender=ip.ip)
            assert answer.delivered, (str(path), path.source, str(answer))
            assert answer.hops[-1].target == one
            if own:
                # A strict check of the reverse path takes no answer by another way.
                assert [(step.target, step.source, step.medium) for step in reversed(answer.hops)] == [
                    (step.source, step.target, step.medium) for step in path.hops
                ], (str(path), str(answer))
            for hops in (path.hops, answer.hops):
                for step in hops:
                    same = topology.segment_of(step.source) is topology.segment_of(step.target)
                    assert step.encrypted or same, (str(path), str(answer))


@settings(QUICK, max_examples=examples(60))
@given(worlds(tame=False) | worlds())
def test_two_nodes_encrypt_in_both_directions_or_in_none_and_what_is_in_clear_is_named(world: Snapshot) -> None:
    nodes = {
        name: evolve(node, underlay=node.underlay or (), encryption=EncryptionStage.SENDS)
        for name, node in world.nodes.items()
    }
    world = evolve(world, nodes=nodes, internal_ips=InternalIPs.ENCRYPTED)
    topology = build_topology(world)
    living = Living(asked=frozenset(nodes))
    wanted = {
        name: encrypt(host_plan(topology, name), topology, outside=Outside(), living=living).encryption
        for name in nodes
    }
    through: dict[str, set[IPNetwork]] = {}
    for name, encryption in wanted.items():
        assert encryption is not None
        through[name] = {*encryption.send, *encryption.hold}
        assert {host_network(address) for address in encryption.refuse} <= through[name], "who is refused is sent to"
    places, _ = Places().after(topology)
    named = {str(entry.network) for entry in topology.unrouted}
    clear = {(sender, host_network(entry.address)) for entry in in_clear(topology) for sender in entry.senders}
    for one, other in permutations(nodes, 2):
        here, there = topology.segment_of(one), topology.segment_of(other)
        if not exchanged(here, there, topology.policy):
            continue
        for address in places.of[there.key].of[other]:
            network = address.network
            assert (network in through[one]) is ((one, network) not in clear), (one, other, network)
        for version in (4, 6):
            ours, theirs = (
                {a.network for a in places.of[segment.key].of[name] if a.address.version == version}
                for segment, name in ((here, one), (there, other))
            )
            if ours and through[other] & ours and theirs and not through[one] & theirs:
                raise AssertionError((one, other, version))
            for network in theirs - through[one]:
                if here.links.hold(version, int(network.network_address)) and not ours & through[other]:
                    assert named & set(map(str, ours | theirs)), (one, other, network)


@settings(QUICK, max_examples=examples(60))
@given(worlds(tame=False) | worlds() | sites() | mixed())
def test_what_leaves_the_tunnels_after_encrypted_is_what_some_segment_does_not_route(world: Snapshot) -> None:
    nodes = {
        name: evolve(node, underlay=node.underlay or (), encryption=EncryptionStage.SENDS)
        for name, node in world.nodes.items()
    }
    old, routed = (
        build_topology(evolve(world, nodes=nodes, internal_ips=mode))
        for mode in (InternalIPs.ENCRYPTED, InternalIPs.ROUTED)
    )
    whole = {(one.segment.key, one.address) for one in in_clear(old) if len(one.senders) == len(one.segment.members)}
    carried, leaving = set(), set()
    for key, there in Places().after(old)[0].of.items():
        for other, here in old.segments.items():
            for address in (each.address for each in there.addresses):
                if (other, address) not in whole and exchanged(here, there.segment, old.policy):
                    carried.add(address)
                    if not routed_at(address, routed.segments[key], routed.segments[other], routed.policy):
                        leaving.add(address)
    assert back_in_clear(old, routed) == (leaving, carried - leaving)


@settings(QUICK, max_examples=examples(60))
@given(mixed())
def test_outside_peers_reach_every_internal_ip_that_is_routed(world: Snapshot) -> None:
    topology = build_topology(world)
    plans = all_plans(topology)
    by_key = {node.public_key: node.name for node in world.nodes.values()}
    for name, peer in world.peers.items():
        own = peer.allowed_ips[0].network_address
        plan = peer_plan(topology, name)
        for segment in topology.segments.values():
            for member in segment.members:
                for network in segment.routed.get(member.name, ()):
                    if (route := plan.routes.get(network)) is None:
                        assert network.version != own.version or any(
                            value.endpoint is not None and value.endpoint.address == network.network_address
                            for value in plan.peers.values()
                        )
                        continue
                    (key,) = (key for key, one in plan.peers.items() if network in one.allowed_ips)
                    assert (route.via, by_key[key]) == (Via.TUNNEL, segment.leader.name)
                    address = network.network_address
                    path = walk(plans, topology, segment.leader.name, address, sender=own)
                    end = path.hops[-1].target if path.hops else segment.leader.name
                    assert (path.delivered, end) == (True, member.name), str(path)
                    back = walk(plans, topology, member.name, own, sender=address)
                    assert back.hops[-1].target == f"peer {name}", str(back)
                    assert [step.source for step in back.hops[1:]] == [step.source for step in reversed(path.hops)]


@settings(QUICK, max_examples=examples(60))
@given(worlds() | mixed())
def test_no_internal_ip_is_taken_from_the_links_of_a_host(world: Snapshot) -> None:
    topology = build_topology(world)
    plans = all_plans(topology)
    by_key = {node.public_key: node for node in world.nodes.values()}
    for name, plan in plans.items():
        segment = topology.segment_of(name)
        links = [*segment.underlay, *(ip.network for node in segment.members for ip in node.internal_ips)]
        held = {ip.ip: node.name for node in world.nodes.values() for ip in node.internal_ips}
        for network in plan.routes:
            if network.network_address in held and network.num_addresses == 1 and topology.internal_families:
                assert not any(link.version == network.version and network.subnet_of(link) for link in links)  # type: ignore[arg-type]
        for key, peer in plan.peers.items():
            address = None if peer.endpoint is None else peer.endpoint.address
            if address is not None and not peer.observed:
                assert host_network(address) not in plan.routes, "WireGuard's own packets go into the tunnel"
                # Nor do they where the other's WireGuard is heard, which calls this one at its endpoint.
                caller, own = by_key[key], world.nodes[name]
                back = plans[caller.name].peers.get(own.public_key)
                called = None if back is None or back.endpoint is None or back.observed else back.endpoint.address
                if called is not None and not is_public(called) and (ip := caller.internal_ip(called.version)):
                    assert host_network(ip.ip) not in plan.routes, "nor where the caller is heard"


@QUICK
@given(worlds())
def test_what_is_behind_a_node_is_reached_and_can_answer(world: Snapshot) -> None:
    topology = build_topology(world)
    plans = all_plans(topology)
    for one, other, version in pairs(world):
        if version != 4:
            continue
        here = world.nodes[one].mesh_address(4)
        assert here is not None
        for subnet in world.nodes[other].subnets:
            behind = subnet[9]
            there = walk(plans, topology, one, behind)
            assert there.delivered, str(there)
            assert there.hops[-1].target == other
            back = walk(plans, topology, other, here, sender=behind)
            assert back.delivered, str(back)
        for printers in world.nodes[other].allowed_location_ips:
            if world.nodes[one].location != world.nodes[other].location:
                there = walk(plans, topology, one, printers[9])
                assert there.delivered, str(there)
                # It answers to whoever is next to it, and this host to whom it stands for.
                gateway = there.hops[-1].target
                assert gateway == topology.segment_of(other).leader.name
                assert [name for name, plan in plans.items() if printers in plan.masquerade] == [gateway]
        for peer in world.peers.values():
            path = walk(plans, topology, one, peer.allowed_ips[0].network_address)
            assert path.hops[-1].target == f"peer {peer.name}", str(path)


@QUICK
@given(worlds(tame=False))
def test_what_every_plan_keeps_to(world: Snapshot) -> None:
    topology = build_topology(world)
    for name, plan in all_plans(topology).items():
        allowed = [network for peer in plan.peers.values() for network in peer.allowed_ips]
        assert len(allowed) == len(set(allowed)), "no network stands in two peers"
        assert all(network.prefixlen for network in [*allowed, *plan.routes]), "no default route"
        assert world.nodes[name].public_key not in plan.peers
        for key, peer in plan.peers.items():
            assert key == peer.public_key
            assert list(peer.allowed_ips) == sorted(peer.allowed_ips, key=network_key)
        for destination, route in plan.routes.items():
            assert destination == route.destination
            assert (route.gateway is None) == (route.via is Via.TUNNEL)
            if route.via is Via.IPIP:
                assert route.gateway in plan.ipip_remotes
                assert plan.ipip_local is not None
        for other, other_plan in all_plans(topology).items():
            ours = {ip for ip in other_plan.ipip_remotes if ip == plan.ipip_local}
            same = world.nodes[name].location == world.nodes[other].location
            if ours and same and world.nodes[name].location == "":
                assert other_plan.ipip_local in plan.ipip_remotes, "IPIP is agreed on by both"


@settings(QUICK, max_examples=examples(40))
@given(histories(), st.lists(around_a_host(), min_size=1, max_size=3))
def test_the_difference_gives_what_the_whole_gives(
    history: list[Snapshot], words: list[tuple[Living, dict[str, Any]]]
) -> None:
    topology: Topology | None = None
    plans: dict[str, HostPlan] = {}
    filtered: dict[str, HostPlan] = {}
    encrypted: dict[str, HostPlan] = {}
    protected = [ip_network("172.17.0.8/32"), ip_network("fd00:9::1/128")]
    for step, world in enumerate(history):
        fresh = build_topology(world)
        topology = build_topology(world, topology)
        assert topology == fresh
        assert edges(topology) == edges(fresh)
        assert graph(topology) == graph(fresh)
        for name in world.nodes:
            expected = host_plan(fresh, name)
            # Whichever plan was last, guarded or not, and however long ago: some hosts skip a step.
            if (step + len(name) + ord(name[-1])) % 3 or name not in plans:
                last = filtered.get(name) if step % 2 else plans.get(name)
                plans[name] = host_plan(topology, name, last)
                assert plans[name] == expected
                result = filter_routes(plans[name], protected, filtered.get(name))
                assert result == filter_routes(expected, protected)
                filtered[name] = result
                # The last plan, if there is one, or that of another host.
                before = encrypted.get(name) or next(iter(encrypted.values()), None)
                last_word = words[(step + len(name)) % len(words)]
                around = Outside(sources=tuple(ip.ip for ip in world.nodes[name].internal_ips), **last_word[1])
                result = encrypt(result, topology, outside=around, living=last_word[0], previous=before)
                assert result == encrypt(filter_routes(expected, protected), fresh, outside=around, living=last_word[0])
                assert awaited(result) == waited_for(fresh, name, last_word[0])
                encrypted[name] = result


keys = st.integers(0, 30)


@settings(max_examples=examples(200), deadline=None)
@given(
    st.dictionaries(keys, st.integers(), min_size=5),
    st.lists(st.tuples(keys, st.booleans()), max_size=16),
    st.booleans(),
)
def test_what_differs_between_two_mappings(old: dict[int, int], edits: list[tuple[int, bool]], anew: bool) -> None:
    networks = [ip_network(f"10.0.{number}.0/24") for number in range(31)]
    before = {networks[key]: str(value) for key, value in old.items()}
    after = dict(before)
    for key, go in edits:
        if go:
            after.pop(networks[key], None)
        else:
            after[networks[key]] = f"new {key}"
    if anew:
        after = {ip_network(str(key)): value[:1] + value[1:] for key, value in after.items()}
    found = changes(before, after)
    assert len(found) == len(set(found))
    assert set(found) == {key for key in {*before, *after} if before.get(key) != after.get(key)}


def test_an_equal_record_that_was_read_anew_changes_no_object() -> None:
    nodes = [node(f"n{n}", n, "a", f"10.0.0.{n}/24") for n in (1, 2, 3)]
    before = build_topology(snapshot(nodes))
    after = build_topology(snapshot([evolve(n) for n in nodes], revision=9), before)
    assert after.segments["location:a"] is before.segments["location:a"]
    plan = host_plan(before, "n1")
    assert host_plan(after, "n1", plan).peers is plan.peers
