"""The values of the keys: the records, and the conversion from bytes to records and back.

JSON with camelCase names where a program writes, plain text where a person does (docs/design.md, "Keys and
records"). Decoding takes any bytes at all and either returns a well-formed record or raises `RecordError` with one
clause that says what is wrong; it never raises anything else. A value that is longer than any of its kind has to be is
rejected unread (64 KiB for nodes and peers, less for the others). Encoding is canonical (sorted keys, no blanks, empty
fields left out), so equal records are equal bytes and "unchanged" is a comparison of bytes.

No message shows a value of a field that is marked secret, nor what else may be a key (`quoting`).

Unknown fields: a record is read without them, and `Read.unknown` names them. A peer is refused if one is most likely a
known field mistyped, since a person may have written it (docs/decisions/0039-unknown-fields-of-peers.md).

A start reads thousands of records, so a table of each kind's fields is all the machinery there is
(docs/decisions/0018-records-by-a-table.md).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping
from enum import StrEnum
from heapq import nsmallest
from typing import Any, Generic, NamedTuple, TypeVar, Union, get_args, get_type_hints

from attrs import NOTHING, Attribute, field, fields, frozen

from kilo_etcd.base.fast_ip import ip_address, ip_interface, ip_network
from kilo_etcd.base.quoting import SECRET, described, shown, shown_name
from kilo_etcd.model import (
    CHOICES,
    DEFAULT_LOCATION,
    LARGEST_MTU,
    SMALLEST_MTU,
    CandidateClass,
    Encapsulate,
    EncryptionStage,
    Endpoint,
    Granularity,
    InternalIPs,
    IPAddress,
    IPInterface,
    IPNetwork,
    parse_value,
)
from kilo_etcd.model.node import LATEST_CLOCK_EPOCH, StatedNode

MAX_VALUE = 64 * 1024
"""Bytes. etcd takes 1.5 MiB; no record of ours comes near, and every agent would have to hold and read it."""
MAX_DIAGNOSTICS_RESPONSE = 1536 * 1024
"""Bytes; etcd's own limit. No agent reads responses."""
MAX_SMALL = 4 * 1024
"""Bytes of a value that has a few short fields, or is a name: candidacies, claims, labels, the mesh's settings."""
MAX_ANNOTATION = 16 * 1024
"""Bytes: room for some 800 networks."""
MAX_PROBE_REPORT = 16 * 1024
"""Bytes; its targets are node names."""
MAX_NAMED = 10
"""Unknown fields of one record that are named; the others are counted."""
_ALIKE = 0.8
"""From this ratio of common letters on two names of fields are taken for the same one."""
_MOST_SHOWN = 60
_MOST_REASON = 300
_REJECTED = b"\xffrejected: "
"""The prefix of a reason that replaces a rejected value; no record begins so, since it is no UTF-8."""
MAX_LABEL = 1024
"""Bytes of UTF-8 in a location label; it goes into keys, three times as long when encoded."""


class RecordError(ValueError):
    """A value that cannot be read; the text says why, in a clause that fits after the key and a colon."""


class Role(StrEnum):
    """What a node is in its segment."""

    LEADER = "leader"
    MEMBER = "member"
    ALONE = "alone"


@frozen(kw_only=True)
class NodeRecord(StatedNode):
    """What a node reports of itself, at `/kilo/by/<node>/node`. A label at `/kilo/locations/` replaces the location."""

    accepts_since: int | None = None
    """See `model.Node.accepts_since`."""
    mesh_addresses: tuple[IPInterface, ...] = ()
    """The mesh addresses that it has claimed, with the subnets that they are in: see `store.addresses`."""
    former_names: tuple[str, ...] = ()
    """Names that the host had before, for which there are labels or annotations still; for the host itself."""
    duplicate_of: tuple[str, ...] = ()
    """Nodes with the same public key and an older record, whose agents have run beside this host's: they are no former
    names of it. For the host itself."""


@frozen(kw_only=True)
class CandidateRecord:
    """A candidacy, at `/kilo/by/<node>/elections/<location>`. `since` is RFC 3339, for people."""

    rank: CandidateClass
    since: str = ""


