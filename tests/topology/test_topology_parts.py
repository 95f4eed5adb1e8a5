"""Elections, claims, the guard, the graph: each alone."""

from __future__ import annotations

import math
import re
import subprocess
from ipaddress import ip_address, ip_network
from itertools import combinations

import pytest
from attrs import evolve

from helpers import require
from kilo_etcd.model import Candidate, CandidateClass, Endpoint, Granularity, InternalIPs, IPNetwork
from kilo_etcd.model.hostplan import HostPlan
from kilo_etcd.planning.plan import host_plan
from kilo_etcd.planning.route_filter import filter_routes
from kilo_etcd.topology.election import Reason, elect
from kilo_etcd.topology.graph import Edge, EdgeKind, clusters, edges, graph
from kilo_etcd.topology.prefix_allocation import NetworkRequest, PrefixAllocation, allocate
from kilo_etcd.topology.ring import APART
from kilo_etcd.topology.segments import build_topology
from topology_worlds import PHONE, SIX, WORLDS, node, peer, plans, snapshot

A1, A2, A3, _, _, LONE = SIX
REST, PUBLIC, ANNOTATED = CandidateClass.REST, CandidateClass.PUBLIC, CandidateClass.ANNOTATED


def offer(name: str, rank: CandidateClass, revision: int) -> Candidate:
    return Candidate(node=name, rank=rank, create_revision=revision)


class TestElection:
    @pytest.mark.parametrize(
        ("candidates", "recorded", "leader", "next_in_line", "reason"),
        [
            ([offer("a1", REST, 9), offer("a2", PUBLIC, 10)], "a1", "a2", "a1", Reason.CANDIDATE),
            ([offer("a1", REST, 9), offer("a2", REST, 8), offer("a3", REST, 7)], "", "a3", "a2", Reason.CANDIDATE),
            ([offer("a1", PUBLIC, 9), offer("a3", ANNOTATED, 90)], "", "a3", "a1", Reason.CANDIDATE),
            ([offer("a3", REST, 5), offer("a2", REST, 5)], "", "a2", "a3", Reason.CANDIDATE),
            ([offer("gone", ANNOTATED, 1), offer("a2", REST, 5)], "a1", "a2", None, Reason.CANDIDATE),
            ([offer("gone", ANNOTATED, 1)], "a3", "a3", None, Reason.RECORDED),
            ([], "a3", "a3", None, Reason.RECORDED),
            ([], "gone", "a1", None, Reason.FALLBACK),
            ([], "gone a2 a3", "a2", None, Reason.RECORDED),
            ([], "", "a1", None, Reason.FALLBACK),
        ],
    )
    def test_table(
        self,
        candidates: list[Candidate],
        recorded: str,
        leader: str,
        next_in_line: str | None,
        reason: Reason,
    ) -> None:
        for members in ([A1, A2, A3], [A3, A2, A1]):
            for order in (candidates, candidates[::-1]):
                election = elect(members, order, recorded.split())
                assert (election.leader, election.next_in_line, election.reason) == (leader, next_in_line, reason)

    def test_alone(self) -> None:
        assert elect([LONE], [], ()).leader == "c1"
        with pytest.raises(ValueError, match="without members"):
            elect([], [], ())

    def test_without_an_internal_ip_one_cannot_serve_others(self) -> None:
        bare = evolve(A2, internal_ips=(), leader_wanted=True)
        assert elect([A1, bare], [offer("a2", ANNOTATED, 1), offer("a1", REST, 2)], ()).leader == "a1"
        assert elect([A3, bare], [], ()).leader == "a3"

    def test_the_oldest_registration_leads_when_all_else_is_equal(self) -> None:
        young, old = evolve(A2, registered_revision=50), evolve(A3, registered_revision=4)
        assert elect([young, old], [], ()).leader == "a3"

    def test_a_relabelled_candidate_leads_nowhere_until_it_is_there(self) -> None:
        moved = evolve(A1, location="other")
        world = snapshot([moved, A2, A3], candidates={"gcp": (offer("a1", PUBLIC, 1), offer("a3", REST, 2))})
        assert build_topology(world).segment_of("a2").leader.name == "a3"


