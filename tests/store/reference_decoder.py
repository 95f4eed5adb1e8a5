"""How records are read, said a second time and slowly: with cattrs, `ipaddress`, base64 and nothing that is there for
speed. `kilo_etcd.store.records` must read the same out of the same bytes, and refuse in the same words.

The names of the fields and kinds are the records' own; what each field may hold is said here anew.
"""

from __future__ import annotations

import json
from base64 import b64decode, b64encode
from collections.abc import Callable
from enum import Enum
from functools import partial
from ipaddress import ip_address, ip_interface, ip_network
from typing import Any

import cattrs
from attrs import fields
from cattrs.gen import make_dict_structure_fn, make_dict_unstructure_fn, override

from kilo_etcd.model import CandidateClass, Encapsulate, EncryptionStage, Endpoint, Granularity, is_dns_name
from kilo_etcd.store.records import (
    CandidateRecord,
    DiagnosticsRequest,
    DiagnosticsResponse,
    EchoCount,
    EchoSize,
    NodeRecord,
    ObservedEndpointRecord,
    PeerRecord,
    ProbeReportRecord,
    RecordError,
    Role,
    StageRecord,
    StatusRecord,
    TakenRoute,
    Tunnel,
    Unreachable,
)


def described(value: object) -> str:
    if isinstance(value, str):
        return f"a text of {len(value)} characters" if value else "an empty text"
    words = {type(None): "null", bool: "a truth value", int: "a number", float: "a number", list: "a list"}
    return words.get(type(value), "an object")


def short(value: object) -> str:
    if isinstance(value, (list, dict)):
        return described(value)
    if value is not None:
        run = 0
        for letter in str(value):
            run = run + 1 if letter.isascii() and (letter.isalnum() or letter in "+/=") else 0
            if run == 32:  # It may be a key.
                return described(value)
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def key(value: object) -> str:
    if isinstance(value, str) and len(value) == 44 and value.isascii():
        try:
            raw = b64decode(value, validate=True)
        except ValueError:
            raw = b""
        if len(raw) == 32 and b64encode(raw).decode() == value:
            return value
    raise ValueError(f"{described(value)} is no WireGuard key (32 bytes in base64)")


def network(value: object) -> Any:
    if not isinstance(value, str) or "%" in value:
        raise ValueError(f"{short(value)} is no network (CIDR)")
    try:
        return ip_network(value.strip(), strict=False)
    except ValueError:
        raise ValueError(f"{short(value)} is no network (CIDR)") from None


def interface(value: object) -> Any:
    if not isinstance(value, str) or "%" in value:
        raise ValueError(f"{short(value)} is no address with a prefix length")
    try:
        return ip_interface(value.strip())
    except ValueError:
        raise ValueError(f"{short(value)} is no address with a prefix length") from None


def string(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{short(value)} is no text")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{short(value)} is no Unicode text") from None
    return value


def label(value: object) -> str:
    text = string(value)
    if len(text.encode()) > 1024:
        raise ValueError("the name is longer than 1024 bytes")
    return text.strip()


def name(value: object) -> str:
    text = string(value)
    if text == "" or len(text.encode()) > 1024 or not all(letter.isprintable() for letter in text):
        raise ValueError(f"{short(text)} is no name")
    return text


