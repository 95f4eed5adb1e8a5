"""`python -m kilo_etcd.lab NAME LISTENER BASE`: the process that becomes the lab; started by `client`, not by people.

It leaves for new namespaces and forks; the child is the first process there, so that the kernel ends
everything when it ends, and is itself ended with its parent, and that with the client (PDEATHSIG each; the
closing of standard input besides). Standard input carries the spec as one line of JSON.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from contextlib import suppress
from pathlib import Path

import trio

from kilo_etcd.lab import namespaces
from kilo_etcd.lab.machine import BASE, STATE_DIR
from kilo_etcd.lab.namespaces import MS_BIND, MS_NODEV, MS_NOEXEC, MS_NOSUID, MS_PRIVATE, MS_REC
from kilo_etcd.lab.runtime import SUBDIRECTORY
from kilo_etcd.lab.server import serve
from kilo_etcd.lab.spec import parse_spec


def main(name: str, listener: int, base: str) -> None:
    """Be the lab until the client ends."""
    line = bytearray()
    while not line.endswith(b"\n"):
        line += os.read(0, 1) or b"\n"
    spec = parse_spec(json.loads(line), "the lab")
    try:
        namespaces.enter_lab_namespaces()
        namespaces.check_entering()
        namespaces.die_with_parent()
        child = os.fork()
        if child:
            # Nothing to do but to last as long as the child, and to say how it ended.
            os.close(0)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, lambda got, _: os.kill(child, signal.SIGKILL))
            _, status = os.waitpid(child, 0)
            os._exit(0 if os.WIFSIGNALED(status) else os.waitstatus_to_exitcode(status))
        namespaces.die_with_parent()
        _furnish(base)
    except OSError as error:
        print(error.strerror or error, file=sys.stderr)
        os._exit(1)
    trio.run(serve, socket.socket(fileno=listener), spec, name, 0)


def _furnish(base: str) -> None:
    """The lab's own view of the file system: what machines will be made from."""
    namespaces.mount("none", "/", flags=MS_REC | MS_PRIVATE)
    with suppress(OSError):
        namespaces.mount("proc", "/proc", "proc", MS_NOSUID | MS_NODEV | MS_NOEXEC)
    control = os.open(base, os.O_PATH | os.O_CLOEXEC)
    namespaces.mount("tmpfs", "/run", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    os.makedirs(f"{BASE}/control/{SUBDIRECTORY}")
    namespaces.mount(f"/proc/self/fd/{control}", f"{BASE}/control/{SUBDIRECTORY}", flags=MS_BIND)
    os.close(control)
    if not os.path.isdir(STATE_DIR):
        _make_room_for_state()
    with suppress(OSError):
        Path("/proc/self/comm").write_text("kilo-lab")


def _make_room_for_state() -> None:
    """Have the state directory exist without touching the disk: a tmpfs above it, with links to what it hides."""
    parent, hidden = os.path.dirname(STATE_DIR), f"{BASE}/hidden"
    os.mkdir(hidden)
    namespaces.mount(parent, hidden, flags=MS_BIND | MS_REC)
    names = os.listdir(hidden)
    namespaces.mount("tmpfs", parent, "tmpfs", MS_NOSUID | MS_NODEV, "mode=755")
    for entry in names:
        os.symlink(f"{hidden}/{entry}", f"{parent}/{entry}")
    os.mkdir(STATE_DIR)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
