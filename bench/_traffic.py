"""Traffic through several worlds in turn, and how their throughput and latency compare.

Worlds are `kilo` (programmed by kilo-etcd), `hand` (the same with `ip` and `wg`) and `control` (by hand once more): how
far the two by hand are apart is how much of a difference is chance. Rounds take the three in turn, in another order
each time; a ratio is one of a round. Each host is a network namespace `<world>-<host>`, and all share the machine's
cores with the sender and the receiver.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from statistics import median, quantiles

from _table import QUICK, console, table

WORLDS = ("kilo", "hand", "control")
PORT = 5201
ROUNDS, SECONDS, PINGS = (6, 0.3, 100) if QUICK else (120, 0.4, 200)


def enter(namespace: str) -> None:
    """Sockets that are opened from now on are this namespace's."""
    with open(f"/run/netns/{namespace}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0x40000000):
            raise OSError(ctypes.get_errno(), f"setns to {namespace}")


def serve(namespace: str, address: str) -> int:
    """A process there that takes what comes by TCP and says how much it was, and echoes what comes by UDP."""
    enter(namespace)
    streams = socket.create_server((address, PORT))
    datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    datagrams.bind((address, PORT))
    process = os.fork()
    if process:
        return process
    if os.fork() == 0:
        while True:
            datagrams.sendto(*datagrams.recvfrom(2048))
    buffer = bytearray(1 << 18)
    while True:
        stream, _ = streams.accept()
        with stream:
            total = 0
            while size := stream.recv_into(buffer):
                total += size
            stream.sendall(total.to_bytes(8, "big"))


def throughput(namespace: str, address: str) -> float:
    """Mbit/s of one TCP stream to a server, counted there, until it has the last byte."""
    enter(namespace)
    data = memoryview(bytes(1 << 17))
    with socket.create_connection((address, PORT), timeout=30) as stream:
        began = time.monotonic()
        while time.monotonic() - began < SECONDS:
            stream.sendall(data)
        stream.shutdown(socket.SHUT_WR)
        total = int.from_bytes(stream.recv(8), "big")
        return total * 8 / (time.monotonic() - began) / 1e6


def latency(namespace: str, address: str) -> list[float]:
    """Seconds there and back, of single UDP packets one after the other."""
    enter(namespace)
    times = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as out:
        out.connect((address, PORT))
        out.settimeout(2)
        for _ in range(PINGS):
            began = time.perf_counter()
            out.send(b"x" * 64)
            out.recv(2048)
            times.append(time.perf_counter() - began)
    return times


def answers(namespace: str, address: str) -> None:
    """Wait until the path carries packets."""
    deadline = time.monotonic() + 20
    while True:
        try:
            latency(namespace, address)
            return
        except TimeoutError:
            if time.monotonic() > deadline:
                raise


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> tuple[str, str, str, str]:
    """Median, the 95 % interval of the median (bootstrap), quartiles, extremes."""
    found = [a / b for a, b in zip(ours, theirs, strict=True)]
    rng = random.Random(1)
    medians = sorted(median(rng.choices(found, k=len(found))) for _ in range(2000))
    low, _, high = quantiles(found, n=4)
    return (
        f"{median(found):.3f}",
        f"{medians[50]:.3f} to {medians[1949]:.3f}",
        f"{low:.3f} to {high:.3f}",
        f"{min(found):.2f} to {max(found):.2f}",
    )


def compare(title: str, client: str, server: str, address: Mapping[str, str]) -> None:
    """Print what flows between two hosts of each world, to the address that the second has in it."""
    servers = [serve(f"{world}-{server}", address[world]) for world in WORLDS]
    rates: dict[str, list[float]] = {world: [] for world in WORLDS}
    middles: dict[str, list[float]] = {world: [] for world in WORLDS}
    highs: dict[str, list[float]] = {world: [] for world in WORLDS}
    shown = table(
        f"{title}: {ROUNDS} rounds, {SECONDS:g} s of TCP, {PINGS} UDP echoes",
        "what", "median", "by hand", "ratio", "95 % of the median", "half of the rounds", "all rounds",
    )  # fmt: skip
    try:
        for world in WORLDS:
            answers(f"{world}-{client}", address[world])
        for number in range(ROUNDS + 1):
            order = WORLDS[number % 3 :] + WORLDS[: number % 3]
            for world in order if number % 2 else order[::-1]:
                way = f"{world}-{client}", address[world]
                rate, times = throughput(*way), sorted(latency(*way))
                if number:  # the first is not counted
                    rates[world].append(rate)
                    middles[world].append(median(times))
                    highs[world].append(times[len(times) * 99 // 100])
    finally:
        for process in servers:
            os.kill(process, signal.SIGKILL)
    for name, found, unit, digits in (
        ("Mbit/s", rates, 1.0, 0), ("median echo, µs", middles, 1e6, 1), ("99 % of the echoes, µs", highs, 1e6, 1),
    ):  # fmt: skip
        for world in ("kilo", "control"):
            ours, theirs = found[world], found["hand"]
            both = (f"{median(values) * unit:,.{digits}f}" for values in (ours, theirs))
            shown.add_row(f"{world}: {name}", *both, *ratios(ours, theirs))
    console.print(shown)
    print()