@frozen(kw_only=True)
class PeerRecord:
    """A peer as the operator describes it, at `/kilo/peers/<name>`, with Kilo's field names."""

    public_key: str
    allowed_ips: tuple[IPNetwork, ...] = ()
    endpoint: Endpoint | None = None
    persistent_keepalive: int = 0
    preshared_key: str | None = field(default=None, repr=False, metadata={SECRET: "WireGuard key (32 bytes in base64)"})


@frozen(kw_only=True)
class StatusRecord:
    """What a living agent reports, at `/kilo-status/by/<node>/status`. While the key is there the agent lives."""

    public_key: str
    revision: int = 0
    """The snapshot that its kernel holds."""
    role: Role = Role.ALONE
    location: str = DEFAULT_LOCATION
    leader: str = ""
    """The node that it takes for its segment's leader; empty when alone."""
    granularity_flag: Granularity | None = None
    """`--mesh-granularity` as the agent was started; None: not given."""
    errors: tuple[str, ...] = ()
    rejected: int = 0
    """How many records it has rejected."""
    version: str = ""
    since: str = ""
    """RFC 3339: when the agent started; for people."""
    leads_since: str = ""
    """RFC 3339: when the host began to lead its location, whatever agents it has had since; empty: it does not lead."""
    address: str = ""
    """Where the host is reached, for the error that a second host of this name gets."""
    unreachable: tuple[Unreachable, ...] = ()
    """Members of its location that do not answer it at their internal IPs, as far as they fit."""
    unsigned: tuple[str, ...] = ()
    """Members at whose internal IPs something answers, but never with the member's key."""
    unanswered: tuple[str, ...] = ()
    """Nodes to which its WireGuard sends, and from which nothing comes."""
    unanswered_peers: tuple[str, ...] = ()
    """The same of outside peers."""
    answers: bool = False
    """Whether it answers others' peer queries; agents of older versions do not say so, and do not."""
    peer_query_port: int | None = None
    """Its UDP port for these (`--peer-query-port`); None: the usual one, 1107."""
    clear: tuple[str, ...] | None = None
    """What its operator leaves in clear under `encrypted` (`--clear`); None: the agent does not say."""


@frozen(kw_only=True)
class StageRecord:
    """How far a host with a living agent is in the switch to `encrypted`, at `/kilo-status/by/<node>/stage`.
    It is a key of its own because hosts that wait for others watch it, and a status would be too large for that."""

    revision: int = 0
    """A snapshot that its kernel holds, no older than the newest by which others take packets from the tunnels."""


class Unreachable(NamedTuple):
    """A node, and the internal IP at which it does not answer; in JSON a list."""

    node: str
    address: str
    routed: bool = False
    """Packets are sent there all the same: it has answered before, or is reached through a tunnel. Agents of older
    versions do not say so."""


class Tunnel(NamedTuple):
    """What a host's WireGuard knows of one peer; in JSON a list, since a full mesh has very many."""

    public_key: str
    handshake: int
    """Seconds since the last handshake; -1: never."""
    received: int
    """Bytes."""
    sent: int
    endpoint: str
    """Empty: none is known."""


class EchoCount(NamedTuple):
    """How many echo requests a mesh address was sent, and how many of them it has answered; in JSON a list."""

    address: str
    sent: int
    answered: int


class EchoSize(NamedTuple):
    """The largest packet, in bytes with its IP header, that a mesh address has answered; in JSON a list."""

    address: str
    size: int


class TakenRoute(NamedTuple):
    """The route that a host's kernel chooses for an address; in JSON a list."""

    address: str
    source: str
    """The source address that the agent's route prefers; empty: none."""
    route: str
    """As `ip route get` shows it, or why the kernel refuses such packets; and the rule of another program that leads
    there, if it is known."""
    foreign: bool
    """It is not the agent's route, or there is none."""


@frozen(kw_only=True)
class DiagnosticsRequest:
    """A diagnostics request of `kgctl` to living agents, at `/kilo-status/requests/<lease>`, under that lease."""

    nodes: tuple[str, ...] = ()
    """The nodes that are asked; empty: all."""
    tries: int = 0
    """How many nodes each is to send packets to, of its own choice; 0: to none."""
    targets: tuple[str, ...] = ()
    """Mesh addresses, internal IPs and endpoints that all are to send packets to besides."""
    trust_only: bool = False
    """Whether only agents are asked that do not follow this etcd, and only why."""


