"""Where things are in etcd: every key that kilo-etcd writes or reads, built and parsed in one place (docs/design.md,
"Keys and records").

A host writes its own keys below `by/<node>/`, under the watched prefix and under the status prefix, so a role in etcd
can confine each host to its own keys (decision 0034). All other keys are the operator's.

Names inside keys (nodes, peers, locations, annotations, observers) are percent-encoded: letters, digits and `_.-~`
stand for themselves, every other byte of the UTF-8 text is `%XX`, so a name never adds a level. The default location,
whose name is empty, is written `@default`: `@` is always encoded in a name, so no label can collide with it, and
a person can type it. Addresses are written as `ipaddress` writes them, colons and all.

There is exactly one key for a thing. `parse` refuses (None) every other spelling, such as `%2D` for `-`, because two
keys for one node would be two truths; `hint` says how it should have been written.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import TypeAlias
from urllib.parse import quote, unquote

from attrs import field, frozen

from kilo_etcd.base.fast_ip import ip_address
from kilo_etcd.model import DEFAULT_PREFIX, IPAddress

DEFAULT_LOCATION_IN_KEYS = "@default"


@frozen
class GranularityKey:
    """`mesh/granularity`: how nodes are grouped into segments."""


@frozen
class SubnetsKey:
    """`mesh/subnets`: the networks from which mesh addresses are."""


@frozen
class InternalIPsKey:
    """`mesh/internal-ips`: whether internal IPs are routed, and encrypted."""


@frozen
class AdoptedKey:
    """`mesh/adopted`: which etcd is the mesh's, after it was restored or replaced."""


@frozen
class LocationKey:
    """`locations/<node>`: the operator's label of a node."""

    node: str


@frozen
class AnnotationKey:
    """`annotations/<node>/<name>`: one of the operator's settings of a node."""

    node: str
    name: str


@frozen
class PeerKey:
    """`peers/<name>`: the record of an outside peer, or of a machine that is connected."""

    name: str


@frozen
class AddressKey:
    """`by/<node>/addresses/<ip>`: a node's claim of a mesh address."""

    node: str
    address: IPAddress


@frozen
class ReservationKey:
    """`by/<node>/reservation`: the node's claims of mesh addresses are kept for it."""

    node: str


@frozen
class PeerAddressKey:
    """`peer-addresses/<peer>/<ip>`: an outside peer's claim of a mesh address."""

    peer: str
    address: IPAddress


@frozen
class NodeKey:
    """`by/<node>/node`: what a host reports of itself."""

    node: str


@frozen
class ElectionKey:
    """`by/<node>/elections/<location>`: a candidacy."""

    location: str
    node: str


@frozen
class LeaderKey:
    """`by/<node>/leaders/<location>`: the node leads the location, or led it last."""

    location: str
    node: str


@frozen
class EndpointKey:
    """`by/<observer>/endpoints/<name>`: where the observer's WireGuard sees a node or peer behind NAT."""

    name: str
    observer: str


@frozen
class ProbeReportKey:
    """`by/<prober>/probe-reports/<location>`: what a prober found out about a location's leader."""

    location: str
    prober: str


@frozen
class StatusKey:
    """`<prefix>-status/by/<node>/status`: what an agent has applied, and its errors."""

    node: str


@frozen
class StageKey:
    """`<prefix>-status/by/<node>/stage`: the revision that a host has applied, for others that wait for it in the
    switch to `encrypted`."""

    node: str


@frozen
class ResponseKey:
    """`<prefix>-status/by/<node>/responses/<lease>`: the response to the request for diagnostics under a lease."""

    node: str
    lease: int


ParsedKey: TypeAlias = (
    GranularityKey
    | SubnetsKey
    | InternalIPsKey
    | AdoptedKey
    | LocationKey
    | AnnotationKey
    | PeerKey
    | AddressKey
    | ReservationKey
    | PeerAddressKey
    | NodeKey
    | ElectionKey
    | LeaderKey
    | EndpointKey
    | ProbeReportKey
    | StatusKey
    | StageKey
    | ResponseKey
)


