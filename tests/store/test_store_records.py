"""Keys and records: what is written is read again, and any bytes at all are either a record or a RecordError."""

from __future__ import annotations

import json
from collections.abc import Callable
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from attrs import evolve
from hypothesis import example, given, settings
from hypothesis import strategies as st
from store_world import record, wg_key

from helpers import examples
from kilo_etcd.model import CandidateClass, Endpoint
from kilo_etcd.store import keys as k
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import (
    MAX_NAMED,
    CandidateRecord,
    NodeRecord,
    PeerRecord,
    RecordError,
    Role,
    StatusRecord,
    Unreachable,
    decode_candidate,
    decode_granularity,
    decode_internal_ips,
    decode_label,
    decode_node,
    decode_peer,
    decode_status,
    decode_subnets,
    encode,
    parse_networks,
    read_peer,
)

DECODERS = [
    decode_node,
    decode_candidate,
    decode_peer,
    decode_status,
    decode_granularity,
    decode_subnets,
    decode_label,
    decode_internal_ips,
]


def test_records_have_kilos_names_and_say_only_what_there_is() -> None:
    peer = PeerRecord(
        public_key=wg_key("p"),
        allowed_ips=parse_networks("10.99.0.0/24"),
        endpoint=Endpoint.parse("example.com:51820"),
        persistent_keepalive=10,
        preshared_key=wg_key("psk"),
    )
    assert json.loads(encode(peer)) == {
        "publicKey": wg_key("p"),
        "allowedIPs": ["10.99.0.0/24"],
        "endpoint": "example.com:51820",
        "persistentKeepalive": 10,
        "presharedKey": wg_key("psk"),
    }
    assert decode_peer(encode(peer)) == peer
    assert json.loads(encode(CandidateRecord(rank=CandidateClass.PUBLIC))) == {"rank": 2}


@pytest.mark.parametrize(
    "value",
    [
        record("a", internal_ips="10.0.0.1/24", subnets="172.16.0.0/16,fd00::/64", location="é/1", version="0.1"),
        record("b", endpoint=None),
    ],
)
def test_a_node_record_comes_back(value: NodeRecord) -> None:
    assert decode_node(encode(value)) == value


def test_a_status_comes_back() -> None:
    status = StatusRecord(
        public_key=wg_key("a"), role=Role.LEADER, errors=("x: y",), rejected=2, revision=7, answers=True,
        unreachable=(Unreachable("b", "10.0.0.2"), Unreachable("d", "10.0.0.4", True)), unsigned=("c",),
        clear=("tcp/22@10.0.0.0/24",),
    )  # fmt: skip
    assert decode_status(encode(status)) == status
    none = evolve(status, clear=())
    assert decode_status(encode(none)).clear == (), "that it exempts nothing is said"
    short = encode(status).replace(b',"10.0.0.4",true', b',"10.0.0.4"').replace(b',"10.0.0.2",false', b',"10.0.0.2"')
    assert [unreachable.routed for unreachable in decode_status(short).unreachable] == [False, False], (
        "of an agent before 'routed'"
    )
    older = json.loads(encode(status))
    for name in ("answers", "unreachable", "unsigned", "clear"):
        del older[name]
    decoded = decode_status(json.dumps(older).encode())
    assert (decoded.unreachable, decoded.clear) == ((), None), "of an agent that does not say so"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
field_names = st.sampled_from(
    [
        "publicKey",
        "endpoint",
        "internalIPs",
        "underlay",
        "subnets",
        "location",
        "port",
        "persistentKeepalive",
        "encapsulate",
        "rank",
    ]
    + ["since", "allowedIPs", "presharedKey", "errors", "role", "granularityFlag", "rejected", "revision", "leader"]
)
almost = st.dictionaries(field_names, json_values | st.just(wg_key("x")), max_size=5).map(
    lambda data: json.dumps({"publicKey": wg_key("x"), "rank": 1} | data).encode()
)


def test_a_host_that_reaches_nothing_is_not_one_that_does_not_say_what() -> None:
    record = NodeRecord(public_key=wg_key("x"))
    assert decode_node(encode(record)).underlay is None
    assert b"underlay" not in encode(record)
    assert decode_node(encode(evolve(record, underlay=()))).underlay == ()
    stated = (ip_network("10.1.0.0/24"), ip_network("fd00:1::/64"))
    assert decode_node(encode(evolve(record, underlay=stated))).underlay == stated


@example(b"\xffrejected: ")
@example(b"\xffrejected: a\nline that nobody has logged")
@settings(max_examples=examples(150), deadline=None)
@given(st.one_of(st.binary(max_size=60), json_values.map(lambda v: json.dumps(v).encode()), almost))
def test_any_bytes_are_a_record_or_a_record_error(value: bytes) -> None:
    for decode in DECODERS:
        found, text = _tried(decode, value)
        assert (found is None) == bool(text)
        assert "\n" not in text
        if decode is decode_node and found is not None:
            assert decode_node(encode(found)) == found


def _tried(decode: Callable[[bytes], Any], value: bytes) -> tuple[Any, str]:
    try:
        return decode(value), ""
    except RecordError as error:
        return None, str(error)


@pytest.mark.parametrize(
    "value",
    [
        b"[" * 50_000,
        b'{"publicKey":"\\ud800"}',
        b'{"publicKey":' + b"9" * 5000 + b"}",
        b'{"rank":NaN}',
        b'{"rank":true}',
        b'{"publicKey":"%s","location":"\\udfff","endpoint":"\\udfff"}' % wg_key("a").encode(),
    ],
)
def test_vicious_values_are_record_errors(value: bytes) -> None:
    for decode in DECODERS[:4]:
        with pytest.raises(RecordError):
            decode(value)


