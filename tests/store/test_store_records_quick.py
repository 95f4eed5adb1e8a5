"""The quick readers against slow ones that say the same: equal values out of equal bytes, or equal words of refusal."""

from __future__ import annotations

import ipaddress
import json
from base64 import b64encode
from collections.abc import Callable
from functools import partial
from typing import Any
from urllib.parse import quote, unquote

import pytest
import reference_decoder
from attrs import fields
from hypothesis import example, given, settings
from hypothesis import strategies as st

from helpers import examples
from kilo_etcd.base import fast_ip
from kilo_etcd.store.keys import decode_name
from kilo_etcd.store.records import _FIELDS, _REQUIRED, MAX_VALUE, Read, RecordError, encode, read

# --- addresses --------------------------------------------------------------------------------------------------------

numbers = st.one_of(
    st.integers(0, 300).map(str), st.sampled_from(["", "0", "00", "01", "0x1", "1e0", " 1", "1 ", "+1", "-1", "²", "١"])
)
v4 = st.lists(numbers, min_size=1, max_size=5).map(".".join)
v6 = st.ip_addresses(v=6).map(str) | st.text("0123456789abcdef:.", max_size=20)
hosts = st.one_of(v4, st.ip_addresses(v=4).map(str), v6, st.text(max_size=8))
lengths = st.one_of(st.none(), numbers, st.integers(-1, 130).map(str), v4, st.just("24/8"))
written = st.builds(lambda host, length: host if length is None else f"{host}/{length}", hosts, lengths)


def outcome(work: Callable[[], Any]) -> tuple[Any, ...]:
    """What came of it: a value, with its type and all that is in it, or the words of a ValueError."""
    try:
        value = work()
    except ValueError as error:
        return "refused", str(error)
    return type(value), value, str(value), getattr(value, "network", None), hash(value)


@settings(max_examples=examples(400), deadline=None)
@given(written)
@example("10.0.0.1\0")
@example("10.0.0.1/")
@example("10.0.0.1/024")
@example("10.0.0.1/255.255.0.0")
@example("10.0.0.1/0.0.255.255")
@example("\ud800")
@example("10.0.0.1\n")
@example("1.2.3")
@example("0.0.0.0/0")
def test_addresses_are_read_as_ipaddress_reads_them(text: str) -> None:
    for quick, slow in (
        (fast_ip.ip_address, ipaddress.ip_address),
        (fast_ip.ip_interface, ipaddress.ip_interface),
        (fast_ip.ip_network, lambda text: ipaddress.ip_network(text, strict=False)),
    ):
        assert outcome(partial(quick, text)) == outcome(partial(slow, text))


@settings(max_examples=examples(200), deadline=None)
@given(st.text(max_size=8) | st.text("aZ09_.-~%/@é", max_size=8))
def test_names_are_decoded_only_from_the_one_way_to_write_them(text: str) -> None:
    try:
        name = unquote(text, errors="strict")
        expected = name if name and quote(name, safe="", errors="strict") == text else None
    except ValueError:
        expected = None
    assert decode_name(text) == expected


# --- records ----------------------------------------------------------------------------------------------------------

keys = st.binary(min_size=32, max_size=32).map(lambda raw: b64encode(raw).decode())
nearly_keys = st.one_of(
    keys, st.binary(max_size=33).map(lambda raw: b64encode(raw).decode()), keys.map(lambda key: key[:42] + "B="),
    keys.map(lambda key: key + "\n"), keys.map(lambda key: key[:-1] + "é"),
)  # fmt: skip
endpoints = st.builds(
    lambda host, port: f"{host}:{port}",
    st.one_of(hosts, hosts.map(lambda host: f"[{host}]"), st.sampled_from(["example.com", "Example.COM", "a_b", "-a"])),
    st.one_of(numbers, st.integers(-1, 70_000).map(str)),
)
integers = st.one_of(st.integers(-2, 70_000), st.integers(), st.booleans(), st.floats())
texts = st.text(max_size=6) | st.just("\ud800") | st.just("x" * 1100)
words = st.sampled_from(
    ["leader", "member", "alone", "location", "full", "cross", "never", "crosssubnet", "always", "wireguard", "0"]
)
single = st.one_of(nearly_keys, endpoints, written, integers, texts, words, st.none())
tunnels = st.lists(st.tuples(nearly_keys, integers, integers, integers, texts).map(list), max_size=2)
values = st.one_of(single, st.lists(single, max_size=3), tunnels, st.dictionaries(st.text(max_size=2), single))

nearly: dict[str, st.SearchStrategy[Any]] = {
    "publicKey": nearly_keys,
    "presharedKey": nearly_keys | st.none(),
    "endpoint": endpoints | st.none(),
    "moreEndpoints": st.lists(endpoints, max_size=3),
    "internalIPs": st.lists(written, max_size=3),
    "subnets": st.lists(written, max_size=3),
    "allowedIPs": st.lists(written, max_size=3),
    "location": texts,
    "encapsulate": words,
    "role": words,
    "granularityFlag": words | st.none(),
    "tunnels": tunnels,
}
"""Field -> what is nearly right there; of the others anything may be."""

