"""Where small packets arrive and none as large as the tunnel's MTU, by the echo requests of the living agents. Pure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from operator import attrgetter

from kilo_etcd.ctl.reports.arrivals import Loss, by_host, by_mesh_address, hops_between, limiting_hosts, some
from kilo_etcd.ctl.reports.live import Live, tunnels
from kilo_etcd.ctl.reports.lossy import SOME, counted_ways
from kilo_etcd.model import SMALLEST_MTU
from kilo_etcd.store.records import DiagnosticsResponse
from kilo_etcd.topology.segments import Topology

_OVERHEAD = {4: 60, 6: 80}
"""Bytes that WireGuard and the outer headers add to a packet, by the family of the endpoint."""

_ECHO_HEADERS = {4: 28, 6: 48}
"""Bytes that `ping -s` adds to the size that it is given, by family."""


def narrow(topology: Topology, live: Live) -> Iterator[Loss]:
    """Ways on which small packets arrive and none as large as the tunnel's MTU, one for all ways of a host. Where
    ping works and nothing else does, this is why. Large packets that get lost where small ones do say nothing."""
    limiting, reached = limiting_hosts(live), _to_nodes(topology, live, attrgetter("reached"))
    uncertain = {(way.sender, way.target) for way in counted_ways(topology, live) if way.missing >= SOME}
    uncertain |= {pair for pair in reached if pair[1] in limiting}
    lost = _to_nodes(topology, live, attrgetter("small_only")) - uncertain
    passed = reached - uncertain - lost
    blamed = _blamed(topology, lost, passed, lambda sender: live.answers[sender].mtu)
    for host, others in by_host(blamed):
        ways = {way for other in others for way in blamed[frozenset((host, other))]}
        senders = {sender for sender, _ in ways}
        size = max(live.answers[sender].mtu for sender in senders)
        largest = min((largest for way in ways if (largest := _largest(topology, live, *way))), default=0)
        ends = f"it and {some(others)}" if len(others) > 1 else "them"
        passing = f" (with don't-fragment, up to {largest} bytes pass)" if largest else ""
        yield Loss(
            subject=host if len(others) > 1 else f"{host} - {others[0]}", filtered=True,
            text=f"small packets arrive between {ends}, and none of {size} bytes does{passing}",
            remedy=_other_mtu(live, (host,) if len(others) > 1 else (host, others[0]), senders)
                   or _smaller(topology, live, host, others, size, largest),
        )  # fmt: skip


def _to_nodes(
    topology: Topology, live: Live, addresses: Callable[[DiagnosticsResponse], Collection[str]]
) -> set[tuple[str, str]]:
    """The pairs of hosts that have sent packets to mesh addresses, and the nodes that have these, of some addresses of
    the answers."""
    nodes, by_address = topology.snapshot.nodes, by_mesh_address(topology)
    return {
        (name, target)
        for name, answer in live.answers.items()
        if name in nodes
        for address in addresses(answer)
        if (target := by_address.get(address)) is not None and target != name
    }


def _blamed(
    topology: Topology,
    lost: Collection[tuple[str, str]],
    passed: Collection[tuple[str, str]],
    size: Callable[[str], int],
) -> dict[frozenset[str], set[tuple[str, str]]]:
    """Two adjacent hosts for each way on which packets got lost, between whom none that was as large is known to have
    passed, and of those the two who have most such ways in common; with these ways. If there are none: the two ends.
    `size`: the bytes of a sender's packets."""
    largest: dict[frozenset[str], int] = {}
    for pair in passed:
        for hop in hops_between(topology, *pair):
            largest[hop] = max(largest.get(hop, 0), size(pair[0]))
    suspects = {
        pair: [
            hop for hop in hops_between(topology, *pair) if hop not in largest or largest[hop] < size(pair[0])
        ] or [frozenset(pair)]
        for pair in lost
    }  # fmt: skip
    number = Counter(hop for hops in suspects.values() for hop in hops)
    blamed: dict[frozenset[str], set[tuple[str, str]]] = {}
    for pair, hops in suspects.items():
        hop = min(hops, key=lambda hop: (-number[hop], sorted(hop)))
        blamed.setdefault(hop, set()).add(pair)
    return blamed