def whole(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError(f"{short(value)} is no whole number")
    return value


def date(value: object) -> int:
    if whole(value) >= 2**32:
        raise ValueError(f"{short(value)} is no date")
    return whole(value)


def number(value: object) -> int:
    return -1 if value == -1 and not isinstance(value, bool) else whole(value)


def keepalive(value: object) -> int:
    if whole(value) > 65535:
        raise ValueError(f"{short(value)} is no number of seconds from 0 to 65535")
    return whole(value)


def port(value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 < value < 65536:
        raise ValueError(f"{short(value)} is no port (1 to 65535)")
    return value


def endpoint(value: object) -> Endpoint | None:
    if value is None:
        return None
    text = string(value)
    if "%" in text or len(text) > 300:
        raise ValueError(f"{short(text)} is no endpoint: write host:port, without a zone")
    text = text.strip()
    if text.startswith("["):
        name, closed, rest = text[1:].partition("]")
        if not closed or (rest and not rest.startswith(":")):
            raise ValueError(f"{short(text)} is no endpoint: write [address]:port")
        port_text = rest[1:]
    elif text.count(":") > 1:
        name, port_text = text, ""
    else:
        name, _, port_text = text.partition(":")
    if not port_text:
        raise ValueError(f"{short(text)} is no endpoint: the port is missing (host:port)")
    try:
        port = int(port_text)
    except ValueError:
        raise ValueError(f"{short(text)} is no endpoint: {short(port_text)} is no port") from None
    if not 0 < port < 65536:
        raise ValueError(f"{short(text)} is no endpoint: {short(port_text)} is not within 1 to 65535")
    try:
        return Endpoint(ip_address(name), port)
    except ValueError:
        if not is_dns_name(name):
            raise ValueError(
                f"{short(text)} is no endpoint: {short(name)} is neither an address nor a DNS name"
            ) from None
        return Endpoint(name.lower(), port)


def address_endpoint(value: object) -> Endpoint:
    found = endpoint(string(value))
    if found is None or found.address is None:
        raise ValueError(f"{short(value)} is no address and port")
    return found


def items(parse: Callable[[object], Any]) -> Callable[[object], tuple[Any, ...]]:
    def read(value: object) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ValueError(f"{short(value)} is no list")
        return tuple(dict.fromkeys(parse(item) for item in value))

    return read


def interfaces(value: object) -> tuple[Any, ...]:
    found = items(interface)(value)
    if len({one.version for one in found}) != len(found):
        raise ValueError("more than one address of a family")
    return found


def one_of(kind: type[Enum]) -> Callable[[object], Any]:
    def read(value: object) -> Any:
        if isinstance(value, (str, int)) and not isinstance(value, bool):
            for member in kind:
                if member.value == value:
                    return member
        raise ValueError(f"{short(value)} is none of {', '.join(str(member.value) for member in kind)}")

    return read


def or_none(read: Callable[[object], Any]) -> Callable[[object], Any]:
    return lambda value: None if value is None else read(value)


def or_nothing(read: Callable[[object], Any], nothing: object = None) -> Callable[[object], Any]:
    """Of a field that the record can do without."""

    def forgiving(value: object) -> Any:
        try:
            return nothing if value is None else read(value)
        except ValueError:
            return nothing

    return forgiving


def truth(value: object) -> bool:
    if not isinstance(value, bool):
        raise ValueError(f"{short(value)} is neither true nor false")
    return value


def echo_count(value: object) -> EchoCount:
    if not isinstance(value, list) or len(value) < 3:
        raise ValueError("no count")
    return EchoCount(string(value[0]), whole(value[1]), whole(value[2]))


def echo_size(value: object) -> EchoSize:
    if not isinstance(value, list) or len(value) < 2:
        raise ValueError("no size")
    if not 576 <= whole(value[1]) <= 65535:
        raise ValueError("no size of a packet")
    return EchoSize(string(value[0]), whole(value[1]))


def taken_route(value: object) -> TakenRoute:
    if not isinstance(value, list) or len(value) < 4:
        raise ValueError
    return TakenRoute(string(value[0]), string(value[1]), string(value[2]), truth(value[3]))


def tunnel(value: object) -> Tunnel:
    if not isinstance(value, list) or len(value) < 5:
        raise ValueError(f"{short(value)} is no tunnel: a list of publicKey, handshake, received, sent, endpoint")
    return Tunnel(key(value[0]), number(value[1]), whole(value[2]), whole(value[3]), string(value[4]))


def unreachable(value: object) -> Unreachable:
    if not isinstance(value, list) or len(value) < 2:
        raise ValueError(f"{short(value)} is no list of node, address")
    return Unreachable(string(value[0]), string(value[1]), len(value) > 2 and truth(value[2]))


READERS: dict[type, dict[str, Callable[[object], Any]]] = {
    NodeRecord: {
        "publicKey": key,
        "endpoint": endpoint,
        "moreEndpoints": items(address_endpoint),
        "internalIPs": interfaces,
        "underlay": items(network),
        "encryption": or_nothing(one_of(EncryptionStage)),
        "handshakeEpoch": or_nothing(whole),
        "clockEpoch": or_nothing(date),
        "subnets": items(network),
        "location": label,
        "port": port,
        "persistentKeepalive": keepalive,
        "encapsulate": one_of(Encapsulate),
        "version": string,
        "acceptsSince": or_nothing(whole),
        "meshAddresses": interfaces,
        "formerNames": or_nothing(items(name), ()),
        "duplicateOf": or_nothing(items(name), ()),
    },
    CandidateRecord: {"rank": one_of(CandidateClass), "since": string},
    PeerRecord: {
        "publicKey": key,
        "allowedIPs": items(network),
        "endpoint": endpoint,
        "persistentKeepalive": keepalive,
        "presharedKey": or_none(key),
    },
    StatusRecord: {
        "publicKey": key,
        "revision": whole,
        "role": one_of(Role),
        "location": label,
        "leader": string,
        "granularityFlag": or_none(one_of(Granularity)),
        "errors": items(string),
        "rejected": whole,
        "version": string,
        "since": string,
        "leadsSince": string,
        "address": string,
        "unreachable": items(unreachable),
        "unsigned": items(string),
        "unanswered": items(string),
        "unansweredPeers": items(string),
        "answers": truth,
        "peerQueryPort": or_none(whole),
        "clear": items(string),
    },
    StageRecord: {"revision": whole},
    DiagnosticsRequest: {"nodes": items(string), "tries": whole, "targets": items(string), "trustOnly": truth},
    DiagnosticsResponse: {
        "time": whole,
        "revision": whole,
        "backend": string,
        "mtu": whole,
        "uplink": string,
        "uplinkMtu": whole,
        "tunnels": items(tunnel),
        "undone": whole,
        "changes": items(string),
        "trouble": items(string),
        "possibleObstacles": items(string),
        "untestedObstacles": items(string),
        "ownLosses": items(string),
        "refused": items(string),
        "limitsEchoes": truth,
        "reached": items(string),
        "unreached": items(string),
        "echoes": items(echo_count),
        "smallOnly": items(string),
        "largest": items(echo_size),
        "routes": items(taken_route),
        "unansweredPeers": items(string),
        "unsentPeers": items(string),
        "undecided": items(string),
        "clear": items(string),
        "untrusted": string,
    },
    ObservedEndpointRecord: {"publicKey": key, "endpoint": address_endpoint},
    ProbeReportRecord: {
        "leader": string,
        "candidacy": whole,
        "targets": items(string),
        "leaderReachable": truth,
        "membersReachable": truth,
        "canTakeOver": truth,
        "unconfirmed": truth,
    },
}
"""Kind -> its fields in JSON, in their order, and what each may hold."""

STATED_EMPTY = {NodeRecord: "underlay", StatusRecord: "clear"}
"""Kind -> the list that is written even if it is empty: without it the host states nothing."""


def plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [plain(item) for item in value]
    if value is None or isinstance(value, (int, str)):
        return value.value if isinstance(value, Enum) else value
    return str(value)


def _structured(read: Callable[[Any], Any], value: Any, _type: object) -> Any:
    return read(value)


def _converter() -> cattrs.Converter:
    converter = cattrs.Converter(detailed_validation=True)
    for kind, readers in READERS.items():
        overrides: dict[str, Any] = {
            attribute.name: override(rename=name, struct_hook=partial(_structured, read),
                                     unstruct_hook=plain)
            for attribute, (name, read) in zip(fields(kind), readers.items(), strict=True)
        }  # fmt: skip
        converter.register_structure_hook(kind, make_dict_structure_fn(kind, converter, **overrides))
        converter.register_unstructure_hook(kind, make_dict_unstructure_fn(kind, converter, **overrides))
    return converter


CONVERTER = _converter()


def read(kind: type, value: bytes) -> tuple[Any, tuple[str, ...]]:
    """The record, and the names of unknown fields. RecordError."""
    try:
        data = json.loads(value.decode())
    except RecursionError:
        raise RecordError("the value is not JSON that anyone would write: it is nested too deeply") from None
    except ValueError as error:
        raise RecordError(f"the value is not JSON: {error}") from None
    if not isinstance(data, dict):
        raise RecordError("the value is not a JSON object")
    unknown = tuple(sorted(name.encode("utf-8", "backslashreplace").decode() for name in data.keys() - READERS[kind]))
    try:
        return CONVERTER.structure(data, kind), unknown
    except cattrs.ClassValidationError as error:
        raise RecordError(_explain(error, kind)) from None


def _explain(error: cattrs.ClassValidationError, kind: type) -> str:
    for inner in error.exceptions:
        if isinstance(inner, KeyError):
            return f"the field {inner.args[0]} is missing"
    first = error.exceptions[0]
    (note,) = (note for note in getattr(first, "__notes__", ()) if hasattr(note, "name"))
    written = dict(zip((attribute.name for attribute in fields(kind)), READERS[kind], strict=True))
    more = f" (and {len(error.exceptions) - 1} more)" if len(error.exceptions) > 1 else ""
    return f"{written[note.name]}: {first}{more}"


def encode(record: Any) -> bytes:
    """The record as it is in etcd."""
    written = CONVERTER.unstructure(record).items()
    stated = STATED_EMPTY.get(type(record))
    said = {name: value for name, value in written if value not in (None, "", []) or (name, value) == (stated, [])}
    return json.dumps(said, sort_keys=True, separators=(",", ":"), ensure_ascii=False).encode()
