"""Caches with a right checksum and wrong content: none ends the agent, and none is believed."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from attrs import evolve
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_agent_snapshot_cache import KEYS, PUBLIC, SECOND, WHO, holdings, put

from helpers import examples
from kilo_etcd.agent import cachefile
from kilo_etcd.agent.cachefile import FILE, TooLarge, Unusable, load, read, save
from kilo_etcd.etcd.api import KeyValue
from kilo_etcd.planning.plan import host_plan
from kilo_etcd.store.records import MAX_VALUE, PeerRecord, encode
from kilo_etcd.topology.segments import build_topology

SECRET = "c2VjcmV0IHNlY3JldCBzZWNyZXQgc2VjcmV0IHNlY3I="
FULL = holdings(**{
    KEYS.peer("phone"): encode(PeerRecord(public_key=SECOND, preshared_key=SECRET)),
    KEYS.granularity: b"full",
    KEYS.adopted: b"7 since 2026-11-24T00:00:00Z",
    KEYS.location("h1"): b"gcp",
    KEYS.election("gcp", "h1"): b'{"rank":2}',
})  # fmt: skip


def lines_of(path: Path) -> list[bytes]:
    """A valid cache's lines, the checksum's left out."""
    save(path, WHO, FULL, now=1000.0)
    return gzip.decompress(path.read_bytes()).splitlines()[:-1]


def refused(path: Path) -> str:
    """Why it cannot be used: a sentence that quotes nothing secret."""
    with pytest.raises(Unusable) as caught:
        load(path, WHO)
    sentence = str(caught.value)
    assert SECRET not in sentence
    assert "\n" not in sentence
    assert len(sentence) < 400
    return sentence


def headed(**values: object) -> Callable[[list[bytes]], list[bytes]]:
    return lambda lines: [json.dumps({**json.loads(lines[0]), **values}).encode(), *lines[1:]]


def without(name: str) -> Callable[[list[bytes]], list[bytes]]:
    def spoil(lines: list[bytes]) -> list[bytes]:
        head = json.loads(lines[0])
        del head[name]
        return [json.dumps(head).encode(), *lines[1:]]

    return spoil


def record(at: int, value: object) -> Callable[[list[bytes]], list[bytes]]:
    """The last key-value with one of its six parts replaced."""

    def spoil(lines: list[bytes]) -> list[bytes]:
        parts = json.loads(lines[-1])
        parts[at] = value
        return [*lines[:-1], json.dumps(parts).encode()]

    return spoil


def adopted(value: object) -> Callable[[list[bytes]], list[bytes]]:
    """The line that is looked at even if etcd answers."""
    return lambda lines: [*lines, json.dumps([KEYS.adopted, value, 3, 3, 1, 0]).encode()]


DEEP = b"[" * 100_000


@pytest.mark.parametrize(
    "spoil",
    [
        *(
            headed(**{name: value})
            for name in ("clusterId", "revision", "raftTerm")
            for value in (None, "7", 1.5, -1, 10**400, float("inf"), float("nan"), True, [7], {"a": 7}, 2**64)
        ),
        *(headed(written=value) for value in (None, "x", -1, 10**400, float("inf"), float("nan"), 1e300, True, [1.0])),
        *(headed(internalIPs=value) for value in ("", "yes", 1, ["off"])),
        *(headed(granularity=value) for value in ("", "planet", 1, ["location"], {"full": 1})),
        *(
            headed(subnets=value)
            for value in (None, 7, "10.4.0.0/16", ["x"], [7], [None], {"a": 1}, ["10.4.0.1/16"], [["10.4.0.0", 16]],
                          ["10.4.0.0/16", "10.5.0.0/16"])
        ),
        *(
            headed(**{name: value})
            for name in ("prefix", "node", "publicKey")
            for value in (None, 7, ["/kilo"], "x" * 9999)
        ),
        *(headed(format=value) for value in (None, 2, 10**300, "1", [1])),
        *map(without, ("format", "prefix", "node", "publicKey", "written")),
        *map(without, ("clusterId", "revision", "raftTerm", "subnets")),
        *(record(at, value) for at in (0, 1) for value in (None, 7, ["fe80::1%x/64"], {"a": 1}, 1.5)),
        *(
            record(at, value)
            for at in (2, 3, 4, 5)
            for value in (None, "7", 1.5, -1, 2**63, 10**400, float("inf"), True, [[7]])
        ),
        *map(adopted, (None, 7, ["10.4.0.0/16", "10.5.0.0/16"])),
        lambda lines: [*lines, DEEP],
        lambda lines: [DEEP, *lines[1:]],
        lambda lines: [DEEP],
        lambda lines: [*lines, f'["{KEYS.adopted}",'.encode() + DEEP],
        lambda lines: [*lines, b'{"a":' * 50_000],
        lambda lines: [*lines, b"9" * 10_000],
        lambda lines: [*lines, b"null"],
        lambda lines: [*lines, b"[1,1,1,1,1,1]"],
        lambda lines: [*lines, b'["a","b",1,1,1]'],
        lambda lines: [*lines, b'["a","b",1,1,1,1,1]'],
        lambda lines: [*lines, b'"abcdef"'],
        lambda lines: [*lines, b"\xff\xfe"],
        lambda lines: [*lines, b'["\\ud800","b",1,1,1,0]'],
        lambda lines: [*lines, b""],
        lambda lines: [b"null", *lines[1:]],
        lambda lines: [b"[]", *lines[1:]],
        lambda lines: [b'"format"', *lines[1:]],
        lambda lines: [json.dumps(["y" * cachefile.MAX_LINE]).encode(), *lines[1:]],
        lambda lines: lines[1:],
        lambda lines: lines[:1],
    ],
)  # fmt: skip
def test_wrong_content_with_a_right_checksum_is_refused_in_a_sentence(
    tmp_path: Path, spoil: Callable[[list[bytes]], list[bytes]]
) -> None:
    path = tmp_path / FILE
    put(path, spoil(lines_of(path)))
    before = path.read_bytes()
    assert str(path) in refused(path)
    assert path.read_bytes() == before


@pytest.mark.parametrize("size", [-100, -3, -2, -1, 0, 1, 5 * cachefile.MAX_LINE])
@pytest.mark.parametrize("at", [1, 2, -1])
def test_one_value_of_any_length_does_not_make_the_rest_unusable(tmp_path: Path, size: int, at: int) -> None:
    """Agents of earlier versions kept whatever stood under the prefix."""
    path = tmp_path / FILE
    lines = lines_of(path)
    whole = read(path, WHO)
    assert whole is not None
    around = len(json.dumps(["/kilo/x", "", 1, 1, 1, 0], separators=(",", ":"))) + 1
    value = "y" * (cachefile.MAX_LINE - around + size)
    long = json.dumps(["/kilo/x", value, 1, 1, 1, 0], separators=(",", ":")).encode()
    assert len(long) + 1 == cachefile.MAX_LINE + size
    put(path, [*lines, long] if at == -1 else [*lines[:at], long, *lines[at:]])
    cached = read(path, WHO)
    assert cached is not None
    assert set(cached.lines) - {long + b"\n"} == set(whole.lines)
    assert cached.decoded().snapshot.nodes == whole.decoded().snapshot.nodes
    # The length is no way around the checksum.
    spoiled = bytearray(gzip.decompress(path.read_bytes()))
    spoiled[spoiled.index(b"y" * 50_000) + 49_000] = ord("z")
    path.write_bytes(gzip.compress(bytes(spoiled)))
    assert "its checksum is wrong" in refused(path)


def test_a_checksum_line_that_is_no_object_and_a_bomb_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / FILE
    lines_of(path)
    for end in (b"null", b"[]", b"7", b'"x"', DEEP, b'{"sha256":null}'):
        path.write_bytes(gzip.compress(b"{}\n" + end + b"\n"))
        refused(path)
    # A thousandth of its size on the disk.
    path.write_bytes(gzip.compress(b"x" * (64 * 1024 * 1024)))
    assert "is cut short" in refused(path)
    monkeypatch.setattr(cachefile, "MAX_RECORDS", 20)
    put(path, [b"[]"] * 30)
    assert "more than is ever kept" in refused(path)
    monkeypatch.setattr(cachefile, "MAX_BYTES", 1000)
    for lines in ([b"x" * 100] * 11, [b"x" * 1000]):
        put(path, lines)
        assert "more than is ever kept" in refused(path)
    monkeypatch.setattr(cachefile, "MAX_LINE", 100)
    put(path, [b"x" * 1000])
    assert "more than is ever kept" in refused(path)
    path.write_bytes(b"x" * 1001)
    assert "is larger than 1000 bytes" in refused(path)


@pytest.mark.parametrize("error", [MemoryError(), RecursionError(), OverflowError(SECRET), KeyError(SECRET), OSError()])
def test_whatever_goes_wrong_while_it_is_read_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    path = tmp_path / FILE
    lines_of(path)
    cached = read(path, WHO)
    assert cached is not None

    def fails(*_: object) -> object:
        raise error

    monkeypatch.setattr(cachefile, "_kv", fails)
    refused(path)
    with pytest.raises(Unusable):
        cached.decoded()


values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(min_value=2**62, max_value=2**65)
    | st.floats()
    | st.text(max_size=20)
    | st.sampled_from(["h1", "/kilo", "location", "10.4.0.0/16", "::/0", "0.0.0.0/0", PUBLIC, SECRET, 10**400])
    | st.sampled_from([key for kv in FULL.kvs for key in (kv.key.decode(), kv.value.decode(errors="surrogateescape"))]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def mutate(data: st.DataObject, lines: list[bytes]) -> list[bytes]:
    lines = list(lines)
    at = data.draw(st.integers(min_value=0, max_value=len(lines) - 1))
    kind = data.draw(st.sampled_from(["part", "part", "part", "line", "bytes", "drop", "twice"]))
    if kind == "part":
        try:
            line = json.loads(lines[at])
        except ValueError:
            return lines
        if isinstance(line, dict):
            line[data.draw(st.sampled_from([*line, "more"]))] = data.draw(values)
        elif isinstance(line, list) and line:
            line[data.draw(st.integers(min_value=0, max_value=len(line) - 1))] = data.draw(values)
        lines[at] = json.dumps(line).encode()
    elif kind == "line":
        lines[at] = json.dumps(data.draw(values)).encode()
    elif kind == "bytes":
        start = data.draw(st.integers(min_value=0, max_value=len(lines[at])))
        lines[at] = lines[at][:start] + data.draw(st.binary(max_size=6)) + lines[at][start + 1 :]
    elif kind == "drop":
        del lines[at]
    else:
        lines.append(lines[at])
    return lines


@settings(max_examples=examples(300), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_a_cache_changed_anywhere_is_refused_or_makes_a_mesh_that_can_be_planned(
    tmp_path: Path, data: st.DataObject
) -> None:
    path = tmp_path / FILE
    lines = lines_of(path)
    for _ in range(data.draw(st.integers(min_value=1, max_value=3))):
        if lines:
            lines = mutate(data, lines)
    put(path, lines)
    try:
        cached = load(path, WHO)
    except Unusable:
        return
    assert cached is not None
    assert cached.age(2000.0)
    host_plan(build_topology(cached.snapshot), "h1")


def test_what_is_never_read_is_not_kept_and_too_much_leaves_the_former_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / FILE
    big = KeyValue(key=b"/kilo/by/big/node", value=b"\x00" * (MAX_VALUE + 1), create_revision=1, mod_revision=1)
    most = evolve(big, key=b"/kilo/by/most/node", value=b"\xff" * MAX_VALUE)
    long = evolve(big, key=b"/kilo/" + b"x" * cachefile.MAX_KEY, value=b"")
    save(path, WHO, evolve(FULL, kvs=(*FULL.kvs, big, most, long)), now=1000.0)
    cached = read(path, WHO)
    assert cached is not None
    assert len(cached.lines) == len(FULL.kvs) + 1
    assert "h1" in cached.decoded().snapshot.nodes
    before = path.read_bytes()
    for limit, value in (("MAX_RECORDS", 3), ("MAX_BYTES", 500)):
        with monkeypatch.context() as patch:
            patch.setattr(cachefile, limit, value)
            with pytest.raises(TooLarge, match="kept"):
                save(path, WHO, FULL, now=2000.0)
        assert path.read_bytes() == before
        assert [one.name for one in tmp_path.iterdir()] == [FILE]
    # What is written to the very limit can be read.
    size = len(gzip.decompress(before))
    monkeypatch.setattr(cachefile, "MAX_BYTES", size + 200)
    save(path, WHO, evolve(FULL, kvs=(*FULL.kvs, most)), now=1000.0)
    assert load(path, WHO) is not None


def test_the_bytes_of_any_record_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / FILE
    odd = KeyValue(key=b"/kilo/\xff\xed\xa0\x80", value=bytes(range(256)), create_revision=1, mod_revision=2**63 - 1)
    save(path, WHO, evolve(FULL, kvs=(*FULL.kvs, odd)), now=1000.0)
    cached = read(path, WHO)
    assert cached is not None
    assert odd in [cachefile._kv(line) for line in cached.lines]