@frozen(kw_only=True)
class DiagnosticsResponse:
    """What an agent sees on its host, at `/kilo-status/by/<node>/responses/<lease of the request>`."""

    time: int = 0
    """Milliseconds since 1970 by the host's clock."""
    revision: int = 0
    """The snapshot that its kernel holds."""
    backend: str = ""
    """`kernel` or `userspace`."""
    mtu: int = 0
    """The tunnel's; 0: there is no interface."""
    uplink: str = ""
    """The device whose MTU gives that one; empty: another reason does, such as `--mtu` or a router on the way."""
    uplink_mtu: int = 0
    tunnels: tuple[Tunnel, ...] = ()
    undone: int = 0
    """How many changes would turn what the kernel holds into the plan; 0: nothing differs."""
    changes: tuple[str, ...] = ()
    """The first of them, as commands."""
    trouble: tuple[str, ...] = ()
    """What the agent found wrong when it was asked, beyond what its status says."""
    possible_obstacles: tuple[str, ...] = ()
    """What on the host may drop packets that it forwards. Of a member: what drops them for certain, which harms nobody
    until it leads."""
    untested_obstacles: tuple[str, ...] = ()
    """Those of `possible_obstacles` that may drop TCP or UDP on a host that leads, which no echo request tests."""
    own_losses: tuple[str, ...] = ()
    """What on the host drops all of TCP or UDP that it sends to the mesh itself, or gets from there."""
    refused: tuple[str, ...] = ()
    """The same of a firewall for what comes in, which may be meant."""
    limits_echoes: bool = False
    """Whether its firewall takes a limited number of echo requests, so that some that are lost say nothing."""
    reached: tuple[str, ...] = ()
    """Mesh addresses, and internal IPs and endpoints that it sends to by the mesh, that have answered its echo
    requests."""
    unreached: tuple[str, ...] = ()
    """Those that have not."""
    echoes: tuple[EchoCount, ...] = ()
    """Of the mesh addresses that have answered. Where some answers are missing packets get lost on the way."""
    small_only: tuple[str, ...] = ()
    """Of those that have answered, the ones that answer no packet as large as the tunnel's MTU."""
    largest: tuple[EchoSize, ...] = ()
    """Of `small_only`, the first ones: how large a packet they do answer, with don't-fragment set."""
    routes: tuple[TakenRoute, ...] = ()
    """The kernel's routes to the internal IPs among both; and those that are `foreign` to the mesh addresses among
    both, to members of its location and to the endpoints of its peers."""
    unanswered_peers: tuple[str, ...] = ()
    """The public keys of peers to which WireGuard sent something while the echo requests were sent, and from which
    nothing came."""
    unsent_peers: tuple[str, ...] = ()
    """Those of peers from which something came, and to which nothing was sent."""
    undecided: tuple[str, ...] = ()
    """Members of its location that have not answered it yet, and that its status does not name for it so far."""
    clear: tuple[str, ...] = ()
    """What its operator leaves in clear under `encrypted` (`--clear`), if that is in its plan."""
    untrusted: str = ""
    """Why it does not follow this etcd, as a sentence; then it says nothing else. Empty: it follows it."""


@frozen(kw_only=True)
class ObservedEndpointRecord:
    """Where the observer's WireGuard sees a node or peer, at `/kilo/by/<observer>/endpoints/<node or peer>`."""

    public_key: str
    """The owner's public key: names say less, since a host may be made anew, and a node and a peer may have one
    name."""
    endpoint: Endpoint


@frozen(kw_only=True)
class ProbeReportRecord:
    """What a prober found of a leader, at `/kilo/by/<prober>/probe-reports/<location>`: see `model.ProbeReport`."""

    leader: str
    candidacy: int
    targets: tuple[str, ...] = ()
    leader_reachable: bool = False
    members_reachable: bool = False
    can_take_over: bool = False
    unconfirmed: bool = False


R = TypeVar("R")


class Read(NamedTuple, Generic[R]):
    """A decoded record, and the fields that it had besides those we know: the first `MAX_NAMED` of them by name, cut
    where they are long, and how many more there are."""

    record: R
    unknown: tuple[str, ...] = ()
    more_unknown: int = 0
    unreadable: tuple[str, ...] = ()
    """Fields that the record can do without (`_OPTIONAL`) and that cannot be read, and why, in clauses."""