class TestClaims:
    def allocate(self, *requests: tuple[int, str], mesh: str = "10.4.0.0/16") -> dict[str, str]:
        offered = {
            ("node", str(number)): (
                NetworkRequest((0, number, ""), f"node {number}", tuple(map(ip_network, networks.split()))),
            )
            for number, networks in requests
        }
        allocation = allocate(PrefixAllocation((ip_network(mesh),)), offered, lambda: [ip_address("10.4.7.7")])
        return {name: " ".join(map(str, networks)) for (_, name), networks in allocation.granted.items() if networks}

    def test_the_first_wins_in_whole_and_others_keep_their_rest(self) -> None:
        assert self.allocate((2, "10.1.0.0/16 10.9.0.0/16"), (1, "10.1.2.0/24")) == {
            "1": "10.1.2.0/24",
            "2": "10.9.0.0/16",
        }
        assert self.allocate((1, "10.1.0.0/16"), (2, "10.1.2.0/24")) == {"1": "10.1.0.0/16"}

    def test_an_owner_may_repeat_itself(self) -> None:
        assert self.allocate((1, "10.1.2.0/24 10.1.0.0/16 10.1.0.0/16")) == {"1": "10.1.0.0/16"}

    def test_a_network_that_was_refused_does_not_hold_up_another(self) -> None:
        assert self.allocate((1, "10.1.1.0/24"), (2, "10.1.0.0/16"), (3, "10.1.9.0/24")) == {
            "1": "10.1.1.0/24",
            "3": "10.1.9.0/24",
        }

    def test_inside_the_mesh_an_unused_network_may_be_had(self) -> None:
        assert self.allocate((1, "10.4.7.0/24"), (2, "10.4.8.0/24"), (3, "10.4.0.0/16")) == {"2": "10.4.8.0/24"}

    def test_what_nobody_may_have_takes_nothing_from_others(self) -> None:
        assert self.allocate((1, "0.0.0.0/0 10.0.0.0/8 127.0.0.0/8"), (2, "10.1.0.0/16")) == {"2": "10.1.0.0/16"}

    def test_nodes_of_one_location_do_not_contend_and_each_keeps_its_place(self) -> None:
        def offer(number: int, networks: str) -> NetworkRequest:
            return NetworkRequest((0, number, ""), f"node {number}", tuple(map(ip_network, networks.split())))

        here, there = ("location", "location:here"), ("location", "location:there")
        offers = {
            here: (offer(1, "10.1.1.0/24 10.2.0.0/24"), offer(4, "10.1.0.0/16 10.3.0.0/16")),
            there: (offer(2, "10.3.7.0/24"), offer(5, "10.2.0.0/16")),
        }
        allocation = allocate(PrefixAllocation(), offers, lambda: ())
        assert allocation(here) == (ip_network("10.1.0.0/16"), ip_network("10.2.0.0/24"))
        assert allocation(there) == (ip_network("10.3.7.0/24"),)
        assert [problem.text for problem in allocation.problems] == [
            "10.2.0.0/16 of node 5 is left out: it overlaps 10.2.0.0/24 of node 1, which comes first; "
            "take it out of one of the two",
            "10.3.0.0/16 of node 4 is left out: it overlaps 10.3.7.0/24 of node 2, which comes first; "
            "take it out of one of the two",
        ]
        assert allocation.offered_by(ip_network("10.1.0.0/16")) == "node 4"
        assert allocation.offered_by(ip_network("10.3.0.0/16")) is None