def encode_name(name: str) -> str:
    """A name as written in a key. ValueError if it is empty or no Unicode text."""
    if not name:
        raise ValueError("a name in a key must not be empty")
    return quote(name, safe="", errors="strict")


# Names that are written as they are, as most names.
_IS_PLAIN = re.compile(r"[A-Za-z0-9_.~-]+").fullmatch


def decode_name(text: str) -> str | None:
    """The name that `encode_name` wrote; None if `text` is not how that name is written."""
    if _IS_PLAIN(text):
        return text
    try:
        name = unquote(text, errors="strict")
        return name if name and encode_name(name) == text else None
    except ValueError:
        return None


def encode_location(location: str) -> str:
    """A location as written in a key; the default location is `@default`."""
    return encode_name(location) if location else DEFAULT_LOCATION_IN_KEYS


def decode_location(text: str) -> str | None:
    """The location that `encode_location` wrote, or None."""
    return "" if text == DEFAULT_LOCATION_IN_KEYS else decode_name(text)


def _without_slash(prefix: str) -> str:
    return prefix.rstrip("/")


def leased_by(key: ParsedKey | None) -> str | None:
    """The node whose agent alone writes a key, under its short lease; None: it is no such key."""
    match key:
        case (
            ElectionKey(node=name)
            | StatusKey(node=name)
            | StageKey(node=name)
            | EndpointKey(observer=name)
            | ProbeReportKey(prober=name)
        ):
            return name
    return None


def ends_with(key: ParsedKey | None) -> str | None:
    """The node with whose leases a key ends, the long one or the short one; None: it is no such key."""
    return key.node if isinstance(key, LeaderKey) else leased_by(key)


def written_by(key: ParsedKey | None) -> str | None:
    """The node whose host alone writes a key, under a lease or not; None: it is the operator's."""
    return key.node if isinstance(key, NodeKey | AddressKey | ReservationKey | ResponseKey) else ends_with(key)


def record_endings(name: str) -> tuple[str, str]:
    """What the keys of the records of a node and of an outside peer of this name end with, under any prefix."""
    keys = Keys()
    return keys.node(name).removeprefix(keys.prefix), keys.peer(name).removeprefix(keys.prefix)


