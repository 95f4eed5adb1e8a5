"""pyroute2's classes are loaded without the rest of pyroute2, and messages of one shape cost pyroute2 one message."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from ipaddress import IPv4Network, ip_address
from typing import Any

import pytest
from handmade.attributes import NESTED, attribute
from hypothesis import given
from hypothesis import strategies as some
from kernel_worlds import PRIVATE, plan, tunnel

from kilo_etcd.kernel import Setup, open_kernel
from kilo_etcd.kernel.linux import LinuxKernel
from kilo_etcd.kernel.netlink import codec, formats
from kilo_etcd.kernel.netlink.formats import NFT_OBJECT_COUNTER, netconfmsg, nft_obj_msg, nlmsg, routemsg, rtmsg
from kilo_etcd.kernel.read import rtnl as replies
from kilo_etcd.kernel.state import Route
from kilo_etcd.kernel.write import rtnl as requests


def in_a_fresh_python(program: str) -> Any:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def test_only_the_classes_are_loaded_and_nothing_of_pyroute2_stays_in_the_way() -> None:
    found = in_a_fresh_python(
        "import json, sys\n"
        "before = set(sys.modules)\n"
        "import kilo_etcd.kernel.netlink.formats as formats\n"
        "came = set(sys.modules) - before\n"
        "classes = [formats.rtmsg.__module__, formats.nft.nft_rule_msg.__module__]\n"
        "from pyroute2 import IPRoute\n"
        "from pyroute2.netlink.generic.wireguard import WireGuard\n"
        "print(json.dumps([sorted(m for m in came if 'pyroute2' in m), 'asyncio' in came, classes,\n"
        "    [c.__name__ for c in WireGuard.__mro__]]))\n"
    )
    loaded, asyncio, classes, bases = found
    assert loaded == []
    assert not asyncio
    assert classes == ["pyroute2.netlink.rtnl.rtmsg", "pyroute2.netlink.nfnetlink.nftsocket"]
    assert "NetlinkSocket" in bases, "who imports pyroute2 later has its real sockets"


def test_a_program_that_has_all_of_pyroute2_shares_its_classes() -> None:
    assert in_a_fresh_python(
        "import json\n"
        "import pyroute2.netlink.rtnl.rtmsg as theirs\n"
        "from kilo_etcd.kernel.netlink.formats import rtmsg\n"
        "print(json.dumps(rtmsg is theirs.rtmsg))\n"
    )


def test_pyroute2_packs_the_first_of_a_shape_and_only_the_first_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[Any] = []
    read: list[Any] = []
    encode, cut = codec.encode, codec._slots

    def pack(kind: Any, *rest: Any) -> Any:
        packed.append(kind)
        return encode(kind, *rest)

    def slots(kind: Any, body: bytes) -> Any:
        read.append(kind)
        return cut(kind, body)

    monkeypatch.setattr(codec, "encode", pack)
    monkeypatch.setattr(codec, "_slots", slots)
    writer, reader = codec.Writer(rtmsg, requests._route._converters), codec.Reader(routemsg, *replies._routes._wanted)
    monkeypatch.setattr(requests, "_route", writer)
    monkeypatch.setattr(replies, "_routes", reader)
    networks = [IPv4Network((0x0A00_0000 + number * 256, 24)) for number in range(100)]
    bodies = [requests.add_route(Route(destination=network, metric=5), 7).body for network in networks]
    assert packed == [rtmsg]
    read.clear()
    routes = [replies.read_route(body) for body in bodies]
    assert read == [routemsg]
    assert [(route.destination, route.metric) for route in routes if route is not None] == [(n, 5) for n in networks]
    # Of the same length, and another shape: the same bytes mean another thing.
    source = requests.add_route(Route(destination=networks[0], source=ip_address("10.0.0.1")), 7).body
    assert len(source) == len(bodies[0])
    other = replies.read_route(source)
    assert other is not None
    assert other.metric == 0
    assert len(read) == 2 + 1, "one more to pack it, which cuts it too, and one to read it"


def test_a_value_that_pyroute2_packs_otherwise_is_an_error_and_is_not_quoted() -> None:
    writer = codec.Writer(rtmsg, {"RTA_DST": lambda _: "4.3.2.1"})
    fixed = (2, 32, 0, 0, 254, 107, 0, 1, 0)
    with pytest.raises(OSError, match="pyroute2's rtmsg has another format than expected") as caught:
        writer(fixed, {"RTA_DST": b"\1\2\3\4"})
    assert "4.3.2.1" not in str(caught.value)


def test_shapes_do_not_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(codec, "_SHAPES", 4)
    reader, writer = (
        codec.Reader(nft_obj_msg, "NFTA_OBJ_NAME"),
        codec.Writer(nft_obj_msg, {"NFTA_OBJ_NAME": lambda value: value.rstrip(b"\0").decode()}),
    )
    for length in range(1, 20):
        name = b"x" * length + b"\0"
        body = writer((1, 0, 0), {"NFTA_OBJ_NAME": name})
        assert reader(body)["NFTA_OBJ_NAME"] == name
    assert len(writer._forms) <= 4
    assert sum(map(len, reader._shapes.values())) <= 4


@pytest.mark.parametrize("cut", range(0, 60, 3))
def test_what_is_cut_short_is_read_as_far_as_it_goes_or_refused(cut: int) -> None:
    body = requests.add_route(
        Route(destination=IPv4Network("10.4.0.0/16"), gateway=ip_address("192.0.2.1"), metric=9), 7
    ).body[:cut]
    try:
        found = codec.Reader(rtmsg, "dst_len", "RTA_DST", "RTA_GATEWAY")(body)
    except ValueError:
        assert cut < 12
    else:
        assert found["dst_len"] == 16


def test_what_pyroute2_lacks_is_as_the_kernels_headers_have_it() -> None:
    body = codec.encode(netconfmsg, (2,), [("NETCONFA_IFINDEX", -1), ("NETCONFA_FORWARDING", 1)])
    assert body == bytes.fromhex("02000000 08000100ffffffff 0800020001000000")
    counter = [("NFTA_OBJ_TABLE", "kilo"), ("NFTA_OBJ_TYPE", NFT_OBJECT_COUNTER)]
    assert codec.encode(nft_obj_msg, (1, 0, 0), counter) == bytes.fromhex(
        "01000000 090001006b696c6f00000000 0800030000000001"
    )
    assert issubclass(netconfmsg, nlmsg)


@given(
    some.lists(some.tuples(some.integers(0, 40), some.booleans(), some.binary(max_size=40)), max_size=8),
    some.integers(0, 30),
    some.integers(0, 3),
)
def test_attributes_of_any_kind_and_length_are_found_where_they_stand(
    attributes: list[tuple[int, bool, bytes]], cut: int, junk: int
) -> None:
    # A reader that has learnt the shapes of examples before: none may be taken for another one.
    packed = b"".join(attribute(kind | (NESTED if nested else 0), value) for kind, nested, value in attributes)
    body = (bytes(range(12)) + packed + bytes([255] * junk))[: 12 + max(0, len(packed) - cut) + junk]
    expected = attributes_by_hand(body, 12)
    if any(kind == 4 and len(value) != 4 for kind, value in expected):
        with pytest.raises(ValueError, match="RTA_OIF of rtmsg has"):
            ANY(body)
        return
    found = ANY(body)
    names = {number: name for number, (name, *_) in enumerate(rtmsg.nla_map)}
    wanted: dict[str, object] = {names[kind]: value for kind, value in expected if kind in (1, 5, 8)}
    wanted.update(("RTA_OIF", int.from_bytes(value, sys.byteorder)) for kind, value in expected if kind == 4)
    assert found == {"family": 0, "flags": 0x0B0A0908} | wanted


ANY = codec.Reader(rtmsg, "flags", "RTA_DST", "RTA_OIF", "RTA_GATEWAY", "family", "RTA_METRICS")


def test_what_pyroute2_no_longer_has_is_not_read_as_if_it_were_never_there() -> None:
    with pytest.raises(LookupError, match="pyroute2's rtmsg has no RTA_DEST"):
        codec.Reader(rtmsg, "RTA_DEST", "RTA_OIF")


def attributes_by_hand(data: bytes, offset: int) -> list[tuple[int, bytes]]:
    result: list[tuple[int, bytes]] = []
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        if length < 4:
            break
        result.append((kind & 0x3FFF, data[offset + 4 : offset + length]))
        offset += (length + 3) & ~3
    return result


class _Odd(rtmsg):  # type: ignore[misc]
    def encode(self) -> None:
        raise RuntimeError("of any kind")


def test_what_pyroute2_raises_is_an_error_of_that_message() -> None:
    with pytest.raises(codec.FormatError, match="pyroute2's _Odd has another format"):
        codec.Writer(_Odd, {})([0] * 9, {})


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_what_cannot_be_packed_or_read_harms_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    body = requests._route_body

    def odd(route: Route, index: int, *, delete: bool = False) -> bytes:
        if str(route.destination) == "10.5.0.0/16":
            raise codec.FormatError(rtmsg)
        return body(route, index, delete=delete)

    monkeypatch.setattr(requests, "_route_body", odd)
    wanted = plan(
        tunnel("10.4.0.0/16", "10.4.0.1"), tunnel("10.5.0.0/16", "10.4.0.1"), tunnel("10.6.0.0/16", "10.4.0.1")
    )
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        report = await kernel.apply(wanted)
        (failed,) = report.failures
        assert "10.5.0.0/16" in failed.text
        assert "pyroute2's rtmsg has another format than expected" in failed.text
        assert {str(network) for network in (await kernel.observe()).routes} == {"10.4.0.0/16", "10.6.0.0/16"}
        # An event that cannot be read is one of which nobody knows what it says.
        assert isinstance(kernel, LinuxKernel)
        assert kernel._note_event([(replies.NEWROUTE, b"\2")])
        assert kernel._watch is not None
        assert kernel._news(kernel._watch, replies.NEWROUTE, b"\2") == (
            "the kernel reported something that could not be read"
        )

        def keep(body: bytes) -> None:
            replies.read_route(b"\2")

        with pytest.raises(codec.FormatError, match="the kernel's answer has another format"):
            kernel._host._route.dump(requests.get_links(), keep)
        assert (await kernel.observe()).link is not None, "the rest of that dump is in nobody's way"


def test_what_pyroute2_has_of_nftables_expressions_is_not_declared_anew() -> None:
    expressions = vars(formats.nft.nft_rule_msg.nft_expr).values()
    parts = (part for each in expressions if isinstance(each, type) for part in vars(each).values())
    tables = (getattr(part, "ops", ()) for part in parts)
    known = {name for table in tables for name in (table.values() if isinstance(table, dict) else table)}
    assert "NFT_NAT_SNAT" in known
    # It takes these bits for numbers.
    bits = {f"NFTA_FIB_F_{name}" for name in ("SADDR", "DADDR", "IIF", "PRESENT")}
    assert known & vars(formats).keys() == bits
