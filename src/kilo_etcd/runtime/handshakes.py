"""Triggers WireGuard handshakes, and finds the peers that need one because their endpoints have changed."""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterable
from contextlib import suppress

from kilo_etcd import kernel
from kilo_etcd.kernel.state import SetPeer
from kilo_etcd.model import IPAddress
from kilo_etcd.model.hostplan import HostPlan
from kilo_etcd.planning.handshake_order import begins
from kilo_etcd.topology.segments import Topology

DISCARD_PORT = 9
"""RFC 863; whoever gets the packet may throw it away, since its arrival at the tunnel's far end is all it is for."""


def moved(
    report: kernel.ApplyReport,
    before: HostPlan | None,
    plan: HostPlan,
    topology: Topology,
    *,
    apart_from: Collection[str] = (),
) -> list[IPAddress]:
    """Addresses of nodes and peers whose endpoint was just replaced, or set again, by the host of `plan`; not of those
    that were reset for another reason (`apart_from`).

    Until a packet goes there, the next one that comes from the former endpoint has WireGuard go back to that; the other
    end, which does not know of the new one, would send from there forever.
    """
    addresses: list[IPAddress] = []
    if before is None:
        return addresses
    own = topology.snapshot.nodes.get(plan.node)
    for change in report.changes:
        if not isinstance(change, SetPeer) or change.endpoint is None or (change.new and not change.reset):
            continue
        peer, former = plan.peers.get(change.public_key), before.peers.get(change.public_key)
        if peer is None or former is None or peer.observed or former.observed or former.endpoint is None:
            continue
        if not peer.in_use or change.public_key in apart_from:
            continue
        node = topology.snapshot.nodes.get(peer.name)
        if node is None or node.public_key != peer.public_key:
            addresses += [network.network_address for network in peer.allowed_ips if network.num_addresses == 1][:1]
        elif own is None or former.endpoint == peer.endpoint or begins(own, node, peer):
            addresses += node.mesh_addresses[:1]
    return addresses


def trigger_handshakes(addresses: Iterable[IPAddress]) -> None:
    """Send each address one small packet, so that WireGuard starts its handshake now and not with the first packet of a
    user."""
    for address in addresses:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        with suppress(OSError), socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_NONBLOCK) as out:
            out.sendto(b"\0", (str(address), DISCARD_PORT))
