"""What a netlink socket makes of answers that are cut off, interrupted, refused, late or lost. A played socket answers
with bytes; what the kernel itself answers is in test_kernel_root.py."""

from __future__ import annotations

import errno
import struct
import subprocess
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_network
from typing import Any

import pytest
from handmade.attributes import attribute
from kernel_worlds import PRIVATE

from helpers import eventually
from kilo_etcd.kernel import KernelError, Setup, list_addresses, open_kernel
from kilo_etcd.kernel.errors import NetlinkError
from kilo_etcd.kernel.firewall.netfilter import Netfilter
from kilo_etcd.kernel.firewall.table import AddressSet, FirewallTable
from kilo_etcd.kernel.netlink import sockets
from kilo_etcd.kernel.netlink.codec import FormatError
from kilo_etcd.kernel.netlink.sockets import Listener, NetlinkMessage, Socket
from kilo_etcd.kernel.read.nft import read_generation
from kilo_etcd.kernel.read.rtnl import read_address, read_link, read_route
from kilo_etcd.kernel.read.wireguard import DeviceReader, read_family
from kilo_etcd.kernel.state import Route
from kilo_etcd.kernel.write.rtnl import add_route, get_addresses

_ERROR, _DONE, _INTERRUPTED, _TLVS, _ROUTE = 2, 3, 0x10, 0x200, 24
ASK = NetlinkMessage(26, 0, bytes(12))


def reply(kind: int, flags: int, sequence: int, body: bytes, length: int | None = None) -> bytes:
    size = 16 + len(body)
    return struct.pack("=IHHII", size if length is None else length, kind, flags, sequence, 7) + body + bytes(-size % 4)


def number(value: int) -> bytes:
    return struct.pack("=i", value)


Answer = Callable[[int], list[bytes | OSError]]
"""Number of the first message that was sent -> what is received then."""


class Played:
    """In a socket's place."""

    def __init__(self, *answers: Answer) -> None:
        self._answers = iter(answers)
        self._waiting: list[bytes | OSError] = []
        self.sent: list[int] = []

    def sendto(self, data: bytes, _: object) -> None:
        self.sent.append(struct.unpack_from("=I", data, 8)[0])
        self._waiting += next(self._answers)(self.sent[-1])

    def recv_into(self, buffer: bytearray) -> int:
        if not self._waiting:
            raise TimeoutError
        data = self._waiting.pop(0)
        if isinstance(data, OSError):
            raise data
        buffer[: len(data)] = data
        return len(data)

    recv = None


@pytest.fixture
def play() -> Iterator[Callable[..., tuple[Socket, Played]]]:
    opened: list[Any] = []

    def made(*answers: Answer) -> tuple[Socket, Played]:
        device, played = Socket(0), Played(*answers)
        opened.append(device._socket)
        device._socket = played  # type: ignore[assignment]
        return device, played

    yield made
    for each in opened:
        each.close()


def dumped(*names: bytes, interrupted: bool = False) -> Answer:
    flags = _INTERRUPTED if interrupted else 0
    return lambda first: [
        b"".join(reply(_ROUTE, 0, first, name) for name in names),
        reply(_DONE, flags, first, number(0)),
    ]


def test_a_dump_during_which_the_kernel_changed_is_begun_anew(play: Any) -> None:
    device, played = play(dumped(b"some", interrupted=True), dumped(b"some", b"more"))
    found: list[bytes] = []
    device.dump(ASK, found.append)
    assert found == [b"some", b"more"]
    assert len(played.sent) == 2


def test_while_somebody_goes_on_changing_the_last_of_several_dumps_is_taken(play: Any) -> None:
    device, played = play(*(dumped(bytes([turn]), interrupted=True) for turn in range(9)))
    found: list[bytes] = []
    device.dump(ASK, found.append)
    assert found == [bytes([2])]
    assert len(played.sent) == 3


def test_an_interruption_that_only_one_message_tells_of_counts(play: Any) -> None:
    device, _ = play(
        lambda first: [reply(_ROUTE, _INTERRUPTED, first, b"half"), reply(_DONE, 0, first, number(0))], dumped(b"all")
    )
    found: list[bytes] = []
    device.dump(ASK, found.append)
    assert found == [b"all"]


def test_a_dump_that_ends_with_an_error_hands_out_nothing(play: Any) -> None:
    reason = number(-errno.ENOENT) + attribute(1, b"no such table\0")
    device, _ = play(lambda first: [reply(_ROUTE, 0, first, b"half"), reply(_DONE, _TLVS, first, reason)])
    found: list[bytes] = []
    with pytest.raises(NetlinkError) as caught:
        device.dump(ASK, found.append)
    assert (caught.value.errno, caught.value.detail, found) == (errno.ENOENT, "no such table", [])


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("length", [0, 4, 15, 60, 1 << 31])
def test_a_message_of_another_length_than_it_says_is_an_error(play: Any, whole: bool, length: int) -> None:
    def cut(first: int) -> list[bytes | OSError]:
        return [reply(_ROUTE, 0, first, b"good") * whole + reply(_ROUTE, 0, first, bytes(40), length)]

    device, _ = play(cut)
    with pytest.raises(FormatError, match="the kernel's answer"):
        device.dump(ASK, lambda body: None)


