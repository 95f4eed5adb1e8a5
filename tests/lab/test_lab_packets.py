"""Packets as the lab writes and reads them: echo requests, captured frames, and the account of a probe."""

from __future__ import annotations

import struct
from collections.abc import Callable
from ipaddress import ip_address
from typing import Any

import pytest
import trio

from kilo_etcd.lab.capture import Flow, decode
from kilo_etcd.lab.probe import LabProbe, ProbeResult, checksum, echo_request, parse_reply

IP4 = bytes.fromhex("45000000000000004000 0000 0a650 00b 0a66000c".replace(" ", ""))


def test_an_echo_request_sums_to_nothing() -> None:
    assert checksum(echo_request(4, 7, 99)) == 0


def test_a_reply_is_told_from_a_request() -> None:
    request = echo_request(4, 7, 70_000)
    reply = b"\x00" + request[1:]
    assert parse_reply(4, IP4 + reply) == (7, 70_000)
    assert parse_reply(4, IP4 + request) is None
    assert parse_reply(4, IP4 + reply[:9]) is None
    assert parse_reply(4, b"") is None
    assert parse_reply(6, b"\x81" + echo_request(6, 3, 1)[1:]) == (3, 1)


@pytest.mark.parametrize(
    ("kind", "packet", "flow"),
    [
        (
            0x0800,
            IP4[:9] + b"\x11" + IP4[10:] + struct.pack("!HHHH", 51820, 40000, 8, 0),
            Flow(
                source="10.101.0.11",
                destination="10.102.0.12",
                protocol="udp",
                source_port=51820,
                destination_port=40000,
            ),
        ),
        (
            0x0800,
            IP4[:6] + b"\x00\x01" + IP4[8:9] + b"\x11" + IP4[10:] + b"later fragment",
            Flow(source="10.101.0.11", destination="10.102.0.12", protocol="udp"),
        ),
        (
            0x0800,
            IP4[:9] + b"\x04" + IP4[10:] + IP4,
            Flow(source="10.101.0.11", destination="10.102.0.12", protocol="ipip"),
        ),
        (
            0x0806,
            bytes(14) + bytes([10, 0, 0, 1]) + bytes(6) + bytes([10, 0, 0, 2]),
            Flow(source="10.0.0.1", destination="10.0.0.2", protocol="arp"),
        ),
        (0x88CC, b"lldp", Flow(source="", destination="", protocol="ethertype 0x88cc")),
        (0x0800, b"short", Flow(source="", destination="", protocol="ethertype 0x0800")),
    ],
)
def test_frames_are_decoded_to_flows(kind: int, packet: bytes, flow: Flow) -> None:
    assert decode(kind, packet) == flow


class Echo:
    """In place of a `Pinger`: answers at once, except the numbers in `lost`."""

    def __init__(self, lost: set[int]) -> None:
        self.lost = lost
        self.replied: Callable[[int], object]

    def listen(self, machine: Any, replied: Callable[[int], object]) -> int:
        self.replied = replied
        return 1

    def forget(self, machine: Any, identifier: int) -> None:
        pass

    async def send(self, machine: Any, target: Any, identifier: int, number: int) -> None:
        await trio.lowlevel.checkpoint()
        if number not in self.lost:
            self.replied(number)


async def account(lost: set[int], seconds: float) -> ProbeResult:
    pinger: Any = Echo(lost)
    machine: Any = None
    probe = LabProbe(pinger, machine, ip_address("10.4.0.1"), 0.01)
    stop = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(probe.run, stop)
        await trio.sleep(seconds)
        stop.set()
    return probe.result(final=True)


@pytest.mark.autojump
async def test_nothing_lost() -> None:
    result = await account(set(), 0.995)
    assert (result.sent, result.received, result.lost, result.longest_gap, result.flowing) == (100, 100, 0, 0.0, True)


@pytest.mark.autojump
async def test_a_gap_lasts_from_the_first_lost_to_the_next_answered() -> None:
    result = await account({10, 11, 12, 50}, 0.995)
    assert (result.sent, result.lost) == (100, 4)
    assert [(round(gap.start, 3), round(gap.seconds, 3), gap.packets) for gap in result.gaps] == [
        (0.1, 0.03, 3),
        (0.5, 0.01, 1),
    ]
    assert result.longest_gap == pytest.approx(0.03)


@pytest.mark.autojump
async def test_an_open_end_is_a_gap_and_does_not_flow() -> None:
    result = await account(set(range(90, 100)), 0.995)
    assert (result.lost, result.flowing) == (10, False)
    assert result.longest_gap == pytest.approx(0.1)
    assert ProbeResult.from_mapping(result.as_mapping()) == result