@frozen
class Keys:
    """The keys under one prefix.

    >>> Keys().election("", "node-1")
    '/kilo/by/node-1/elections/@default'
    >>> Keys().parse("/kilo/locations/node-1")
    LocationKey(node='node-1')
    """

    prefix: str = field(default=DEFAULT_PREFIX, converter=_without_slash)

    @prefix.validator
    def _check_prefix(self, _attribute: object, value: str) -> None:
        if not value:
            raise ValueError("the prefix must not be empty: write something like /kilo")

    @property
    def root(self) -> str:
        """What the mirror watches: all keys but the statuses."""
        return self.prefix + "/"

    @property
    def granularity(self) -> str:
        """How nodes are grouped; one value for the mesh."""
        return self.root + "mesh/granularity"

    @property
    def subnets(self) -> str:
        """The networks from which mesh addresses are; one value for the mesh."""
        return self.root + "mesh/subnets"

    @property
    def internal_ips(self) -> str:
        """Whether internal IPs are routed, and encrypted; one value for the mesh."""
        return self.root + "mesh/internal-ips"

    @property
    def settings(self) -> tuple[str, str, str]:
        """The keys that every mesh has."""
        return self.granularity, self.subnets, self.internal_ips

    @property
    def adopted(self) -> str:
        """Says which etcd is the mesh's, after it was restored or replaced: `kgctl mesh adopt`."""
        return self.root + "mesh/adopted"

    @property
    def locations_root(self) -> str:
        """What the labels of all nodes begin with."""
        return self.root + "locations/"

    def location(self, node: str) -> str:
        """The label of a node. ValueError if `node` is no name for a key; so for all names here."""
        return self.locations_root + encode_name(node)

    @property
    def annotations_root(self) -> str:
        """What the annotations of all nodes begin with."""
        return self.root + "annotations/"

    def annotations(self, node: str) -> str:
        """What the annotations of one node begin with."""
        return f"{self.annotations_root}{encode_name(node)}/"

    def annotation(self, node: str, name: str) -> str:
        """The annotation `name` of a node, whether an annotation of that name is known or not."""
        return self.annotations(node) + encode_name(name)

    @property
    def peers_root(self) -> str:
        """What the records of all outside peers begin with."""
        return self.root + "peers/"

    def peer(self, name: str) -> str:
        """The record of an outside peer."""
        return self.peers_root + encode_name(name)

    @property
    def peer_addresses_root(self) -> str:
        """What the claims of all outside peers begin with."""
        return self.root + "peer-addresses/"

    def peer_addresses(self, peer: str) -> str:
        """What the claims of one outside peer begin with."""
        return f"{self.peer_addresses_root}{encode_name(peer)}/"

    def peer_address(self, peer: str, address: IPAddress) -> str:
        """An outside peer's claim of a mesh address."""
        return f"{self.peer_addresses(peer)}{address}"

    @property
    def by_root(self) -> str:
        """What the keys that hosts write begin with, but for those beside the watched prefix."""
        return self.root + "by/"

    def by(self, node: str) -> str:
        """What the keys begin with that the host of `node` writes under the watched prefix."""
        return f"{self.by_root}{encode_name(node)}/"

    def node(self, name: str) -> str:
        """The record of a node."""
        return self.by(name) + "node"

    def election(self, location: str, node: str) -> str:
        """The candidacy of a node in a location; empty is the default location, here and below."""
        return f"{self.by(node)}elections/{encode_location(location)}"

    def addresses(self, node: str) -> str:
        """What the claims of one node begin with."""
        return self.by(node) + "addresses/"

    def address(self, node: str, address: IPAddress) -> str:
        """A node's claim of a mesh address."""
        return f"{self.addresses(node)}{address}"

    def reservation(self, node: str) -> str:
        """What keeps a node's claims for it: it outlives its record."""
        return self.by(node) + "reservation"

    def leader(self, location: str, node: str) -> str:
        """The record that a node leads a location."""
        return f"{self.by(node)}leaders/{encode_location(location)}"

    def endpoints(self, observer: str) -> str:
        """What the observed endpoints of one observer begin with."""
        return self.by(observer) + "endpoints/"

    def endpoint(self, name: str, observer: str) -> str:
        """Where `observer` sees the node or peer `name`."""
        return self.endpoints(observer) + encode_name(name)

    def probe_reports(self, prober: str) -> str:
        """What the reports of one prober begin with."""
        return self.by(prober) + "probe-reports/"

    def probe_report(self, location: str, prober: str) -> str:
        """The report of a prober about the leader of a location."""
        return self.probe_reports(prober) + encode_location(location)

    @property
    def status_root(self) -> str:
        """Outside the watched prefix, so that a status wakes no agent."""
        return self.prefix + "-status/"

    @property
    def status_by_root(self) -> str:
        """What the keys that hosts write beside the watched prefix begin with."""
        return self.status_root + "by/"

    def status_by(self, node: str) -> str:
        """What the keys begin with that the host of `node` writes beside the watched prefix."""
        return f"{self.status_by_root}{encode_name(node)}/"

    def status(self, node: str) -> str:
        """The status of a node's agent."""
        return self.status_by(node) + "status"

    def stage(self, node: str) -> str:
        """The revision that a node has applied, for the switch to `encrypted`."""
        return self.status_by(node) + "stage"

    @property
    def requests_root(self) -> str:
        """What all requests for diagnostics begin with."""
        return self.status_root + "requests/"

    def request(self, lease: int) -> str:
        """A request for diagnostics, by the lease that it is under."""
        return f"{self.requests_root}{lease:x}"

    def response(self, lease: int, node: str) -> str:
        """The response of a node's agent to the request under a lease."""
        return f"{self.status_by(node)}responses/{lease:x}"

    def parse(self, key: str | bytes) -> ParsedKey | None:
        """What a key stands for; None if it is none of ours or not spelled as these methods spell it."""
        text = _text(key)
        if text is None:
            return None
        if text.startswith(self.root):
            return _parse(text[len(self.root) :].split("/"))
        if text.startswith(self.status_by_root):
            return _parse_status(text[len(self.status_by_root) :].split("/"))
        return None

    def hint(self, key: str | bytes) -> str:
        """Why `parse` refused a key, as one clause."""
        text = _text(key)
        if text is None:
            return "the key is not UTF-8"
        parts = text.removeprefix(self.root).split("/")
        if _parse([parts[0], *(quote(unquote(part), safe="@") for part in parts[1:])]) is not None:
            return (
                "a name in the key is not spelled as kilo-etcd spells it: use percent-encoding (kgctl does it for you)"
            )
        if parts[0] == "mesh":
            known_keys = sorted(key.removeprefix(f"{self.root}mesh/") for key in (*self.settings, self.adopted))
            return f"no such key is known; below {self.root}mesh/ there are {', '.join(known_keys)}"
        return "no such key is known"