def test_an_address_with_a_zone_is_of_no_use_to_others() -> None:
    with pytest.raises(RecordError, match=r"endpoint: .* without a zone"):
        decode_node(b'{"publicKey":"%s","endpoint":"[fe80::1%%eth0]:1"}' % wg_key("a").encode())


@pytest.mark.parametrize(
    ("field", "meant"),
    [
        ('"allowedIps":[]', "allowedIPs"),
        ('"allowed_ips":[]', "allowedIPs"),
        ('"allowedIP":["10.9.0.0/24"]', "allowedIPs"),
        ('"presharedkey":"x"', "presharedKey"),
        ('"preSharedKey":"x"', "presharedKey"),
        ('"persistenKeepalive":25', "persistentKeepalive"),
        ('"Endpoint":"192.0.2.1:1"', "endpoint"),
    ],
)
def test_a_typing_error_in_a_peer_is_told_with_the_name_that_is_meant(field: str, meant: str) -> None:
    with pytest.raises(RecordError, match=f"no such field; {meant} is probably meant"):
        decode_peer(b'{"publicKey":"%s",%s}' % (wg_key("a").encode(), field.encode()))


@pytest.mark.parametrize("field", ['"mtu":1280', '"dns":["10.0.0.1"]', '"expires":"2027-01-01"', '"name":"x"'])
def test_a_peer_of_a_newer_kgctl_is_read_without_the_field_that_is_not_known(field: str) -> None:
    value = b'{"publicKey":"%s","allowedIPs":["10.9.0.0/24"],%s}' % (wg_key("a").encode(), field.encode())
    decoded = read_peer(value)
    assert decoded.unknown == (field.split('"')[1],)
    assert [str(network) for network in decoded.record.allowed_ips] == ["10.9.0.0/24"]


def test_a_typing_error_is_found_among_many_fields_that_are_not_known() -> None:
    more = ",".join(f'"aa{number}":1' for number in range(MAX_NAMED + 5))
    with pytest.raises(RecordError, match="allowedIps: no such field; allowedIPs is probably meant"):
        decode_peer(b'{"publicKey":"%s",%s,"allowedIps":[]}' % (wg_key("a").encode(), more.encode()))


def test_a_field_like_one_that_the_peer_has_is_no_typing_error() -> None:
    value = b'{"publicKey":"%s","endpoint":"192.0.2.1:1","endpoints":[]}' % wg_key("a").encode()
    assert read_peer(value).unknown == ("endpoints",)


# --- keys -------------------------------------------------------------------------------------------------------------

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)


@given(texts, texts.filter(bool), texts.filter(bool))
def test_every_key_says_what_it_stands_for(location: str, name: str, other: str) -> None:
    keys = Keys("/mesh/one/")
    assert keys.parse(keys.election(location, name)) == k.ElectionKey(location, name)
    assert keys.parse(keys.leader(location, name).encode()) == k.LeaderKey(location, name)
    assert keys.parse(keys.annotation(name, other)) == k.AnnotationKey(name, other)
    assert keys.parse(keys.endpoint(name, other)) == k.EndpointKey(name, other)
    assert keys.parse(keys.location(name)) == k.LocationKey(name)
    assert keys.parse(keys.node(name)) == k.NodeKey(name)
    assert keys.parse(keys.peer(name)) == k.PeerKey(name)
    assert keys.parse(keys.status(name)) == k.StatusKey(name)
    assert keys.parse(keys.stage(name)) == k.StageKey(name)
    assert keys.node(name).count("/") == 5
    assert keys.parse(keys.response(0x12AB, name)) == k.ResponseKey(name, 0x12AB)


def test_keys_as_a_person_types_them() -> None:
    keys = Keys()
    assert keys.location("node-1.example_x~") == "/kilo/locations/node-1.example_x~"
    assert keys.leader("", "a") == "/kilo/by/a/leaders/@default"
    assert keys.leader("@default", "a") == "/kilo/by/a/leaders/%40default"
    assert keys.status("a") == "/kilo-status/by/a/status"
    assert not keys.status("a").startswith(keys.root)
    assert keys.parse("/kilo/by/a/addresses/fd00::1") == k.AddressKey("a", ip_address("fd00::1"))
    assert keys.parse("/kilo/peer-addresses/a/10.4.0.1") == k.PeerAddressKey("a", ip_address("10.4.0.1"))


@pytest.mark.parametrize(
    "key",
    [
        "/kilo/by/a/addresses/fd00:0::1",
        "/kilo/peer-addresses/a/10.4.0.01",
        "/kilo/by/a/addresses/fe80::1%25eth0",
        "/kilo/by/",
        "/kilo/by/a/",
        "/kilo/by//node",
        "/kilo/",
    ]
    + [
        "/kilo/by/a/node/b",
        "/kilo/nodes/a",
        "/kilo/by/a/leaders/",
        "/kilo/by/%zz/node",
        "/kilo/by/a%2db/node",
        "/other/by/a/node",
        "/kiloby/a/node",
    ],
)
def test_other_spellings_are_no_keys(key: str) -> None:
    assert Keys().parse(key) is None
    assert Keys().parse(key.encode()) is None
    assert Keys().hint(key)
