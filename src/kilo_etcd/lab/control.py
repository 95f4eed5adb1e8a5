"""How a client talks to a running lab: one JSON line each way over a unix socket, with file descriptors.

A request is `{"op": ..., ...}`, with the descriptors of standard input, output and error attached where a
program is to be run. Answers are `{"ok": result}` or `{"error": sentence}`; progress comes
before, as `{"say": line}`. A client that closes its connection withdraws its request.
"""

from __future__ import annotations

import array
import json
import os
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import trio
from attrs import define, field

from kilo_etcd.lab.runtime import LabError

_MAX_FDS = 3


@define(eq=False)
class ControlConnection:
    """Either end of a control connection."""

    sock: trio.socket.SocketType
    _buffer: bytearray = field(factory=bytearray)
    fds: list[int] = field(factory=list)
    """Descriptors received; the user closes them (`close_fds`)."""

    async def send(self, message: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
        """Send one message. OSError when the other end is gone."""
        data = json.dumps(message).encode() + b"\n"
        if fds:
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))]
            sent = await self.sock.sendmsg([data], rights)
            data = data[sent:]
        while data:
            sent = await self.sock.send(data)
            data = data[sent:]

    async def receive(self) -> dict[str, Any] | None:
        """The next message; None when the other end has closed."""
        while b"\n" not in self._buffer:
            space = socket.CMSG_SPACE(_MAX_FDS * array.array("i").itemsize)
            try:
                data, ancillary, _, _ = await self.sock.recvmsg(1 << 16, space, socket.MSG_CMSG_CLOEXEC)
            except ConnectionError:
                return None
            for level, kind, content in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    received = array.array("i")
                    received.frombytes(content[: len(content) - len(content) % received.itemsize])
                    self.fds += received
            if not data:
                return None
            self._buffer += data
        line, _, rest = bytes(self._buffer).partition(b"\n")
        self._buffer[:] = rest
        try:
            message = json.loads(line)
        except RecursionError:
            raise ValueError("a message is nested too deeply") from None
        if not isinstance(message, dict):
            raise ValueError("a message must be an object")
        return message

    async def result(self) -> Any:
        """The answer to a request. LabError carries the lab's sentence."""
        answer = await self.receive()
        if answer is None:
            raise LabError("the lab has ended")
        if "error" in answer:
            raise LabError(str(answer["error"]))
        return answer["ok"]

    def close_fds(self) -> None:
        """Close the descriptors received."""
        for fd in self.fds:
            os.close(fd)
        self.fds.clear()

    def close(self) -> None:
        """Close it all."""
        self.close_fds()
        self.sock.close()


async def connect(path: Path) -> ControlConnection:
    """Connect to a lab's control socket. LabError when nobody listens there."""
    sock = trio.socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    handle = -1
    try:
        # Socket addresses are limited to 108 bytes; the directory's handle is always short.
        handle = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        if os.fstat(handle).st_uid != os.geteuid():
            # Our standard input and output would go to whoever listens there.
            raise PermissionError
        await sock.connect(f"/proc/self/fd/{handle}/{path.name}")
    except OSError:
        sock.close()
        raise LabError(f"no lab answers at {path}; kgctl lab run starts one") from None
    except BaseException:
        sock.close()
        raise
    finally:
        if handle >= 0:
            os.close(handle)
    return ControlConnection(sock)
