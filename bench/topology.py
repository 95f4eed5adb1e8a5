"""Topology and own host plan, from scratch and after one node changed: milliseconds, the median of several runs.

The mesh is seen from one leader. "One node changed" is another node with a new endpoint, in a snapshot whose
other nodes are the same objects, as the mirror yields them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable
from ipaddress import ip_address, ip_interface, ip_network
from statistics import median
from time import perf_counter

from attrs import evolve
from rich.console import Console
from rich.table import Table

from kilo_etcd.model import Candidate, Endpoint, Granularity, Node, Snapshot
from kilo_etcd.planning.plan import host_plan
from kilo_etcd.planning.route_filter import filter_routes
from kilo_etcd.topology.segments import build_topology

PER_LOCATION = 10


def mesh(size: int, granularity: Granularity, *, subnets: bool) -> Snapshot:
    """`size` nodes, ten to a location; with `subnets` every node has a container network behind it."""
    nodes = {}
    candidates: dict[str, tuple[Candidate, ...]] = {}
    for number in range(size):
        name, location = f"node-{number}", f"location-{number // PER_LOCATION}"
        endpoint = Endpoint(ip_address(0xCB00_0000 + number), 51820)
        nodes[name] = Node(
            name=name,
            public_key=f"key-{number}",
            location=location,
            endpoint=endpoint,
            internal_ips=(ip_interface(f"10.200.0.{number % PER_LOCATION + 1}/24"),),
            mesh_addresses=(ip_address(0x0A04_0001 + number),),
            subnets=(ip_network((0x6440_0000 + number * 256, 24)),) if subnets else (),
            registered_revision=number + 2,
        )
        offer = Candidate(node=name, rank=nodes[name].candidate_class, create_revision=number + 2)
        candidates[location] = (*candidates.get(location, ()), offer)
    return Snapshot(
        revision=size + 2,
        granularity=granularity,
        subnets=(ip_network("10.4.0.0/16"),),
        nodes=nodes,
        candidates=candidates,
    )


def timed(work: Callable[[], object], runs: int) -> float:
    """Median milliseconds."""
    times = []
    for _ in range(runs):
        begin = perf_counter()
        work()
        times.append((perf_counter() - begin) * 1000)
    return median(times)


def measure(snapshot: Snapshot) -> tuple[float, float, float, float, float]:
    """From scratch, after one change, the route filter on both, and all of it after a subnet moved, in milliseconds."""
    protected = [ip_network("10.200.0.0/24"), ip_network("192.0.2.10/32")]

    def scratch() -> object:
        return host_plan(build_topology(snapshot), "node-0")

    first = timed(scratch, 3)
    topology = build_topology(snapshot)
    plan = host_plan(topology, "node-0")
    filtered = filter_routes(plan, protected)
    first_guard = timed(lambda: filter_routes(plan, protected), 3)
    changed_times, guard_times = [], []
    gc.collect()
    for run in range(50):
        name = f"node-{len(snapshot.nodes) - PER_LOCATION * (run % 5) - PER_LOCATION}"
        moved = evolve(snapshot.nodes[name], endpoint=Endpoint(ip_address("203.0.113.1"), 1024 + run))
        snapshot = evolve(snapshot, revision=snapshot.revision + 1, nodes={**snapshot.nodes, name: moved})
        begin = perf_counter()
        topology = build_topology(snapshot, topology)
        plan = host_plan(topology, "node-0", plan)
        middle = perf_counter()
        filtered = filter_routes(plan, protected, filtered)
        end = perf_counter()
        changed_times.append((middle - begin) * 1000)
        guard_times.append((end - middle) * 1000)
    moved_times = []
    for run in range(50):
        name = f"node-{len(snapshot.nodes) - PER_LOCATION * (run % 5) - PER_LOCATION}"
        moved = evolve(snapshot.nodes[name], subnets=(ip_network((0xAC10_0000 + run * 256, 24)),))
        snapshot = evolve(snapshot, revision=snapshot.revision + 1, nodes={**snapshot.nodes, name: moved})
        begin = perf_counter()
        topology = build_topology(snapshot, topology)
        plan = host_plan(topology, "node-0", plan)
        filtered = filter_routes(plan, protected, filtered)
        moved_times.append((perf_counter() - begin) * 1000)
    return first, median(changed_times), first_guard, median(guard_times), median(moved_times)


def main() -> None:
    """Print the table."""
    table = Table(title="Topology and own host plan, ms (median)")
    for heading in (
        "mesh",
        "nodes",
        "from scratch",
        "one node changed",
        "route filter",
        "route filter after the change",
        "a subnet moved: all",
    ):
        table.add_column(heading, justify="left" if heading == "mesh" else "right")
    for granularity in (Granularity.LOCATION, Granularity.FULL):
        for subnets in (False, True):
            for size in (100, 1_000, 10_000):
                shape = "full mesh" if granularity is Granularity.FULL else f"{PER_LOCATION} per location"
                numbers = measure(mesh(size, granularity, subnets=subnets))
                label = shape + (", a subnet behind each" if subnets else "")
                table.add_row(label, f"{size:,}", *(f"{number:.2f}" for number in numbers))
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
