"""A test that uses the fixture `own_namespaces` runs in network, mount and process namespaces of its own.

It runs in a forked child that is PID 1 there, so that whatever it leaves ends with it. A conftest that imports both
names offers it: `from helpers_namespaces import own_namespaces, pytest_pyfunc_call`.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import traceback
import warnings
from collections.abc import Callable

import pytest

from helpers import eventually

_NEWNS, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x10000000, 0x20000000, 0x40000000
_PREPARE = (
    "mount --make-rprivate / && mount -t proc proc /proc && mount -t tmpfs tmpfs /run && mkdir /run/wireguard && "
    "ip link set lo up"
)
_inside = False


@pytest.fixture
def own_namespaces() -> None:
    """Marks the test; `pytest_pyfunc_call` does it."""


async def in_force(address: str) -> None:
    """Wait until `is_in_force`."""
    await eventually(lambda: is_in_force(address), 30, what=f"the local route of {address}")


def is_in_force(address: str) -> bool:
    """Whether the kernel has made the local route of a new IPv6 address. A worker of the kernel does that by and by,
    also with `nodad`."""
    command = ["ip", "-6", "route", "show", "table", "local"]
    return f"local {address} " in subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.hookimpl(tryfirst=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> bool | None:
    if "own_namespaces" not in pyfuncitem.fixturenames or _inside:
        return None
    failed = _in_namespaces(lambda: pyfuncitem.ihook.pytest_pyfunc_call(pyfuncitem=pyfuncitem))
    if failed:
        pytest.fail(failed, pytrace=False)
    return True


def _in_namespaces(test: Callable[[], object]) -> str:
    """Run `test` in a child; the traceback if it failed, else an empty text."""
    reader, writer = os.pipe()
    with warnings.catch_warnings():
        # Python 3.12 warns of threads at a fork; trio's idle ones are forgotten in the child.
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        os.close(reader)
        said = "the child died"
        try:
            said = _child(test, writer)
        except BaseException:
            said = traceback.format_exc()
        finally:
            os.write(writer, said.encode()[-60_000:])
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as answers:
        text = answers.read().decode(errors="replace")
    os.waitpid(child, 0)
    return "" if text == "passed" else text or "the child died without a word"


def _child(test: Callable[[], object], writer: int) -> str:
    global _inside
    _inside = True
    user, group = os.geteuid(), os.getegid()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEWNS | _NEWPID | _NEWNET | (_NEWUSER if user else 0)):
        return f"needs root or unprivileged user namespaces: {os.strerror(ctypes.get_errno())}"
    if user:
        for name, line in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(line)
    init = os.fork()
    if init:
        os.waitpid(init, 0)
        return ""  # the grandchild has said it
    said = "passed"
    try:
        subprocess.run(["sh", "-c", _PREPARE], check=True)
        test()
    except BaseException:
        said = traceback.format_exc()
    finally:
        os.write(writer, said.encode()[-60_000:])
        os._exit(0)