class TestGuard:
    world = snapshot([*SIX[1:], A1], peers=[PHONE])

    def filtered(self, host: str, *protected: str, plan: HostPlan | None = None) -> HostPlan:
        plan = plan or host_plan(build_topology(self.world), host)
        return filter_routes(plan, [ip_network(text) for text in protected])

    @pytest.mark.parametrize("protected", ["192.168.0.77/32", "192.168.0.0/16", "192.168.0.0/24"])
    @pytest.mark.parametrize("host", ["a1", "a2"])
    def test_etcd_and_the_underlay_stay_reachable(self, host: str, protected: str) -> None:
        plan = self.filtered(host, protected)
        lost = ip_network("192.168.0.0/24")
        assert lost not in plan.routes
        assert all(lost not in peer.allowed_ips for peer in plan.peers.values())
        (problem,) = (problem for problem in plan.problems if problem.subject == "192.168.0.0/24")
        assert problem.text == (
            f"192.168.0.0/24 is not routed here: it would cut this host off from {protected}; "
            "offer other or smaller networks"
        )
        assert len(plan.routes) == len(host_plan(build_topology(self.world), host).routes) - 1

    def test_of_an_address_that_the_host_itself_needs_it_is_said_what_for(self) -> None:
        lone = evolve(SIX[3], allowed_location_ips=(ip_network("192.168.0.77/32"),))
        topology = build_topology(snapshot([*SIX[:3], lone, *SIX[4:]]))
        plan = self.filtered("a1", "192.168.0.77/32", plan=host_plan(topology, "a1"))
        (problem,) = (problem for problem in plan.problems if problem.subject == "192.168.0.77/32")
        assert problem.text.endswith(
            "is not routed here: it would cut this host off from what it reaches there outside the mesh: etcd, its "
            "gateway, or a node's WireGuard"
        )

    def test_the_mesh_stays_whatever_is_protected(self) -> None:
        before = host_plan(build_topology(self.world), "a2")
        assert self.filtered("a2", "10.4.0.0/24", "10.0.0.0/24") == before

    def test_endpoints_of_peers_are_protected_unnamed(self) -> None:
        greedy = evolve(SIX[3], allowed_location_ips=(ip_network("203.0.113.0/28"), ip_network("192.0.2.0/24")))
        world = snapshot([A1, A2, A3, greedy])
        plan = filter_routes(host_plan(build_topology(world), "a1"), [])
        assert ip_network("203.0.113.0/28") not in plan.routes
        assert ip_network("192.0.2.0/24") in plan.routes
        assert "203.0.113.4, the endpoint of b1" in plan.problems[0].text

    @pytest.mark.parametrize("text", ["0.0.0.0/0", "::/0"])
    def test_no_default_route_ever(self, text: str) -> None:
        everything: IPNetwork = ip_network(text)
        plan = host_plan(build_topology(self.world), "a1")
        other = evolve(plan.peers["key-b1"], allowed_ips=(*plan.peers["key-b1"].allowed_ips, everything))
        route = evolve(plan.routes[ip_network("10.4.0.0/16")], destination=everything)
        bad = evolve(plan, peers={**plan.peers, "key-b1": other}, routes={**plan.routes, everything: route})
        good = self.filtered("a1", plan=bad)
        assert (good.peers, good.routes) == (plan.peers, plan.routes)
        assert [problem.subject for problem in good.problems] == [text]

    def test_a_clean_plan_is_not_touched(self) -> None:
        plan = host_plan(build_topology(self.world), "a1")
        assert self.filtered("a1", plan=plan).peers is plan.peers


NAMES = [
    "a",
    'quo"te',
    "back\\slash\\",
    "per%cent",
    "&amp;",
    "<b>",
    "line\nbreak",
    "日本語",
    "",
    "n:p",
    "\\N",
    "\x00\x1f",
]