def _other_mtu(live: Live, hosts: Collection[str], senders: Collection[str]) -> str:
    """What to do if the large packets of `senders` are lost since a device of one of these hosts has another MTU than
    those of most hosts; else empty."""
    mtus = Counter(answer.uplink_mtu for answer in live.answers.values() if answer.uplink)
    usual = max(mtus, key=lambda mtu: (mtus[mtu], mtu), default=0)
    unusual = [
        name
        for name in hosts
        if (answer := live.answers.get(name)) is not None and _loses_large_packets(name, answer, usual, senders)
    ]
    if len(unusual) != 1:
        return ""
    name, answer = unusual[0], live.answers[unusual[0]]
    device, mtu = answer.uplink, answer.uplink_mtu
    smallest = min(answer.mtu for answer in live.answers.values() if answer.mtu)
    otherwise = (
        f"give all hosts {smallest} as --mtu (KILO_MTU) and restart the agents"
        if mtu > answer.mtu
        else f"it carries no mesh with IPv6 addresses, which needs {SMALLEST_MTU[6] + _OVERHEAD[4]} bytes or more"
    )
    return (
        f"the MTU of {device} on {name} is {mtu} bytes, and that of other hosts' devices {usual}: if its network "
        f"carries {'more' if mtu < usual else 'less'}, ip link set dev {device} mtu {usual} there, and in the "
        f"configuration of its interfaces; if not, {otherwise}"
    )


def _loses_large_packets(name: str, answer: DiagnosticsResponse, usual: int, senders: Collection[str]) -> bool:
    """Whether the MTU of a host's device is not the usual one, and may be why packets of `senders` are lost."""
    mtu = answer.uplink_mtu
    if mtu in (0, usual):
        return False
    if mtu > usual:
        # The packets of the others are small enough.
        return {*senders} == {name}
    # Its own are too, unless its tunnel takes what IPv6 needs and its device less.
    return name not in senders or mtu - _OVERHEAD[4] < answer.mtu


def _largest(topology: Topology, live: Live, sender: str, target: str) -> int:
    """Bytes of the largest packet of a host that another one has answered; 0: it is not known, or could not be the MTU
    of its tunnel, whatever its agent says."""
    answer, addresses = live.answers[sender], topology.snapshot.nodes[target].mesh_addresses
    smallest = {str(address): SMALLEST_MTU[address.version] for address in addresses}
    sizes = (size for address, size in answer.largest if address in smallest and smallest[address] <= size < answer.mtu)
    return min(sizes, default=0)


def _smaller(topology: Topology, live: Live, host: str, others: list[str], size: int, largest: int) -> str:
    """What to do about the ways between a host and others on which no packet of `size` bytes arrives, and those of
    `largest` bytes do. If that is 0 it is not known; then the sentence says how to find it out, through the tunnel,
    where nothing has to be subtracted."""
    other = others[0]
    by_node = tunnels(topology, live)
    ends = [end for node, far in ((host, other), (other, host)) for end in by_node.get(node, ()) if end.other == far]
    outer = {6 if end.endpoint.startswith("[") else 4 for end in ends if end.endpoint}
    version = outer.pop() if len(outer) == 1 else None
    address = topology.snapshot.nodes[other].mesh_addresses[0]
    six = any(
        address.version == 6 for node in (host, *others) for address in topology.snapshot.nodes[node].mesh_addresses
    )
    needed = f"{SMALLEST_MTU[6]}, which the mesh's IPv6 needs: the way has to carry"
    needed += f" {SMALLEST_MTU[6] + _OVERHEAD[version or 6]} bytes"
    otherwise = (
        "or let large UDP packets and ICMP's fragmentation-needed pass; a firewall that drops only large echo requests "
        "looks the same"
    )
    if largest:
        if six and largest < SMALLEST_MTU[6]:
            return f"{largest} is less than {needed}; {otherwise.removeprefix('or ')}"
        hosts = "both ends" if len(others) == 1 else f"{host}, {some(others)}"
        return f"give {hosts} {largest} as --mtu (KILO_MTU) and restart the agents; {otherwise}"
    less = f"less than {size + _OVERHEAD[version]} bytes" if version else "less than their tunnels take it to"
    overhead = str(_OVERHEAD[version]) if version else "60 in IPv4, less 80 in IPv6"
    return (
        f"the way carries {less}: find on {host} the largest N for which `ping -M do -s N {address}` is answered, give "
        f"both ends N + {_ECHO_HEADERS[address.version]} as --mtu (KILO_MTU){f' (not under {needed})' if six else ''} "
        f"and restart the agents (if you know the path MTU: that less {overhead}); {otherwise}"
    )
