"""What holds for the mesh as a whole, how a location's nodes reach each other, and the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from enum import StrEnum
from typing import NamedTuple, TypeVar

from kilo_etcd.base.quoting import either
from kilo_etcd.model.addresses import IPNetwork

DEFAULT_LOCATION = ""
DEFAULT_PREFIX = "/kilo"
DEFAULT_INTERFACE = "kilo0"
DEFAULT_STATE_DIR = "/var/lib/kilo-etcd"
PEER_QUERY_PORT = 1107
"""UDP, of peer queries; Kilo's number."""

SMALLEST_MTU, LARGEST_MTU = {4: 576, 6: 1280}, 65535
"""Bytes: what each family demands of a link (RFC 791, RFC 8200), so of the tunnel too, and the largest packet."""
DEFAULT_PORT = 51820
DEFAULT_SUBNET = "10.4.0.0/16"


_Value = TypeVar("_Value", bound=StrEnum)


def parse_value(kind: type[_Value], text: str) -> _Value:
    """The value that a person wrote, wherever it was: neither case nor blanks around it count. ValueError."""
    return kind(text.strip().lower())


class Granularity(StrEnum):
    """How segments are formed (docs/design.md, "Segments, granularity and topology")."""

    LOCATION = "location"
    FULL = "full"
    CROSS = "cross"


class InternalIPs(StrEnum):
    """What of the traffic between the hosts' internal IPs travels in the tunnels."""

    OFF = "off"
    """None of it."""
    ROUTED = "routed"
    """What goes to internal IPs of other segments."""
    ENCRYPTED = "encrypted"
    """The same, and nothing between nodes of two segments travels in clear."""


CHOICES: Mapping[type[StrEnum], str] = {
    Granularity: either(*Granularity),
    InternalIPs: either(InternalIPs.ROUTED, InternalIPs.ENCRYPTED, InternalIPs.OFF),
}
"""A setting of the mesh -> its values, as sentences list them."""


class EncryptionStage(StrEnum):
    """How far a node is with the switch to `encrypted`, as it reports it. No stage: none of it is in its kernel.

    Each is reported once the kernel holds it, and given up before the kernel does (`topology.stages`).
    """

    ACCEPTS = "accepts"
    """It takes what others send it through the tunnels, and begins to send so itself."""
    SENDS = "sends"
    """It also sends through the tunnel to all nodes that accept it, and refuses clear text of those that send so
    too."""
    LEAVES = "leaves"
    """On the way back: it refuses nothing any more."""
    STOPPED = "stopped"
    """On the way back: it sends nothing so any more; it still takes it."""


ACCEPTING = (EncryptionStage.ACCEPTS, EncryptionStage.SENDS)
"""The stages of nodes that take part in `encrypted`."""


class MeshSettings(NamedTuple):
    """What holds for the mesh as a whole: written by the first agent, changed by operators."""

    granularity: Granularity
    subnets: tuple[IPNetwork, ...]
    internal_ips: InternalIPs = InternalIPs.ROUTED


class Encapsulate(StrEnum):
    """How nodes of one location reach each other when they are not on one link (docs/design.md, "Segments, granularity
    and topology")."""

    NEVER = "never"
    CROSSSUBNET = "crosssubnet"
    ALWAYS = "always"
    WIREGUARD = "wireguard"