# --- single values -------------------------------------------------------------------------------------------------


# 256 bits in digits of six: of the last digit the two low bits are no part of the key, and zero.
_IS_KEY = re.compile(r"[A-Za-z0-9+/]{42}[AEIMQUYcgkosw048]=").fullmatch


def check_key(text: object) -> str:
    """A WireGuard key: 32 bytes in base64, spelled canonically."""
    if isinstance(text, str) and _IS_KEY(text):
        return text
    # Never shown: it may be a private or preshared key in the wrong place.
    raise ValueError(f"{described(text)} is no WireGuard key (32 bytes in base64)")


def parse_network(text: object) -> IPNetwork:
    """A CIDR; host bits are masked away, as wg(8) does it."""
    if not isinstance(text, str) or "%" in text:
        raise ValueError(f"{shown(text)} is no network (CIDR)")
    try:
        return ip_network(text.strip())
    except ValueError:
        raise ValueError(f"{shown(text)} is no network (CIDR)") from None


def parse_interface(text: object) -> IPInterface:
    """An address with its prefix length; without one it is a /32 or /128."""
    if not isinstance(text, str) or "%" in text:
        raise ValueError(f"{shown(text)} is no address with a prefix length")
    try:
        return ip_interface(text.strip())
    except ValueError:
        raise ValueError(f"{shown(text)} is no address with a prefix length") from None


def parse_address(text: object) -> IPAddress:
    """An address without a zone."""
    if not isinstance(text, str) or "%" in text:
        raise ValueError(f"{shown(text)} is no address")
    try:
        return ip_address(text.strip())
    except ValueError:
        raise ValueError(f"{shown(text)} is no address") from None


def parse_networks(text: str) -> tuple[IPNetwork, ...]:
    """Comma-separated CIDRs, duplicates dropped; empty text is none."""
    return tuple(dict.fromkeys(parse_network(part) for part in text.split(",") if part.strip()))


def parse_keepalive(value: object) -> int:
    """Seconds, 0 to 65535, as a number or (in an annotation) as text."""
    if isinstance(value, str) and value.strip().isdecimal() and len(value.strip()) <= 5:
        value = int(value)
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 65535:
        return value
    raise ValueError(f"{shown(value)} is no number of seconds from 0 to 65535")


def one_per_family(interfaces: tuple[IPInterface, ...]) -> tuple[IPInterface, ...]:
    """The same tuple, if it has at most one address per family; ValueError otherwise."""
    if len(interfaces) > 1 and len({interface.version for interface in interfaces}) != len(interfaces):
        raise ValueError("more than one address of a family")
    return interfaces


def decode_text(value: bytes, limit: int = MAX_VALUE) -> str:
    """Plain text as a person puts it: blanks around it do not count."""
    if value.startswith(_REJECTED):
        # It may also stand in etcd, put there by anybody: whatever it says is one line.
        reason = value[len(_REJECTED) : len(_REJECTED) + _MOST_REASON].decode(errors="replace")
        printable = "".join(letter if letter.isprintable() else " " for letter in reason).strip()
        raise RecordError(printable or "the value is not UTF-8")
    if len(value) > limit:
        raise RecordError(f"the value is {len(value)} bytes long; at most {limit} are read")
    try:
        return value.decode().strip()
    except UnicodeDecodeError:
        raise RecordError("the value is not UTF-8") from None


def rejected(value: bytes, reason: str) -> bytes:
    """What to keep in memory of a value that was rejected for `reason`: decoding it gives the same error. Short values
    stay as they are."""
    stub = _REJECTED + reason.encode("utf-8", "backslashreplace")[:_MOST_REASON]
    return stub if len(value) > len(stub) else value


def is_stub(value: bytes) -> bool:
    """Whether this is what `rejected` keeps, and not the value that is in etcd."""
    return value.startswith(_REJECTED)


def decode_label(value: bytes) -> str:
    """A location's name."""
    text = decode_text(value) if len(value) <= MAX_SMALL else None
    if text is None or len(text.encode()) > MAX_LABEL:
        raise RecordError(f"the name is longer than {MAX_LABEL} bytes")
    return text


