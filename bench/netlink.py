"""Programming 1,000 routes in one run in a namespace: our messages (in pyroute2's formats, on sockets of our own),
`IPRoute` of pyroute2, and `ip -batch`.

Prints milliseconds (the median of several rounds, taken in turn) and the ratio to `ip -batch`; needs root.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from ipaddress import ip_network
from statistics import median
from time import perf_counter

from rich.console import Console
from rich.table import Table

ROUTES = 1000
ROUNDS = 5
DEVICE = "kilo-bench"
NETWORKS = [ip_network((0x0A64_0000 + number * 256, 24)) for number in range(ROUTES)]


def ours() -> None:
    from kilo_etcd.kernel.netlink.sockets import Socket
    from kilo_etcd.kernel.state import Route
    from kilo_etcd.kernel.write.rtnl import add_route

    index = socket.if_nametoindex(DEVICE)
    routes = Socket(socket.NETLINK_ROUTE)
    failed = [
        error
        for error in routes.send([add_route(Route(destination=n, device=DEVICE), index) for n in NETWORKS])
        if error
    ]
    routes.close()
    assert not failed, failed[0]


def pyroute2() -> None:
    from pyroute2 import IPRoute

    index = socket.if_nametoindex(DEVICE)
    with IPRoute() as routes:
        for network in NETWORKS:
            routes.route("add", dst=str(network), oif=index, proto=107)


def ip_batch() -> None:
    lines = "".join(f"route add {network} dev {DEVICE} proto 107\n" for network in NETWORKS)
    subprocess.run(["ip", "-batch", "-"], input=lines, text=True, check=True)


def flush() -> None:
    subprocess.run(["ip", "route", "flush", "dev", DEVICE], check=True)


def measure() -> None:
    subprocess.run(["ip", "link", "add", DEVICE, "type", "veth", "peer", "name", "far"], check=True)
    for name in (DEVICE, "far"):
        subprocess.run(["ip", "link", "set", name, "up"], check=True)
    ways: dict[str, Callable[[], None]] = {"ours": ours, "pyroute2": pyroute2, "ip -batch": ip_batch}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(ROUNDS + 1):
        for name, way in ways.items():
            began = perf_counter()
            way()
            times[name].append((perf_counter() - began) * 1000)
            flush()
    table = Table(title=f"{ROUTES} routes added ({ROUNDS} rounds after one that is not counted)")
    for heading in ("way", "median ms", "min", "max", "ratio to ip -batch"):
        table.add_column(heading, justify="left" if heading == "way" else "right")
    base = median(times["ip -batch"][1:])
    for name, found in times.items():
        counted = found[1:]
        numbers = (median(counted), min(counted), max(counted), median(counted) / base)
        table.add_row(name, *(f"{number:.2f}" for number in numbers))
    Console(width=110).print(table)


if __name__ == "__main__":
    if os.environ.get("KILO_BENCH_INSIDE"):
        measure()
    else:
        environment = {**os.environ, "KILO_BENCH_INSIDE": "1"}
        sys.exit(subprocess.run(["unshare", "-n", sys.executable, __file__], env=environment).returncode)