def test_bytes_that_are_too_few_for_a_message_are_an_error(play: Any) -> None:
    device, _ = play(lambda first: [reply(_ROUTE, 0, first, b"good") + bytes(7)])
    with pytest.raises(FormatError):
        device.dump(ASK, lambda body: None)


@pytest.mark.parametrize("body", [b"", b"\1", number(-22), number(-22) + bytes(15)])
def test_a_refusal_that_is_cut_off_is_an_error(play: Any, body: bytes) -> None:
    device, _ = play(lambda first: [reply(_ERROR, _TLVS, first, body)])
    with pytest.raises(FormatError):
        device.send([ASK])


def test_a_refusal_whose_reason_is_cut_off_is_a_refusal(play: Any) -> None:
    reason = attribute(1, b"because\0")
    for end in range(len(reason)):
        body = number(-errno.EINVAL) + bytes(16) + reason[:end]
        device, _ = play(lambda first, body=body: [reply(_ERROR, _TLVS, first, body)])
        (error,) = device.send([ASK])
        assert error.errno == errno.EINVAL
        assert error.detail == "because"[: max(0, end - 4)]


@pytest.mark.parametrize(
    ("read", "part"),
    [
        (read_link, bytes(16) + attribute(4, b"\1")),
        (read_route, b"\2" + bytes(11) + attribute(4, b"\1")),
        (read_route, b"\2" + bytes(11) + attribute(1, b"\1")),
        (read_route, b"\2" + bytes(11) + attribute(5, b"")),
        (read_route, b"\2" + bytes(11) + attribute(9, bytes(8))),
        (read_route, b"\2" + bytes(11) + attribute(9, b"\6\0\0\0\1\0")),
        (read_family, bytes(4) + attribute(1, b"\1")),
        (read_family, bytes(4)),
        (read_generation, bytes(4)),
    ],
    ids=["mtu", "index", "destination", "gateway", "next hops", "short", "family", "no family", "no generation"],
)
def test_an_answer_that_cannot_be_read_is_an_error(play: Any, read: Any, part: bytes) -> None:
    for body in (b"", b"\2", part):
        device, _ = play(lambda first, body=body: [reply(_ROUTE, 0, first, body)])
        with pytest.raises(FormatError, match="the kernel's answer"):
            device.get(ASK, read)


def test_what_is_lost_or_late_is_nobody_elses_answer(play: Any) -> None:
    late: list[bytes] = []

    def lost(first: int) -> list[bytes | OSError]:
        late.append(reply(_ROUTE, 0, first, b"late"))
        return [OSError(errno.ENOBUFS, "No buffer space available")]

    device, _ = play(lost, lambda first: [late[0] + reply(_ROUTE, 0, first, b"mine")])
    with pytest.raises(OSError, match="No buffer space"):
        device.get(ASK, bytes)
    assert device.get(ASK, bytes) == b"mine"


def test_nobody_answers(play: Any) -> None:
    device, _ = play(lambda first: [])
    with pytest.raises(NetlinkError) as caught:
        device.get(ASK, bytes)
    assert caught.value.detail == "the kernel did not answer within 10 s"


def test_one_of_a_batch_is_refused_and_the_others_are_not(play: Any) -> None:
    def second(first: int) -> list[bytes | OSError]:
        refused = number(-errno.EEXIST) + struct.pack("=IHHII", 28, 24, 0, first + 1, 0)
        return [reply(_ERROR, 0, first + 1, refused), reply(_ERROR, 0, first + 2, number(0) + bytes(16))]

    device, _ = play(second)
    assert [error and error.errno for error in device.send([ASK] * 3)] == [None, errno.EEXIST, None]


def test_numbers_of_messages_begin_again_before_they_have_more_than_32_bits(play: Any) -> None:
    answer = dumped(b"all")
    device, played = play(answer, answer)
    device._sequence = (1 << 32) - 1
    found: list[bytes] = []
    device.dump(ASK, found.append)
    device.dump(ASK, found.append)
    assert (found, played.sent) == ([b"all"] * 2, [1, 2])


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (reply(_ROUTE, 0, 0, b"news"), [(_ROUTE, b"news")]),
        (reply(_ROUTE, 0, 0, b"news") + reply(_ROUTE, 0, 0, b"more", 400), None),
        (reply(_ROUTE, 0, 0, b"news", 0), None),
        (OSError(errno.ENOBUFS, "No buffer space available"), None),
        (BlockingIOError(), []),
    ],
    ids=["whole", "cut off", "no length", "lost", "nothing"],
)
def test_events_that_cannot_be_read_count_as_lost(data: bytes | OSError, found: object) -> None:
    class Source:
        def recv(self, _: int) -> bytes:
            if isinstance(data, OSError):
                raise data
            return data

    listener = Listener([])
    real = listener.socket
    try:
        listener.socket = Source()  # type: ignore[assignment]
        assert listener.read() == found
    finally:
        real.close()