def key_text(key: str | bytes) -> str:
    """A key for people; bytes that are no UTF-8 are shown as escapes."""
    return key if isinstance(key, str) else key.decode("utf-8", "backslashreplace")


def _text(key: str | bytes) -> str | None:
    if isinstance(key, str):
        return key
    try:
        return key.decode()
    except UnicodeDecodeError:
        return None


def _parse(parts: list[str]) -> ParsedKey | None:
    match parts:
        case ["by", writer, *below]:
            node = decode_name(writer)
            return _parse_by(node, below) if node else None
        case ["mesh", "granularity"]:
            return GranularityKey()
        case ["mesh", "subnets"]:
            return SubnetsKey()
        case ["mesh", "internal-ips"]:
            return InternalIPsKey()
        case ["mesh", "adopted"]:
            return AdoptedKey()
        case ["peer-addresses", peer, text]:
            name, address = decode_name(peer), _address(text)
            return PeerAddressKey(name, address) if name and address else None
        case [("locations" | "peers") as kind, text]:
            name = decode_name(text)
            return None if not name else LocationKey(name) if kind == "locations" else PeerKey(name)
        case ["annotations", text, rest]:
            name, annotation = decode_name(text), decode_name(rest)
            return AnnotationKey(name, annotation) if name and annotation else None
    return None


_OF_LOCATION: Mapping[str, Callable[[str, str], ParsedKey]] = {
    "elections": ElectionKey,
    "leaders": LeaderKey,
    "probe-reports": ProbeReportKey,
}


def _parse_by(node: str, below: list[str]) -> ParsedKey | None:
    match below:
        case ["node"]:
            return NodeKey(node)
        case ["reservation"]:
            return ReservationKey(node)
        case ["addresses", text]:
            address = _address(text)
            return AddressKey(node, address) if address else None
        case [("elections" | "leaders" | "probe-reports") as kind, text]:
            location = decode_location(text)
            if location is None:
                return None
            return _OF_LOCATION[kind](location, node)
        case ["endpoints", text]:
            name = decode_name(text)
            return EndpointKey(name, node) if name else None
    return None


def _parse_status(parts: list[str]) -> ParsedKey | None:
    match parts:
        case [writer, ("status" | "stage") as kind]:
            node = decode_name(writer)
            return None if not node else StatusKey(node) if kind == "status" else StageKey(node)
        case [writer, "responses", text]:
            node, lease = decode_name(writer), _lease(text)
            return ResponseKey(node, lease) if node and lease else None
    return None


def _lease(text: str) -> int | None:
    try:
        lease = int(text, 16)
    except ValueError:
        return None
    return lease if f"{lease:x}" == text else None


def _address(text: str) -> IPAddress | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    return address if str(address) == text and "%" not in text else None
