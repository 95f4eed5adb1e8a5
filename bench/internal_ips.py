"""What routing internal IPs costs in topology, plan and guard, for 10,000 nodes in 100 locations.

One change after the other, CPU milliseconds, the median of several runs, `off`, `routed` and `encrypted`. The mesh is
seen from one leader; the location that changes is another one, but for "in the own location". Under `encrypted` all
nodes are through with the switch.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from ipaddress import ip_address, ip_interface, ip_network
from statistics import median
from time import process_time

from attrs import evolve
from rich.console import Console
from rich.table import Table

from kilo_etcd.base.mappings import Changed
from kilo_etcd.model import Candidate, EncryptionStage, Endpoint, InternalIPs, Node, Snapshot
from kilo_etcd.model.hostplan import HostPlan
from kilo_etcd.planning.encryption import Living, Outside, encrypt
from kilo_etcd.planning.plan import host_plan
from kilo_etcd.planning.route_filter import filter_routes
from kilo_etcd.topology.segments import Topology, build_topology

LOCATIONS, PER_LOCATION = 100, 100
RUNS = 10 if os.environ.get("KILO_BENCH_QUICK") else 40
OWN, OWN_MEMBER = "node-0", "node-50"
PROTECTED = [ip_network("10.100.0.0/24"), ip_network("192.0.2.10/32")]


def mesh(mode: InternalIPs, *, subnets: bool = False) -> Snapshot:
    """Each location has a network of its own and two public nodes; with `subnets` there is a network behind each
    node."""
    nodes, candidates = {}, {}
    for location in range(LOCATIONS):
        offers = []
        for place in range(PER_LOCATION):
            number = location * PER_LOCATION + place
            inside = ip_interface(f"10.{100 + location}.0.{place + 1}/24")
            nodes[f"node-{number}"] = node = Node(
                name=f"node-{number}",
                public_key=f"key-{number}",
                location=f"location-{location}",
                endpoint=Endpoint(ip_address(0xCB00_0000 + number) if place < 2 else inside.ip, 51820),
                internal_ips=(inside,),
                subnets=(ip_network((0xAC10_0000 + number * 16, 28)),) if subnets else (),
                underlay=(inside.network, ip_network("192.0.2.10/32")),
                mesh_addresses=(ip_address(0x0A04_0001 + number),),
                registered_revision=number + 2,
                encryption=EncryptionStage.SENDS if mode is InternalIPs.ENCRYPTED else None,
            )
            offers.append(Candidate(node=node.name, rank=node.candidate_class, create_revision=number + 2))
        candidates[f"location-{location}"] = tuple(offers)
    return Snapshot(
        revision=1, subnets=(ip_network("10.4.0.0/16"),), nodes=nodes, candidates=candidates, internal_ips=mode
    )


def changes(snapshot: Snapshot) -> Iterator[tuple[str, Snapshot]]:
    """One snapshot after the other, and what has changed in it."""

    def after(name: str, node: Node | None) -> Snapshot:
        """As the view makes it, which knows in what the nodes differ from those before."""
        nodes = {**snapshot.nodes}
        if node is None:
            del nodes[name]
        else:
            nodes[name] = node
        changed = Changed(snapshot.nodes, nodes, frozenset({name}))
        return evolve(snapshot, revision=snapshot.revision + 1, nodes=nodes, nodes_changed=changed)

    def put(node: Node) -> Snapshot:
        return after(node.name, node)

    for run in range(RUNS):
        location = 5 + run
        first, third, member, leaver = (f"node-{location * PER_LOCATION + place}" for place in (0, 1, 50, 60))
        snapshot = put(evolve(snapshot.nodes[third], endpoint=Endpoint(ip_address("203.0.113.1"), 1024 + run)))
        yield "another endpoint", snapshot
        moved = evolve(snapshot.nodes[member], internal_ips=(ip_interface(f"10.{100 + location}.0.200/24"),))
        snapshot = put(moved)
        yield "another internal IP", snapshot
        snapshot = put(
            evolve(
                moved,
                name=f"new-{run}",
                public_key=f"new-{run}",
                internal_ips=(ip_interface(f"10.{100 + location}.0.210/24"),),
                mesh_addresses=(ip_address(0x0A04_8000 + run),),
                registered_revision=snapshot.revision + 1,
            )
        )
        yield "a node joins", snapshot
        snapshot = after(leaver, None)
        yield "a node leaves", snapshot
        key = f"location-{location}"
        standing = tuple(candidate for candidate in snapshot.candidates[key] if candidate.node != first)
        snapshot = evolve(snapshot, revision=snapshot.revision + 1, candidates={**snapshot.candidates, key: standing})
        yield "another leader", snapshot
        near = snapshot.nodes[OWN_MEMBER]
        snapshot = put(evolve(near, internal_ips=(ip_interface(f"10.100.0.{200 + run % 2}/24"),)))
        yield "another internal IP, in the own location", snapshot
        snapshot = put(evolve(snapshot.nodes[OWN_MEMBER], persistent_keepalive=run + 1))
        yield "another keepalive, in the own location", snapshot


def measured(mode: InternalIPs, *, subnets: bool = False) -> tuple[dict[str, float], int]:
    """Kind of change -> milliseconds; how many routes there are."""
    snapshot = mesh(mode, subnets=subnets)
    times: dict[str, list[float]] = {}

    def milliseconds(since: float) -> float:
        return (process_time() - since) * 1000

    living = Living(asked=frozenset((*snapshot.nodes, *(f"new-{run}" for run in range(RUNS)))))

    def encrypted(plan: HostPlan, topology: Topology, previous: HostPlan | None = None) -> HostPlan:
        return encrypt(plan, topology, outside=Outside(), living=living, previous=previous)

    begin = process_time()
    topology = build_topology(snapshot)
    plan = host_plan(topology, OWN)
    filtered = filter_routes(plan, PROTECTED)
    whole = encrypted(filtered, topology)
    times["from scratch"] = [milliseconds(begin)]
    for kind, after in changes(snapshot):
        begin = process_time()
        topology = build_topology(after, topology)
        plan = host_plan(topology, OWN, plan)
        filtered = filter_routes(plan, PROTECTED, filtered)
        whole = encrypted(filtered, topology, whole)
        times.setdefault(kind, []).append(milliseconds(begin))
    return {kind: median(found) for kind, found in times.items()}, len(filtered.routes)


def main() -> None:
    """Print the table."""
    found = {mode.value: measured(mode) for mode in InternalIPs}
    found["routed, subnets"] = measured(InternalIPs.ROUTED, subnets=True)
    routes = ", ".join(f"{count:,} {mode}" for mode, (_, count) in found.items())
    table = Table(title=f"Internal IPs: topology, plan, guard and what encrypted adds, CPU ms; routes: {routes}")
    table.add_column("10,000 nodes in 100 locations")
    for mode in found:
        table.add_column(mode, justify="right")
    for kind in found[InternalIPs.OFF.value][0]:
        table.add_row(kind, *(f"{times[kind]:.2f}" for times, _ in found.values()))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