@pytest.mark.parametrize("cut", range(0, 200, 7))
def test_a_peer_that_is_cut_off_is_read_in_part_or_refused(cut: int) -> None:
    allowed = attribute(1, attribute(1, b"\2\0") + attribute(2, bytes([10, 4, 0, 1])) + attribute(3, b"\x20"))
    peer = attribute(1, bytes([1]) * 32) + attribute(5, b"\x19\0") + attribute(7, bytes(8)) + attribute(9, allowed * 3)
    reader = DeviceReader()
    try:
        reader.take((bytes(4) + attribute(8, attribute(1, peer)))[:cut])
        peers = reader.result().peers
    except (ValueError, LookupError, struct.error):
        return
    assert all(set(map(str, observed_peer.allowed_ips)) <= {"10.4.0.1/32"} for observed_peer in peers.values())


@pytest.mark.parametrize("cut", range(28))
def test_a_route_that_is_cut_off_says_nothing_that_it_does_not_say_whole(cut: int) -> None:
    network = ip_network("10.4.0.0/16")
    body = add_route(Route(destination=network, gateway=ip_address("192.0.2.1"), metric=9), 7).body
    try:
        route = read_route(body[:cut])
    except (ValueError, LookupError, struct.error):
        return
    assert route is not None
    assert route.destination in (network, ip_network("0.0.0.0/16"))
    assert (route.metric, route.gateway) in ((0, None), (9, None), (9, ip_address("192.0.2.1")))


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_a_table_that_is_larger_than_a_socket_takes_at_once_is_set() -> None:
    base = int(ip_address("2001:db8::"))
    nodes = AddressSet(name="nodes6", version=6, addresses=frozenset(ip_address(base + each) for each in range(20_000)))
    table = FirewallTable(name="kilo-etcd-big", chains=(), sets=(nodes,), counters=(), rules=())
    device = Netfilter()
    try:
        device.replace(table)
        # A dump misses elements while a worker of the kernel still moves them to a larger hash table.
        await eventually(lambda: device.read(table.name) == table, 30, what="the set with all its elements")
    finally:
        device.close()


def test_padding_is_as_long_as_the_kernel_wants_it(play: Any) -> None:
    sent: list[bytes] = []
    device, played = play()
    played.sendto = lambda data, _: sent.append(data)
    device._submit([NetlinkMessage(1, 0, bytes(size)) for size in range(5)])
    (data,) = sent
    assert [len(body) for *_, body in sockets.messages(data)] == [0, 1, 2, 3, 4]
    assert len(data) == 5 * 16 + 4 * 4


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_a_dump_has_what_did_not_change_while_another_address_went(monkeypatch: pytest.MonkeyPatch) -> None:
    def ip(*lines: str) -> None:
        subprocess.run(["ip", "-batch", "-"], input="\n".join(lines), text=True, check=True)

    ip("link set lo up", *(f"address add 10.9.{number // 250}.{number % 250 + 1}/32 dev lo" for number in range(600)))
    device, found = Socket(0), list[bytes]()
    receive, received = Socket._receive, []

    def changed_after_the_first(self: Socket) -> bytes:
        received.append(data := receive(self))
        if len(received) == 1:
            ip(*(f"address del 10.9.0.{number}/32 dev lo" for number in range(1, 101)))
        return data

    monkeypatch.setattr(Socket, "_receive", changed_after_the_first)
    try:
        device.dump(get_addresses(), found.append)
    finally:
        device.close()
    assert len(received) > 3, "the first part tells of some of them only"
    addresses = [str(address.address) for body in found if (address := read_address(body, {})) is not None]
    assert sorted(one for one in addresses if one.startswith("10.9.")) == sorted(
        f"10.9.{number // 250}.{number % 250 + 1}/32" for number in range(100, 600)
    )


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_a_kernel_that_cannot_be_asked_is_told_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def lost(self: Socket) -> bytes:
        raise OSError(errno.ENOBUFS, "No buffer space available")

    monkeypatch.setattr(Socket, "_receive", lost)
    with pytest.raises(KernelError, match="the kernel does not tell this host's network state: No buffer space"):
        await list_addresses()
    with pytest.raises(KernelError, match="the kernel does not tell this host's network state: No buffer space"):
        async with open_kernel(Setup(private_key=PRIVATE)):
            pass
