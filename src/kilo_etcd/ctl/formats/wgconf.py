"""WireGuard configurations: what `wg setconf` and `wg-quick` read, made from a topology. Pure.

For a peer: itself and every segment's leader. For a node: what its agent programs. As a peer: one entry for another
machine's configuration. It has a private key only if the caller gives one.
"""

from __future__ import annotations

from collections.abc import Iterable

from attrs import evolve, field, frozen

from kilo_etcd.model import Endpoint, IPNetwork
from kilo_etcd.model.hostplan import HostPlan
from kilo_etcd.planning.exit_node import by_exit_node, with_exit_node
from kilo_etcd.planning.peerplan import peer_plan
from kilo_etcd.planning.plan import host_plan
from kilo_etcd.store.records import PeerRecord
from kilo_etcd.topology.segments import Topology


@frozen(kw_only=True)
class Entry:
    """A [Peer] section."""

    name: str
    record: PeerRecord


@frozen(kw_only=True)
class Configuration:
    """A whole configuration; `addresses` and `mtu` are for `wg-quick` only."""

    name: str
    private_key: str | None = field(default=None, repr=False)
    listen_port: int | None = None
    addresses: tuple[IPNetwork, ...] = ()
    peers: tuple[Entry, ...] = ()


def of_node(topology: Topology, name: str) -> Configuration:
    """The WireGuard of a node as its agent programs it. UnknownNode."""
    plan = with_exit_node(host_plan(topology, name), topology, bypass=())
    return Configuration(
        name=name,
        listen_port=plan.listen_port,
        addresses=tuple(address.network for address in plan.addresses),
        peers=_entries(plan),
    )


def _entries(plan: HostPlan) -> tuple[Entry, ...]:
    return tuple(
        Entry(
            name=peer.name,
            record=PeerRecord(
                public_key=peer.public_key,
                allowed_ips=peer.allowed_ips,
                endpoint=peer.endpoint,
                persistent_keepalive=peer.persistent_keepalive,
                preshared_key=peer.preshared_key,
            ),
        )
        for peer in sorted(plan.peers.values(), key=lambda peer: peer.name)
        if peer.in_use
    )


def of_peer(topology: Topology, name: str, exit_node: str | None = None) -> Configuration:
    """A peer's own configuration: all of the mesh, by way of the segments' leaders; and by the exit node, which must
    be usable as one, anything else. KeyError."""
    peer, plan = topology.peers[name], peer_plan(topology, name)
    if exit_node is not None:
        key = topology.snapshot.nodes[exit_node].public_key
        plan = evolve(plan, peers={**plan.peers, key: by_exit_node(plan.peers[key])})
    return Configuration(
        name=name,
        listen_port=peer.endpoint.port if peer.endpoint is not None else None,
        addresses=tuple(address.network for address in plan.addresses),
        peers=_entries(plan),
    )


def node_as_peer(topology: Topology, name: str) -> Entry:
    """A node as an entry for somebody else: with all that is behind it if it leads its segment, and the internal IPs
    that the mesh routes, but for the endpoint: WireGuard's own packets go there. UnknownNode."""
    segment, node = topology.segment_of(name), topology.snapshot.nodes[name]
    allowed = (
        segment.reach
        if segment.leader.name == name
        else (
            *(_single(address) for address in node.mesh_addresses),
            *segment.subnets.get(name, ()),
            *segment.routed.get(name, ()),
        )
    )
    if node.endpoint is not None and node.endpoint.address is not None:
        at = _single(node.endpoint.address)
        allowed = tuple(network for network in allowed if network != at)
    return Entry(
        name=name,
        record=PeerRecord(
            public_key=node.public_key,
            allowed_ips=tuple(allowed),
            endpoint=node.endpoint,
            persistent_keepalive=node.persistent_keepalive,
        ),
    )


def peer_as_peer(topology: Topology, name: str) -> Entry:
    """A peer as an entry for another machine. KeyError."""
    peer = topology.peers[name]
    return Entry(
        name=name,
        record=PeerRecord(
            public_key=peer.public_key,
            allowed_ips=peer.allowed_ips,
            endpoint=peer.endpoint,
            persistent_keepalive=peer.persistent_keepalive,
            preshared_key=peer.preshared_key,
        ),
    )


def allowing(entry: Entry, networks: Iterable[IPNetwork]) -> Entry:
    """The entry with further allowed IPs."""
    allowed = tuple(dict.fromkeys((*entry.record.allowed_ips, *networks)))
    return evolve(entry, record=evolve(entry.record, allowed_ips=allowed))


def _single(address: object) -> IPNetwork:
    from ipaddress import ip_network

    return ip_network(str(address))


def text(configuration: Configuration, *, quick: bool = False) -> str:
    """What `wg setconf` reads; with `quick` what only `wg-quick` and phones read: addresses too."""
    lines = [f"# {_comment(configuration.name)}", "[Interface]"]
    if configuration.private_key is not None:
        lines.append(f"PrivateKey = {configuration.private_key}")
    if configuration.listen_port is not None:
        lines.append(f"ListenPort = {configuration.listen_port}")
    if quick and configuration.addresses:
        lines.append(f"Address = {', '.join(map(str, configuration.addresses))}")
    return "\n\n".join(["\n".join(lines), *map(section, configuration.peers)])


def section(entry: Entry) -> str:
    """A [Peer] section."""
    record = entry.record
    lines = [f"# {_comment(entry.name)}", "[Peer]", f"PublicKey = {record.public_key}"]
    if record.preshared_key is not None:
        lines.append(f"PresharedKey = {record.preshared_key}")
    if record.allowed_ips:
        lines.append(f"AllowedIPs = {', '.join(map(str, record.allowed_ips))}")
    if record.endpoint is not None:
        lines.append(f"Endpoint = {_endpoint(record.endpoint)}")
    if record.persistent_keepalive:
        lines.append(f"PersistentKeepalive = {record.persistent_keepalive}")
    return "\n".join(lines)


def _endpoint(endpoint: Endpoint) -> str:
    return str(endpoint)


def _comment(name: str) -> str:
    # A name is any text, and a comment ends with its line.
    return "".join(c if c.isprintable() else "?" for c in name)