_Setting = TypeVar("_Setting", bound=StrEnum)


def _setting(kind: type[_Setting], value: bytes, wrong: str) -> _Setting:
    """One of a kind's values; `wrong` says of another text that it is none."""
    text = decode_text(value, MAX_SMALL)
    try:
        return parse_value(kind, text)
    except ValueError:
        raise RecordError(f"{shown(text)} {wrong}: write {CHOICES[kind]}") from None


def decode_granularity(value: bytes) -> Granularity:
    """The mesh's granularity."""
    return _setting(Granularity, value, "is no granularity")


def decode_internal_ips(value: bytes) -> InternalIPs:
    """`routed`, `encrypted` or `off`."""
    return _setting(InternalIPs, value, "is not a value of internal-ips")


def decode_subnets(value: bytes) -> tuple[IPNetwork, ...]:
    """The mesh's subnets: at least one, at most one per family."""
    text = decode_text(value, MAX_SMALL)
    try:
        subnets = parse_networks(text)
    except ValueError as error:
        raise RecordError(str(error)) from None
    if not subnets:
        raise RecordError("no subnet is given: write something like 10.4.0.0/16")
    if len({subnet.version for subnet in subnets}) != len(subnets):
        raise RecordError("more than one subnet of a family is given")
    return subnets


def encode_subnets(subnets: tuple[IPNetwork, ...]) -> bytes:
    """What `decode_subnets` reads."""
    return ",".join(map(str, subnets)).encode()


def encode_adoption(cluster_id: int, moment: str) -> str:
    """That the etcd of this cluster id is the mesh's from `moment` (RFC 3339) on."""
    return f"{cluster_id:x} since {moment}"


def adopts(value: bytes | None, before: bytes | None, cluster_id: int) -> bool:
    """Whether an adoption, which is not the one known `before`, is of this cluster."""
    return (
        value is not None
        and value != before
        and len(value) <= MAX_SMALL
        and value.split(b" ")[0] == f"{cluster_id:x}".encode()
    )


# --- JSON ----------------------------------------------------------------------------------------------------------


def _string(value: object, _type: object = None) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{shown(value)} is no text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{shown(value)} is no Unicode text") from None
    return value


def _whole_number(value: object, _type: object = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"{shown(value)} is no whole number")
    return value


def _clock_epoch(value: object) -> int:
    if _whole_number(value) > LATEST_CLOCK_EPOCH:
        raise ValueError(f"{shown(value)} is no date of a clock (Unix seconds, at most {LATEST_CLOCK_EPOCH})")
    return _whole_number(value)


