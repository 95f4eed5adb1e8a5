"""Helpers that tests import: waiting for a condition, and asking for what a test needs of the machine."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing

from kilo_etcd.etcd.api import Client
from kilo_etcd.testing.fake_etcd import FakeClient

PACKAGES = {
    "etcd": "etcd-server",
    "etcdctl": "etcd-client",
    "wg": "wireguard-tools",
    "wireguard-go": "wireguard-go",
    "nft": "nftables",
    "iptables": "iptables",
    "dot": "graphviz",
    "circo": "graphviz",
    "ip": "iproute2",
    "ping": "iputils-ping",
    "strace": "strace",
    "pgrep": "procps",
    "wg-quick": "wireguard-tools",
    "setpriv": "util-linux",
    "unshare": "util-linux",
    "mount": "mount",
    "nsenter": "util-linux",
    "systemd-nspawn": "systemd-container",
    "openssl": "openssl",
}


BUSY = 4.0
"""How many times longer than its deadline `eventually` waits on the real clock, since other work on the machine slows
all down. It costs nothing where the condition comes true. In virtual time a deadline is kept to the second."""


def scaled(count: int, least: int = 1) -> int:
    """KILO_EXAMPLES per cent of `count` (all; `make test-fast`: 10), and not less than `least`: rounds of a test, or
    seconds of virtual time in which nothing may happen."""
    return max(least, count * int(os.environ.get("KILO_EXAMPLES", "100")) // 100)


def examples(count: int) -> int:
    """How many examples hypothesis makes where it makes `count` in `make test`."""
    return scaled(count)


async def eventually(
    condition: Callable[[], Any], deadline: float = 30.0, *, every: float | None = None, what: str = ""
) -> Any:
    """Poll `condition` (sync or async) until it returns something true, and return that.

    An AssertionError inside the condition counts as "not yet". After `deadline` seconds (on the real clock `BUSY` times
    as many) the last one is raised, or an AssertionError that says `what` never came true. The condition is polled
    each `every` seconds; by default a hundred times a second, in virtual time after each hundredth of the wait so far.
    """
    virtual = isinstance(trio.lowlevel.current_clock(), trio.testing.MockClock)
    if not virtual:
        deadline *= BUSY
    began = trio.current_time()
    last: AssertionError | None = None
    seen: Any = None
    with trio.move_on_after(deadline):
        while True:
            try:
                seen = condition()
                if inspect.isawaitable(seen):
                    seen = await seen
                if seen:
                    return seen
                last = None
            except AssertionError as error:
                last = error
            await trio.sleep(every or max(0.01, (trio.current_time() - began) / 100 if virtual else 0.0))
    if last is not None:
        raise last
    raise AssertionError(f"not within {deadline} s: {what or inspect.getsource(condition).strip()} (last: {seen!r})")


async def put_kept(client: Client, key: str, value: bytes) -> int:
    """Put a key as a host does that goes on living, under a lease; the revision."""
    if isinstance(client, FakeClient):
        await trio.lowlevel.checkpoint()
        return client.server.put_kept(key, value)
    lease = await client.grant_lease(3600)
    return (await client.put(key, value, lease=lease.id)).header.revision


def require(*programs: str) -> None:
    """Fail the test, naming the Debian package, if a program is not installed."""
    for program in programs:
        if shutil.which(program) is None and shutil.which(program, path="/usr/sbin:/sbin") is None:
            pytest.fail(f"needs {program}: apt-get install {PACKAGES.get(program, program)}", pytrace=False)