class TestGraph:
    def test_edges_of_a_location_mesh(self) -> None:
        tunnel, local, outside = EdgeKind.TUNNEL, EdgeKind.LOCAL, EdgeKind.PEER
        assert edges(build_topology(WORLDS["location"])) == {
            Edge("a1", "a2", local),
            Edge("a1", "a3", local),
            Edge("b1", "b2", local),
            Edge("a1", "b1", tunnel),
            Edge("a1", "c1", tunnel),
            Edge("b1", "c1", tunnel),
            Edge("a1", "phone", outside),
            Edge("b1", "phone", outside),
            Edge("c1", "phone", outside),
        }

    @pytest.mark.parametrize(("granularity", "count"), [(Granularity.FULL, 15), (Granularity.CROSS, 11)])
    def test_as_many_edges_as_tunnels(self, granularity: Granularity, count: int) -> None:
        world = snapshot(SIX, granularity)
        drawn = {(edge.one, edge.other) for edge in edges(build_topology(world))}
        assert len(drawn) == count
        assert drawn == {
            (min(name, p.name), max(name, p.name)) for name, plan in plans(world).items() for p in plan.peers.values()
        }

    def test_its_label_says_what_is_in_force_of_internal_ips(self) -> None:
        known = evolve(WORLDS["location"], internal_ips=InternalIPs.ROUTED)
        known = evolve(known, nodes={name: evolve(node, underlay=()) for name, node in known.nodes.items()})
        for world, mode in ((WORLDS["location"], "off"), (known, "routed")):
            assert f'\tlabel="10.4.0.0/16\\ninternal-ips {mode}";\n' in graph(build_topology(world))

    def test_clusters(self) -> None:
        found = [
            (cluster.label, " ".join(n.name for n in cluster.nodes), " ".join(sorted(cluster.leaders)))
            for granularity in Granularity
            for cluster in clusters(build_topology(snapshot(SIX, granularity)))
        ]
        assert found[:3] == [("", "b1 b2", "b1"), ("", "c1", "c1"), ("gcp", "a1 a2 a3", "a1")]
        assert len(found) == 3 + 6 + 3
        assert found[-1] == ("gcp", "a1 a2 a3", "a1 a2 a3")

    def test_what_a_node_shows(self) -> None:
        text = graph(build_topology(WORLDS["location"]))
        assert text.startswith("digraph kilo {")
        colour = next(line for line in text.splitlines() if '"a1" [' in line).split("fillcolor=")[1].split('"')[1]
        small = '<font point-size="10"><br/>'
        assert (
            f'"a1" [label=<<font point-size="17">a1</font>{small}10.4.0.1<br/>10.0.0.1/24<br/>203.0.113.1:51820<br/>'
            f'at gcp</font>>, fillcolor="{colour}", penwidth=3];' in text
        )
        assert (
            f'"a2" [label=<<font point-size="17">a2</font>{small}10.4.0.2<br/>10.0.0.2/24<br/>no endpoint<br/>at gcp'
            f'</font>>, fillcolor="{colour}"];' in text
        )
        assert 'style="dashed,rounded"' in text

    def test_a_site_has_one_colour_in_a_full_mesh(self) -> None:
        text = graph(build_topology(snapshot(SIX, Granularity.FULL)))
        colours = dict(re.findall(r'"(..)" \[.*fillcolor="(#......)"', text))
        assert colours["a1"] == colours["a2"] != colours["b1"]

    @pytest.mark.graphviz
    @pytest.mark.parametrize("granularity", Granularity)
    def test_a_picture_of_many_tunnels_is_drawn_at_once_and_none_hides_another(self, granularity: Granularity) -> None:
        require("circo")
        nodes = [node(f"n{n}", n, f"site-{n % 30}", f"10.{n % 30}.0.{n + 1}/24", f"203.0.113.{n}") for n in range(40)]
        world = snapshot(nodes, granularity, [peer(f"phone-{n}", f"10.9.0.{n}/32") for n in range(8)])
        # circo by itself needs more than a minute.
        done = subprocess.run(
            ["circo", "-Tplain"], input=graph(build_topology(world)), capture_output=True, text=True, check=True,
            timeout=30,
        )  # fmt: skip
        places = [
            (float(x), float(y)) for x, y in re.findall(r'^node (?:".*?"|\S+) (\S+) (\S+)', done.stdout, re.MULTILINE)
        ]
        assert len(places) == 48
        assert min(math.dist(one, other) for one, other in combinations(places, 2)) > 0.9 * APART

    @pytest.mark.graphviz
    @pytest.mark.parametrize("granularity", Granularity)
    def test_graphviz_takes_any_name(self, granularity: Granularity) -> None:
        require("circo")
        nodes = [node(name, n, NAMES[n // 2], f"10.0.0.{n + 1}/24", f"203.0.113.{n}") for n, name in enumerate(NAMES)]
        nodes.append(evolve(A1, name="peer x", endpoint=Endpoint("a.example", 1)))
        world = snapshot(nodes, granularity, [peer("x", "10.9.0.1/32"), peer('"', "10.9.0.2/32")])
        done = subprocess.run(
            ["circo", "-Tsvg"],
            input=graph(build_topology(world)),
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.count('class="node"') == len(nodes) + 2
        assert done.stdout.count('class="edge"') == len(edges(build_topology(world)))
        assert "日本語" in done.stdout
        assert "&amp;amp;" in done.stdout
        assert ">\\N</text>" in done.stdout, "a name with a backslash stays as it is"
