"""Peers as text: Kilo's Peer manifests, in YAML or JSON, to and from records.

What is read may be one Peer or several (YAML documents, a List of Kubernetes, a JSON list), Kilo's custom resource or
just its fields; `kgctl peer show -o yaml` of one mesh is what `kgctl peer add -f -` of another takes. No message shows
what may be a secret: neither a preshared key nor what is written where one may have slipped to. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from attrs import frozen

from kilo_etcd.base.quoting import described, shown, shown_name
from kilo_etcd.model import Endpoint, IPNetwork
from kilo_etcd.store.records import PeerRecord, check_key, parse_keepalive, parse_network

API_VERSION = "kilo.squat.ai/v1alpha1"


@frozen
class NamedPeer:
    """A peer and its name; None where the text gives it none."""

    name: str | None
    record: PeerRecord


def read_peers(text: str, source: str) -> tuple[NamedPeer, ...]:
    """All peers in a text. ValueError, in one clause that names `source` and the field."""
    from kilo_etcd.ctl.formats.bounded_yaml import load_documents

    named_peers = tuple(_peer(item, source) for document in load_documents(text, source) for item in _items(document))
    if not named_peers:
        raise ValueError(f"{source} has no peer in it")
    return named_peers


def _items(document: Any) -> Iterator[Any]:
    if isinstance(document, list):
        for item in document:
            yield from _items(item)
    elif isinstance(document, Mapping) and isinstance(kind := document.get("kind"), str) and kind.endswith("List"):
        yield from _items(document.get("items") or [])
    else:
        yield document


def _peer(item: Any, source: str) -> NamedPeer:
    if not isinstance(item, Mapping):
        raise ValueError(f"{source}: {described(item)} is no peer")
    kind = item.get("kind", "Peer")
    if kind != "Peer":
        raise ValueError(f"{source}: a {shown(kind)} is no Peer")
    metadata = item.get("metadata")
    name = metadata.get("name") if isinstance(metadata, Mapping) else item.get("name")
    if name is not None and not isinstance(name, str):
        raise ValueError(f"{source}: the name is {described(name)}, and no text")
    spec = item.get("spec", item)
    called = f"{source}: peer {name}" if name else source
    if not isinstance(spec, Mapping):
        raise ValueError(f"{called}: its spec is no mapping")
    known_fields = {"publicKey", "allowedIPs", "endpoint", "persistentKeepalive", "presharedKey"}
    beside = {"name", "apiVersion", "kind", "metadata", "status"} if spec is item else set()
    for field in spec:
        if field not in known_fields | beside:
            raise ValueError(
                f"{called}: {shown_name(field)} is no field of a peer; there are {', '.join(sorted(known_fields))}"
            )
    try:
        return NamedPeer(name, _record(spec))
    except ValueError as error:
        raise ValueError(f"{called}: {error}") from None


def _record(spec: Mapping[str, Any]) -> PeerRecord:
    allowed = [] if spec.get("allowedIPs") is None else spec["allowedIPs"]
    if not isinstance(allowed, list):
        raise ValueError("allowedIPs is no list")
    preshared = spec.get("presharedKey")
    keepalive = spec.get("persistentKeepalive")
    return PeerRecord(
        public_key=_in("publicKey", check_key, spec.get("publicKey")),
        allowed_ips=tuple(dict.fromkeys(_in("allowedIPs", exact_network, network) for network in allowed)),
        endpoint=_in("endpoint", _endpoint, spec.get("endpoint")),
        persistent_keepalive=_in("persistentKeepalive", parse_keepalive, 0 if keepalive is None else keepalive),
        preshared_key=None if preshared in (None, "") else _in("presharedKey", check_key, preshared),
    )


def _in(field: str, parse: Any, value: Any) -> Any:
    try:
        return parse(value)
    except ValueError as error:
        raise ValueError(f"{field}: {error}") from None


def exact_network(value: object) -> IPNetwork:
    """A network, or an address for a network of one; ValueError where bits beyond the prefix are set."""
    network = parse_network(value)
    text = str(value).strip()
    if text.partition("/")[0] != str(network.network_address) and "/" in text and _differs(text, network):
        raise ValueError(f"{shown(text)} is an address within {network}: write the address alone, or {network}")
    return network


def _differs(text: str, network: IPNetwork) -> bool:
    from ipaddress import ip_address

    return ip_address(text.partition("/")[0]) != network.network_address


def _endpoint(value: Any) -> Endpoint | None:
    if value is None or value == "":
        return None
    if isinstance(value, str):
        return Endpoint.parse(value)
    if not isinstance(value, Mapping):
        raise ValueError(f"{described(value)} is no endpoint")
    # Kilo's first releases had `ip` next to `port`.
    host = value.get("dnsOrIP", value)
    where = host.get("ip") or host.get("dns") if isinstance(host, Mapping) else None
    if not isinstance(where, str):
        raise ValueError("it has neither dnsOrIP.ip nor dnsOrIP.dns")
    port = value.get("port", "")
    if isinstance(port, bool) or not isinstance(port, int | str):
        raise ValueError(f"its port is {described(port)}")
    text = f"[{where}]" if ":" in where else where
    return Endpoint.parse(f"{text}:{port}")


def manifest(name: str, record: PeerRecord) -> dict[str, Any]:
    """Kilo's Peer."""
    spec: dict[str, Any] = {
        "allowedIPs": [str(network) for network in record.allowed_ips],
        "publicKey": record.public_key,
    }
    if record.endpoint is not None:
        kind = "dns" if isinstance(record.endpoint.host, str) else "ip"
        spec["endpoint"] = {"dnsOrIP": {kind: str(record.endpoint.host)}, "port": record.endpoint.port}
    if record.persistent_keepalive:
        spec["persistentKeepalive"] = record.persistent_keepalive
    if record.preshared_key is not None:
        spec["presharedKey"] = record.preshared_key
    return {"apiVersion": API_VERSION, "kind": "Peer", "metadata": {"name": name}, "spec": spec}


def as_text(manifests: list[dict[str, Any]], output: str) -> str:
    """Manifests as `yaml` documents, or as `json`: one as itself, several as a List."""
    if output == "json":
        document = manifests[0] if len(manifests) == 1 else {"apiVersion": "v1", "kind": "List", "items": manifests}
        return json.dumps(document, indent=2, ensure_ascii=False)
    import yaml

    text: str = yaml.safe_dump_all(manifests, sort_keys=False, allow_unicode=True)
    return text.rstrip("\n")