def _port(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 65536:
        raise ValueError(f"{shown(value)} is no port (1 to 65535)")
    return value


def _endpoint(value: object) -> Endpoint | None:
    if value is None:
        return None
    text = _string(value)
    if "%" in text or len(text) > 300:
        raise ValueError(f"{shown(text)} is no endpoint: write host:port, without a zone")
    return Endpoint.parse(text)


def _address_endpoint(value: object) -> Endpoint:
    endpoint = _endpoint(_string(value))
    if endpoint is None or endpoint.address is None:
        raise ValueError(f"{shown(value)} is no address and port")
    return endpoint


def _items(parse: Callable[[object], Any]) -> Callable[[object], tuple[Any, ...]]:
    def read(value: object) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ValueError(f"{shown(value)} is no list")
        if len(value) == 1:  # as most are
            return (parse(value[0]),)
        return tuple(dict.fromkeys(parse(item) for item in value))

    return read


def _chosen(kind: type[StrEnum] | type[CandidateClass]) -> Callable[[object], Any]:
    members = {member.value: member for member in kind}

    def read(value: object) -> Any:
        if isinstance(value, (str, int)) and not isinstance(value, bool) and value in members:
            return members[value]
        raise ValueError(f"{shown(value)} is none of {', '.join(str(member.value) for member in kind)}")

    return read


def _or_none(read: Callable[[object], Any]) -> Callable[[object], Any]:
    return lambda value: None if value is None else read(value)


def _label(value: object) -> str:
    text = _string(value)
    if len(text.encode()) > MAX_LABEL:
        raise ValueError(f"the name is longer than {MAX_LABEL} bytes")
    return text.strip()


def _name(value: object) -> str:
    text = _string(value)
    if not text or not text.isprintable() or len(text.encode()) > MAX_LABEL:
        raise ValueError(f"{shown(text)} is no name")
    return text


def _number(value: object) -> int:
    if value == -1 and not isinstance(value, bool):
        return -1
    return _whole_number(value)


def _truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{shown(value)} is neither true nor false")
    return value


def _echo_count(value: object) -> EchoCount:
    if not isinstance(value, list) or len(value) < len(EchoCount._fields):
        raise ValueError(f"{shown(value)} is no count of echo requests: a list of {', '.join(EchoCount._fields)}")
    address, sent, answered = value[: len(EchoCount._fields)]
    return EchoCount(_string(address), _whole_number(sent), _whole_number(answered))


def _echo_size(value: object) -> EchoSize:
    if not isinstance(value, list) or len(value) < len(EchoSize._fields):
        raise ValueError(f"{shown(value)} is no size of an echo request: a list of {', '.join(EchoSize._fields)}")
    address, size = value[: len(EchoSize._fields)]
    if not SMALLEST_MTU[4] <= _whole_number(size) <= LARGEST_MTU:
        raise ValueError(f"{shown(size)} is no MTU of a tunnel ({SMALLEST_MTU[4]} to {LARGEST_MTU})")
    return EchoSize(_string(address), size)


def _taken_route(value: object) -> TakenRoute:
    if not isinstance(value, list) or len(value) < len(TakenRoute._fields):
        raise ValueError(f"{shown(value)} is no route: a list of {', '.join(map(_camel, TakenRoute._fields))}")
    address, source, route, foreign = value[: len(TakenRoute._fields)]
    return TakenRoute(_string(address), _string(source), _string(route), _truth(foreign))


def _tunnel(value: object) -> Tunnel:
    if not isinstance(value, list) or len(value) < len(Tunnel._fields):
        raise ValueError(f"{shown(value)} is no tunnel: a list of {', '.join(map(_camel, Tunnel._fields))}")
    key, handshake, received, sent, endpoint = value[: len(Tunnel._fields)]
    return Tunnel(check_key(key), _number(handshake), _whole_number(received), _whole_number(sent), _string(endpoint))


def _unreachable(value: object) -> Unreachable:
    if not isinstance(value, list) or len(value) < 2:
        raise ValueError(f"{shown(value)} is no list of {', '.join(Unreachable._fields[:2])}")
    return Unreachable(_string(value[0]), _string(value[1]), len(value) > 2 and _truth(value[2]))


_networks = _items(parse_network)
_interfaces = _items(parse_interface)
_BY_NAME: Mapping[str, Callable[[object], Any]] = {
    "public_key": check_key,
    "preshared_key": _or_none(check_key),
    "location": _label,
    "port": _port,
    "clock_epoch": _or_none(_clock_epoch),
    "persistent_keepalive": lambda value: parse_keepalive(_whole_number(value)),
    "former_names": _items(_name),
    "duplicate_of": _items(_name),
    "underlay": _networks,  # never null: to state nothing is to leave it out
}
"""Fields that not every value of their type fits -> how they are read, in whatever kind of record."""
_BY_TYPE: Mapping[object, Callable[[object], Any]] = {
    str: _string,
    int: _whole_number,
    bool: _truth,
    Endpoint: _address_endpoint,
    Endpoint | None: _endpoint,
    tuple[str, ...]: _items(_string),
    tuple[str, ...] | None: _items(_string),  # never null either
    tuple[Endpoint, ...]: _items(_address_endpoint),
    tuple[IPInterface, ...]: lambda value: one_per_family(_interfaces(value)),
    tuple[IPNetwork, ...]: _networks,
    tuple[Unreachable, ...]: _items(_unreachable),
    tuple[Tunnel, ...]: _items(_tunnel),
    tuple[EchoCount, ...]: _items(_echo_count),
    tuple[EchoSize, ...]: _items(_echo_size),
    tuple[TakenRoute, ...]: _items(_taken_route),
    int | None: _or_none(_whole_number),
    Role: _chosen(Role),
    CandidateClass: _chosen(CandidateClass),
    Encapsulate: _chosen(Encapsulate),
    EncryptionStage | None: _or_none(_chosen(EncryptionStage)),
    Granularity | None: _or_none(_chosen(Granularity)),
}
"""The type of a field -> how it is read from JSON."""


def _camel(name: str) -> str:
    first, *rest = name.split("_")
    return first + "".join("IPs" if part == "ips" else part.capitalize() for part in rest)


class _Field(NamedTuple):
    """One field of a kind of record: its name here, and how it is read."""

    name: str
    read: Callable[[object], Any]


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, (int, str)):
        return value.value if isinstance(value, (StrEnum, CandidateClass)) else value
    return str(value)


