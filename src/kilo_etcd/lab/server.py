"""The world's ear: takes requests from the control socket and has the `World` do them.

Each connection is one request. A program that a client started is ended when the client goes away; nothing
else is. Mistakes of a client's are answered with a sentence, and never end the lab.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from ipaddress import ip_address
from typing import Any

import trio

from kilo_etcd.lab.addressing import lay_out
from kilo_etcd.lab.capture import Capture
from kilo_etcd.lab.control import ControlConnection
from kilo_etcd.lab.machine import Process
from kilo_etcd.lab.namespaces import NamespaceError
from kilo_etcd.lab.probe import LabProbe, Pinger
from kilo_etcd.lab.runtime import LabError
from kilo_etcd.lab.spec import Spec
from kilo_etcd.lab.world import World

Request = Mapping[str, Any]


async def serve(listener: socket.socket, spec: Spec, name: str, lifeline: int) -> None:
    """Be the lab until the client that holds the other end of `lifeline` lets go of it."""
    async with trio.open_nursery() as nursery:
        world = World(lay_out(spec), name, nursery, Pinger(nursery))
        nursery.start_soon(_accept, trio.socket.from_stdlib_socket(listener), world, nursery)
        while True:
            await trio.lowlevel.wait_readable(lifeline)
            if not os.read(lifeline, 4096):
                break
        # Nothing is taken down one by one: this process is the first of its PID namespace.
        os._exit(0)


async def _accept(listener: trio.socket.SocketType, world: World, nursery: trio.Nursery) -> None:
    while True:
        sock, _ = await listener.accept()
        nursery.start_soon(_handle, ControlConnection(sock), world)


async def _handle(connection: ControlConnection, world: World) -> None:
    try:
        request = await connection.receive()
        if request is None:
            return
        try:
            operation = _OPERATIONS.get(str(request.get("op")))
            if operation is None:
                raise LabError(f"this lab knows no operation {request.get('op')!r}")
            answer: dict[str, Any] = {"ok": await operation(world, connection, request)}
        except (LabError, NamespaceError) as error:
            answer = {"error": error.strerror if isinstance(error, OSError) and error.strerror else str(error)}
        except Exception as error:
            # A request that nobody expected, or a client that went away meanwhile, must not end the lab.
            answer = {"error": f"the request {request.get('op')!r} failed: {error!r}"}
        await connection.send(answer)
    except (OSError, ValueError, trio.BrokenResourceError):
        # The client has gone, or uses another protocol; neither is the lab's concern.
        pass
    finally:
        connection.close()


async def _build(world: World, connection: ControlConnection, _: Request) -> None:
    async def say(line: str) -> None:
        await connection.send({"say": line})

    await world.build(say)


async def _exec(world: World, connection: ControlConnection, request: Request) -> object:
    machine = world.machine(request["machine"])
    if len(connection.fds) != 3:
        raise LabError("three file descriptors belong to a program: input, output and errors")
    process = machine.spawn(
        world.nursery,
        [str(word) for word in request["argv"]],
        (connection.fds[0], connection.fds[1], connection.fds[2]),
        env=request.get("env"),
        cwd=request.get("cwd"),
        terminal=bool(request.get("terminal")),
    )
    connection.close_fds()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_end_with_client, connection, process)
        await process.ended.wait()
        nursery.cancel_scope.cancel()
    return process.status


async def _end_with_client(connection: ControlConnection, process: Process) -> None:
    """Signals that the client passes on; and when the client goes away, the program's end."""
    with suppress(OSError):
        while message := await connection.receive():
            process.signal(int(message["signal"]), group=True)
    process.signal(signal.SIGHUP, group=True)
    process.signal(signal.SIGCONT, group=True)
    with trio.move_on_after(2):
        await process.ended.wait()
    process.signal(signal.SIGKILL, group=True)


async def _agent(world: World, _: ControlConnection, request: Request) -> object:
    return await world.agent(request["action"], request["host"])


async def _power_off(world: World, _: ControlConnection, request: Request) -> None:
    await world.power_off(request["host"])


async def _power_on(world: World, _: ControlConnection, request: Request) -> None:
    await world.power_on(request["host"], agent=request["agent"])


async def _cut(world: World, _: ControlConnection, request: Request) -> None:
    await world.cut(request["host"], request["from"])


async def _cut_site(world: World, _: ControlConnection, request: Request) -> None:
    await world.cut_site(request["site"], request["from"])


async def _etcd(world: World, _: ControlConnection, request: Request) -> None:
    await world.etcd(request["action"], request["member"])


async def _etcd_ready(world: World, _: ControlConnection, request: Request) -> None:
    await world.etcd_ready(request["seconds"])


async def _label(world: World, _: ControlConnection, request: Request) -> None:
    await world.label(request["host"], request["label"])


async def _counters(world: World, _: ControlConnection, request: Request) -> object:
    return await world.counters(request["site"])


async def _status(world: World, _: ControlConnection, __: Request) -> object:
    return world.status()


async def _pings(world: World, _: ControlConnection, request: Request) -> object:
    return await world.missing_pings(request["hosts"], request["timeout"])


async def _ping(world: World, _: ControlConnection, request: Request) -> object:
    machine, address = world.machine(request["from"]), world.address_of(request["to"])
    return not await world.pinger.missing([(machine, request["to"], address)], request["timeout"])


async def _probe(world: World, connection: ControlConnection, request: Request) -> object:
    machine = world.machine(request["from"])
    target = ip_address(request["address"]) if request.get("address") else world.address_of(request["to"])
    probe = LabProbe(world.pinger, machine, target, float(request["interval"]))
    stop = trio.Event()

    async def send() -> None:
        await probe.run(stop)
        done.set()

    done = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(send)
        await connection.send({"ok": str(target)})
        while (message := await connection.receive()) is not None and message["op"] == "peek":
            await connection.send({"ok": probe.result(final=False).as_mapping()})
        if message is None:
            nursery.cancel_scope.cancel()
        stop.set()
        await done.wait()
    return probe.result(final=True).as_mapping()


async def _capture(world: World, connection: ControlConnection, request: Request) -> object:
    name = request["machine"]
    machine = world.machine(name)
    interfaces = request.get("interfaces") or world.captured_by_default(name)
    capture = Capture()
    try:
        capture.open(machine, interfaces, incoming_only=bool(request["incoming_only"]))
    except OSError as error:
        raise LabError(f"{', '.join(interfaces)} in {name} cannot be captured: {error.strerror}") from None
    async with trio.open_nursery() as nursery:
        nursery.start_soon(capture.run)
        await connection.send({"ok": list(interfaces)})
        await connection.receive()
        nursery.cancel_scope.cancel()
    return capture.close()


_OPERATIONS: dict[str, Callable[[World, ControlConnection, Request], Awaitable[object]]] = {
    "build": _build,
    "exec": _exec,
    "agent": _agent,
    "power-off": _power_off,
    "power-on": _power_on,
    "cut": _cut,
    "cut-site": _cut_site,
    "etcd": _etcd,
    "etcd-ready": _etcd_ready,
    "label": _label,
    "counters": _counters,
    "status": _status,
    "pings": _pings,
    "ping": _ping,
    "probe": _probe,
    "capture": _capture,
}
