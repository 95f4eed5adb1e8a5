"""NAT traversal of two nodes behind NATs: where one looks for the other, and what to report of a pair that fails.

A NAT lets in what answers something sent out, so two hosts behind different NATs meet when both send to where the
other's NAT shows it, at about the same time, and keep sending (persistent keepalive). Public hosts have seen where that
is (`Node.observed_endpoints`). It is a guess: a NAT that shows each partner another port (symmetric) shows the next one
a third. Such a host connects to hosts whose NAT lets in packets from all (full cone), and to no others behind a NAT.

Pure. It cannot know what a NAT lets in; the host's own WireGuard shows whether a pair has a handshake.
"""

from __future__ import annotations

from kilo_etcd.model import DEFAULT_LOCATION, Endpoint, IPAddress, Node, Peer
from kilo_etcd.topology.families import families, pair_family, same_site

REMEDY = (
    "let a host with a public endpoint lead the location of one of them, or forward a UDP port to one of them and "
    "name it with force-endpoint"
)


_NO_TUNNEL = "no tunnel to node "


def about_partner(text: str) -> str | None:
    """The node that a sentence of `traversal_failures` is about; None: it is another sentence."""
    return text.removeprefix(_NO_TUNNEL).partition(": ")[0] if text.startswith(_NO_TUNNEL) else None


def observed_endpoint(own: Node, other: Node | Peer, registered: Endpoint | None) -> Endpoint | None:
    """Where `own` looks for `other`, which it would reach at `registered` otherwise; None: there."""
    if not other.observed_endpoints or (registered is not None and registered.public):
        return None
    address = None if registered is None else registered.address
    for observed in other.observed_endpoints:
        if observed.address is None or observed.address.version not in families(own):
            continue
        if address is None:
            return observed
        if observed.address.version == address.version:
            return None if _neighbours(own, other, address, observed.address) else observed
    return None


def _neighbours(own: Node, other: Node | Peer, address: IPAddress, observed: IPAddress) -> bool:
    """Whether `address` is on a network of `own`'s, and not on another one that has the same numbers."""
    own_ip = own.internal_ip(address.version)
    if own_ip is None or address not in own_ip.network:
        return False
    shown = {endpoint.address for endpoint in own.observed_in(address.version)}
    return not shown or observed in shown


def hidden_pair(own: Node, other: Node) -> int | None:
    """The family in which the two reach each other, if both are behind NATs there and not at one site; else None."""
    if own.location == other.location and own.location != DEFAULT_LOCATION and same_site(own, other):
        return None
    version = pair_family(own, other)
    if version is None or own.public_in(version) or other.public_in(version):
        return None
    return version


def symmetric(node: Node, version: int) -> bool:
    """Whether the node's NAT shows each partner another port, as far as is seen."""
    return len(node.observed_in(version)) > 1


def hopeless(own: Node, other: Node) -> str | None:
    """Why the two cannot meet whatever they do, as a sentence without an end; None: they may."""
    version = hidden_pair(own, other)
    if version is None or not (symmetric(own, version) and symmetric(other, version)):
        return None
    return f"{own.name} and {other.name} are behind NATs that show each partner another port: neither finds the other"


def traversal_failures(own: Node, other: Node) -> str | None:
    """What to tell the operator of `own`, whose WireGuard receives nothing from `other`; None: nothing, it may just be
    down.

    For pairs that `hidden_pair` says yes to.
    """
    version = hidden_pair(own, other)
    if version is None:
        return None
    pair = f"{_NO_TUNNEL}{other.name}: it and {own.name} are both behind NAT"
    silent = [node.name for node in (own, other) if not node.persistent_keepalive]
    if silent:
        return f"{pair}, and {' and '.join(silent)} without persistent-keepalive; set it on both, or {REMEDY}"
    if not own.observed_in(version):
        return f"{pair}, and no host with a public endpoint sees {own.name}; {REMEDY}"
    if not other.observed_in(version):
        return None
    varying = [node.name for node in (own, other) if symmetric(node, version)]
    if not varying:
        return f"{pair}, and what they send does not get through; {REMEDY}"
    shows = f"the NAT of {varying[0]} shows" if len(varying) == 1 else "both NATs show"
    return f"{pair}, and {shows} each partner another port (symmetric), so the other cannot find it; {REMEDY}"