def _withholding(parse: Callable[[object], Any], noun: str) -> Callable[[object], Any]:
    """Reads a secret: whatever is wrong with it, the message tells only what kind of value it is."""

    def read_secret(value: object) -> Any:
        try:
            return parse(value)
        except Exception:
            raise ValueError(f"{described(value)} is no {noun}") from None

    return read_secret


def _field(attribute: Attribute[Any], kind: object) -> _Field:
    secret, parse = attribute.metadata.get(SECRET), _BY_NAME.get(attribute.name) or _BY_TYPE[kind]
    return _Field(attribute.name, _withholding(parse, secret) if secret else parse)


def _fields(record: type) -> dict[str, _Field]:
    types = get_type_hints(record)
    return {_camel(attribute.name): _field(attribute, types[attribute.name]) for attribute in fields(record)}


Record = Union[  # noqa: UP007
    NodeRecord,
    CandidateRecord,
    PeerRecord,
    StatusRecord,
    StageRecord,
    DiagnosticsRequest,
    DiagnosticsResponse,
    ObservedEndpointRecord,
    ProbeReportRecord,
]
_RECORDS: tuple[type, ...] = get_args(Record)
_FIELDS = {record: _fields(record) for record in _RECORDS}
"""Kind -> its fields in JSON, in their order."""
_REQUIRED = {
    record: frozenset(_camel(attribute.name) for attribute in fields(record) if attribute.default is NOTHING)
    for record in _RECORDS
}
_OPTIONAL: Mapping[type, tuple[str, ...]] = {
    NodeRecord: ("encryption", "acceptsSince", "formerNames", "duplicateOf", "handshakeEpoch", "clockEpoch")
}
"""Kind -> the fields without which, if they cannot be read, the record is in force all the same: a stage that a later
version has must not take a node out of the mesh, nor what is for the host alone."""
_EMPTY: tuple[object, ...] = (None, "", [])
_ABSENT: dict[type, dict[str, tuple[object, ...]]] = {
    record: {_camel(attribute.name): (None,) for attribute in fields(record) if attribute.default is None}
    for record in _RECORDS
}
"""Kind -> the fields whose default is None: empty, they are written all the same."""


def encode(record: Record) -> bytes:
    """A record as it is put into etcd: JSON, canonical."""
    written = {name: _plain(getattr(record, spec.name)) for name, spec in _FIELDS[type(record)].items()}
    absent = _ABSENT[type(record)]
    fields = {name: value for name, value in written.items() if value not in absent.get(name, _EMPTY)}
    return json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()