sound_addresses = st.ip_addresses().map(str)
sound_networks = st.builds(lambda address, length: f"{address}/{length}", sound_addresses, st.integers(0, 32))
sound_endpoints = st.builds(
    lambda address, port: f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}",
    st.ip_addresses(),
    st.integers(1, 65535),
)
sound_texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
sound_numbers = st.integers(0, 60_000)
sound: dict[str, st.SearchStrategy[Any]] = {
    "publicKey": keys,
    "presharedKey": keys | st.none(),
    "endpoint": sound_endpoints,
    "moreEndpoints": st.lists(sound_endpoints, max_size=3),
    "unreachable": st.lists(st.tuples(sound_texts, sound_texts, st.booleans()).map(list), max_size=2),
    "routes": st.lists(st.tuples(sound_texts, sound_texts, sound_texts, st.booleans()).map(list), max_size=2),
    "port": st.integers(1, 65535),
    "encapsulate": st.sampled_from(["never", "crosssubnet", "always", "wireguard"]),
    "role": st.sampled_from(["leader", "member", "alone"]),
    "granularityFlag": st.sampled_from(["location", "full", "cross", None]),
    "rank": st.integers(0, 3),
    "tunnels": st.lists(
        st.tuples(keys, st.integers(-1, 9), sound_numbers, sound_numbers, sound_texts).map(list), max_size=2
    ),
}
sound |= dict.fromkeys(
    ("persistentKeepalive", "revision", "rejected", "time", "mtu", "undone", "candidacy", "tries", "acceptsSince"),
    sound_numbers,
)
sound |= dict.fromkeys(("internalIPs", "meshAddresses"), st.lists(sound_networks | sound_addresses, max_size=1))
sound |= dict.fromkeys(("subnets", "allowedIPs", "underlay"), st.lists(sound_networks, max_size=3))
sound |= dict.fromkeys(
    (
        *("nodes", "targets", "errors", "changes", "trouble", "possibleObstacles", "reached", "unreached", "smallOnly"),
        *("undecided", "unsigned", "clear"),
    ),
    st.lists(sound_texts, max_size=3),
)
sound |= dict.fromkeys(("answers", "leaderReachable", "membersReachable", "canTakeOver"), st.booleans())


@st.composite
def objects(draw: st.DrawFn, kind: type) -> bytes:
    """A JSON object for `kind`: half of them are sound, in the others some fields are not, or not quite."""
    all_sound = draw(st.booleans())
    data: dict[str, Any] = {}
    for name in reference_decoder.READERS[kind]:
        required = name in _REQUIRED[kind]
        how = 0 if all_sound else draw(st.integers(0, 5))
        if how <= 3 and (required or draw(st.booleans())):
            data[name] = draw(sound.get(name, sound_texts))
        elif how > 3:
            data[name] = draw(nearly.get(name, values) if how == 4 else values)
    if not draw(st.integers(0, 4)):
        data[draw(st.text(max_size=4) | st.just("\ud800"))] = draw(values)
    if not all_sound and not draw(st.integers(0, 9)):
        data.pop(draw(st.sampled_from(sorted(reference_decoder.READERS[kind]))), None)
    return json.dumps(data).encode()


def found(work: Callable[[], Any]) -> tuple[str, Any]:
    try:
        return "read", work()
    except RecordError as error:
        return "refused", str(error)


def test_every_kind_of_record_has_its_reference_decoder() -> None:
    assert reference_decoder.READERS.keys() == _FIELDS.keys()
    for kind, readers in reference_decoder.READERS.items():
        assert list(readers) == list(_FIELDS[kind])


@pytest.mark.parametrize("kind", reference_decoder.READERS, ids=lambda kind: kind.__name__)
def test_records_are_read_and_refused_as_the_reference_decoder_does(kind: type) -> None:
    @settings(max_examples=examples(200), deadline=None)
    @given(objects(kind))
    def holds(value: bytes) -> None:
        def ours() -> Any:
            got: Read[Any] = read(kind, value)
            return got.record, got.unknown

        mine, theirs = found(ours), found(lambda: reference_decoder.read(kind, value))
        assert mine == theirs
        if mine[0] == "read":
            record = mine[1][0]
            assert [type(part) for part in _parts(record)] == [type(part) for part in _parts(theirs[1][0])]
            assert encode(record) == reference_decoder.encode(record)
            # An empty field is left out, so what must be there must not be empty.
            if all(getattr(record, _FIELDS[kind][name].name) != "" for name in _REQUIRED[kind]):
                assert read(kind, encode(record)).record == record

    holds()


def _parts(record: Any) -> list[Any]:
    values = [getattr(record, each.name) for each in fields(type(record))]
    return [part for value in values for part in (value if isinstance(value, tuple) else (value,))]


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"[]",
        b"null",
        b"{",
        b"{}",
        b'{"publicKey":' + b"[" * 900 + b"]" * 900 + b"}",
        b'{"rank":1e0}',
        b'{"rank":1,"rank":2}',
        b'{"nodes":["a","a"]}',
        b'{"tunnels":[[]]}',
        b'{"publicKey":"","endpoint":"","port":0}',
        b'{"endpoint":"","port":0}',
    ],
)
@pytest.mark.parametrize("kind", reference_decoder.READERS, ids=lambda kind: kind.__name__)
def test_odd_values_are_read_and_refused_as_the_reference_decoder_does(kind: type, value: bytes) -> None:
    def ours() -> Any:
        got: Read[Any] = read(kind, value, MAX_VALUE)
        return got.record, got.unknown

    assert found(ours) == found(lambda: reference_decoder.read(kind, value))