def read(kind: type[R], value: bytes, limit: int = MAX_VALUE) -> Read[R]:
    """Any bytes to a record of `kind` and the names of its unknown fields; RecordError otherwise."""
    text = decode_text(value, limit)
    try:
        data = json.loads(text)
    except RecursionError:
        raise RecordError("the value is not JSON that anyone would write: it is nested too deeply") from None
    except ValueError as error:
        raise RecordError(f"the value is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise RecordError("the value is not a JSON object")
    known_fields = _FIELDS[kind]
    fields: dict[str, Any] = {}
    wrong: dict[str, Exception] = {}
    spared: dict[str, Exception] = {}
    unknown: list[str] = []
    for name, item in data.items():
        if name not in known_fields:
            unknown.append(name)
            continue
        field_name, read_one = known_fields[name]
        try:
            fields[field_name] = read_one(item)
        # Not ValueError alone: to show a value that is nested deeply can fail too.
        except Exception as error:
            (spared if name in _OPTIONAL.get(kind, ()) else wrong)[name] = error
    if wrong or not data.keys() >= _REQUIRED[kind]:
        raise RecordError(_complaint(kind, data, wrong))
    record = kind(**fields)
    if not unknown and not spared:
        return Read(record)
    return Read(record, *_named(unknown), tuple(f"{name}: {why}" for name, why in spared.items()))


def _named(unknown: list[str]) -> tuple[tuple[str, ...], int]:
    """The first names, fit to be shown, and how many more there are."""
    first = nsmallest(MAX_NAMED, unknown)
    cut = (name if len(name) <= _MOST_SHOWN else name[: _MOST_SHOWN - 3] + "..." for name in first)
    return tuple(name.encode("utf-8", "backslashreplace").decode() for name in cut), len(unknown) - len(first)


def _complaint(kind: type, data: dict[str, Any], wrong: dict[str, Exception]) -> str:
    # One field is enough to send a person there; the count says whether to go on looking.
    for name in _FIELDS[kind]:
        if name in _REQUIRED[kind] and name not in data:
            return f"the field {name} is missing"
    first = next(name for name in _FIELDS[kind] if name in wrong)
    return f"{first}: {wrong[first]}" + (f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else "")


def decode_node(value: bytes) -> NodeRecord:
    """Unknown fields are ignored; `read` names them."""
    return read(NodeRecord, value).record


def decode_candidate(value: bytes) -> CandidateRecord:
    """Unknown fields are ignored; `read` names them."""
    return read(CandidateRecord, value, MAX_SMALL).record


def decode_status(value: bytes) -> StatusRecord:
    """Unknown fields are ignored; `read` names them."""
    return read(StatusRecord, value).record


def decode_stage(value: bytes) -> StageRecord:
    """Unknown fields are ignored."""
    return read(StageRecord, value, MAX_SMALL).record


def decode_diagnostics_request(value: bytes) -> DiagnosticsRequest:
    """Unknown fields are ignored."""
    return read(DiagnosticsRequest, value).record


def decode_diagnostics_response(value: bytes) -> DiagnosticsResponse:
    """Unknown fields are ignored. A full mesh's is longer than other records."""
    return read(DiagnosticsResponse, value, MAX_DIAGNOSTICS_RESPONSE).record


def decode_observed_endpoint(value: bytes) -> ObservedEndpointRecord:
    """Unknown fields are ignored; `read` names them."""
    return read(ObservedEndpointRecord, value, MAX_SMALL).record


def decode_probe_report(value: bytes) -> ProbeReportRecord:
    """Unknown fields are ignored; `read` names them."""
    return read(ProbeReportRecord, value, MAX_PROBE_REPORT).record


PEER_FIELDS = tuple(sorted(_FIELDS[PeerRecord]))
"""The fields that a peer may have, as they are written in JSON."""


def decode_peer(value: bytes) -> PeerRecord:
    """As `read_peer`, without the unknown fields."""
    return read_peer(value).record


def read_peer(value: bytes) -> Read[PeerRecord]:
    """An unknown field is ignored and named, but for one that is most likely a mistyped one, which is an error."""
    decoded = read(PeerRecord, value)
    if not decoded.unknown:
        return decoded
    lacking = [
        _camel(attribute.name)
        for attribute in fields(PeerRecord)
        if getattr(decoded.record, attribute.name) == attribute.default
    ]
    # All of them: those that are named are the first by name.
    for name in sorted(json.loads(value).keys() - _FIELDS[PeerRecord].keys()):
        meant = _meant(name, lacking)
        if meant is not None:
            raise RecordError(f"{shown_name(name)}: no such field; {meant} is probably meant")
    return decoded


def _meant(unknown: str, lacking: Iterable[str]) -> str | None:
    """The field of those that the record lacks that `unknown` is spelled like, if there is one."""
    from difflib import SequenceMatcher

    def letters(name: str) -> str:
        return "".join(filter(str.isalnum, name)).casefold()

    spelled = letters(unknown)
    for name in lacking:
        alike = SequenceMatcher(None, spelled, letters(name))
        # The first two are quick, and never less than the third: a record may have thousands of such names.
        if min(alike.real_quick_ratio(), alike.quick_ratio()) >= _ALIKE and alike.ratio() >= _ALIKE:
            return name
    return None
