"""The lab as a Python object: start one (`running_lab`), or attach to one that runs (`attach`), and operate it.

All methods are async, under trio; each makes one request and raises `LabError`, with one sentence, when the
lab cannot do it. Cancelling withdraws the request; a program being run ends with it.

    async with running_lab(Spec.simple(6, labels={"site-1": "gcp"})) as lab:
        await lab.all_pairs_ping(deadline=30)
        await lab.etcdctl("put", "/kilo/mesh/granularity", "full")
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from base64 import b64decode
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import trio
from attrs import define, field, frozen

from kilo_etcd.etcd.api import KeyValue
from kilo_etcd.lab import control, runtime
from kilo_etcd.lab.addressing import Layout, lay_out, member_of
from kilo_etcd.lab.capture import Flow
from kilo_etcd.lab.machine import BASE
from kilo_etcd.lab.namespaces import NamespaceError, check_root
from kilo_etcd.lab.probe import Gap, ProbeResult
from kilo_etcd.lab.runtime import LabError
from kilo_etcd.lab.spec import Spec
from kilo_etcd.model import IPAddress

_numbers = itertools.count(1)
_SETTLE = 0.1
PATIENT = {"ETCDCTL_DIAL_TIMEOUT": "20s", "ETCDCTL_COMMAND_TIMEOUT": "30s"}
"""How long etcdctl and kgctl wait for etcd: many hosts share one machine here."""


@frozen
class Completed:
    """A program that has run to its end."""

    stdout: str
    stderr: str
    returncode: int
    """Exit status; minus the signal's number when killed."""


@frozen(kw_only=True)
class HostStatus:
    """One host as the lab sees it."""

    host: str
    site: str
    power: bool
    private: tuple[str, ...]
    public: tuple[str, ...]
    mesh: tuple[str, ...]
    agent: str
    """For people: `running`, `frozen`, `killed by SIGKILL`, ..."""
    agent_pid: int | None
    """In the lab's own PID namespace; it changes when the agent is started anew, and only then."""
    cuts: tuple[str, ...]


@frozen
class Count:
    """What a router's counter has seen."""

    packets: int
    bytes: int


@define(eq=False)
class RunningProbe:
    """A probe under way; `result` is there when its block has ended."""

    _connection: control.ControlConnection
    target: str
    result: ProbeResult | None = None

    async def peek(self) -> ProbeResult:
        """The account so far, while it runs."""
        await self._connection.send({"op": "peek"})
        return ProbeResult.from_mapping(await self._connection.result())

    async def flowing_again(self, deadline: float, *, after: float = 0.0) -> ProbeResult:
        """Wait until what was sent later than `after` seconds from the probe's start is answered."""
        with trio.move_on_after(deadline):
            while True:
                status = await self.peek()
                if status.flowing and status.duration - 0.5 > after:
                    return status
                await trio.sleep(_SETTLE)
        raise LabError(f"no packet reached {self.target} again within {deadline} s")

    @property
    def _final(self) -> ProbeResult:
        if self.result is None:
            raise LabError("the probe still runs; ask peek(), or leave its block first")
        return self.result

    @property
    def sent(self) -> int:
        """Packets sent."""
        return self._final.sent

    @property
    def lost(self) -> int:
        """Packets never answered."""
        return self._final.lost

    @property
    def gaps(self) -> tuple[Gap, ...]:
        """Consecutive packets that were never answered."""
        return self._final.gaps

    @property
    def longest_gap(self) -> float:
        """Seconds for which consecutive packets were lost, at most."""
        return self._final.longest_gap


@define(eq=False)
class RunningCapture:
    """A capture under way; `flows` are there when its block has ended."""

    interfaces: tuple[str, ...]
    flows: tuple[Flow, ...] = ()


@define(eq=False)
class Lab:
    """A running lab."""

    name: str
    _path: Path
    spec: Spec | None = None
    """What it was built from; None where attached to a lab that another process runs."""
    layout: Layout | None = field(default=None, repr=False)

    async def _ask(self, op: str, /, **request: Any) -> Any:
        connection = await control.connect(self._path)
        try:
            await connection.send({"op": op, **request})
            return await connection.result()
        finally:
            connection.close()

    async def build(self, say: Callable[[str], object] = lambda line: None) -> None:
        """Have the lab built; `running_lab` does it. `say` is told of each step in a short line."""
        connection = await control.connect(self._path)
        try:
            await connection.send({"op": "build"})
            while True:
                answer = await connection.receive()
                if answer is None:
                    raise LabError("the lab has ended while it was being built")
                if "error" in answer:
                    raise LabError(str(answer["error"]))
                if "ok" in answer:
                    return
                say(answer["say"])
        finally:
            connection.close()

    # --- running programs ----------------------------------------------------------------------------------

    async def exec(
        self,
        machine: str,
        *argv: str,
        input: str = "",
        env: Mapping[str, str | None] | None = None,
        check: bool = False,
    ) -> Completed:
        """Run a program in a host, `router:<site>`, `etcd:<member>`, `internet` or `operator`, and keep what it prints.

        `check` raises LabError when it does not exit with 0.
        """
        stdin_fd = os.memfd_create("input", os.MFD_CLOEXEC)
        outputs: list[bytearray] = [bytearray(), bytearray()]
        status = -1
        async with AsyncExitStack() as stack:
            stack.callback(os.close, stdin_fd)
            os.write(stdin_fd, input.encode())
            os.lseek(stdin_fd, 0, os.SEEK_SET)
            readers, writers = [], []
            for _ in outputs:
                reader, writer = os.pipe()
                readers.append(await stack.enter_async_context(trio.lowlevel.FdStream(reader)))
                writers.append(os.fdopen(writer, "wb"))

            async def collect(reader: trio.lowlevel.FdStream, into: bytearray) -> None:
                async for part in reader:
                    into += part

            try:
                fds = (stdin_fd, writers[0].fileno(), writers[1].fileno())
                connection = await self._start(machine, argv, fds, env=env)
            finally:
                for pipe in writers:
                    pipe.close()
            # What was printed before a refusal is of no interest, so the pipes are read to their end in any case.
            try:
                async with trio.open_nursery() as nursery:
                    for reader_stream, into in zip(readers, outputs, strict=True):
                        nursery.start_soon(collect, reader_stream, into)
                status = int(await connection.result())
            finally:
                connection.close()
        completed = Completed(outputs[0].decode(errors="replace"), outputs[1].decode(errors="replace"), status)
        if check and status:
            raise LabError(
                f"{' '.join(argv)} in {machine} ended with {status}: {(completed.stderr or completed.stdout).strip()}"
            )
        return completed

    async def _start(
        self,
        machine: str,
        argv: Sequence[str],
        fds: Sequence[int],
        *,
        env: Mapping[str, str | None] | None = None,
        terminal: bool = False,
    ) -> control.ControlConnection:
        connection = await control.connect(self._path)
        try:
            request = {
                "op": "exec",
                "machine": machine,
                "argv": argv,
                "env": env,
                "cwd": os.getcwd(),
                "terminal": terminal,
            }
            await connection.send(request, fds)
        except BaseException:
            connection.close()
            raise
        return connection

    async def attach_program(
        self,
        machine: str,
        argv: Sequence[str],
        fds: Sequence[int],
        *,
        terminal: bool = False,
        env: Mapping[str, str | None] | None = None,
    ) -> int:
        """Run a program on these descriptors as its standard input, output and errors; its exit status."""
        connection = await self._start(machine, argv, fds, terminal=terminal, env=env)
        try:
            return int(await connection.result())
        finally:
            connection.close()

    async def etcdctl(self, *argv: str, check: bool = True) -> Completed:
        """The real etcdctl, at the operator's."""
        # etcdctl refuses to be told a thing twice.
        flags = (arg[2:].partition("=")[0] for arg in argv if arg.startswith("--"))
        variables = ("ETCDCTL_" + flag.replace("-", "_").upper() for flag in flags)
        return await self.exec("operator", "etcdctl", *argv, check=check, env={**PATIENT, **dict.fromkeys(variables)})

    async def key_values(self, prefix: str) -> tuple[KeyValue, ...]:
        """What etcd holds below a prefix, sorted by key, as the operator's etcdctl reads it."""
        answer = json.loads((await self.etcdctl("get", "--prefix", "-w", "json", prefix)).stdout)
        return tuple(
            KeyValue(
                key=b64decode(kv["key"]),
                value=b64decode(kv.get("value", "")),
                create_revision=kv["create_revision"],
                mod_revision=kv["mod_revision"],
                lease=kv.get("lease", 0),
            )
            for kv in answer.get("kvs", ())
        )

    async def kgctl(self, *argv: str, check: bool = True, env: Mapping[str, str | None] | None = None) -> Completed:
        """kgctl, at the operator's."""
        own = Path(sys.executable).parent / "kgctl"
        program = [str(own)] if own.exists() else [sys.executable, "-c", "from kilo_etcd.ctl.main import main; main()"]
        return await self.exec("operator", *program, *argv, check=check, env={**PATIENT, **(env or {})})

    async def log(self, name: str) -> str:
        """What a host's agent, or an etcd member, has logged."""
        return (await self.exec("operator", "cat", f"{BASE}/logs/{name.removeprefix('etcd:')}.log", check=True)).stdout

    # --- hosts and agents ----------------------------------------------------------------------------------

    async def start(self, host: str) -> int:
        """Start a host's agent (nothing if it runs); its pid."""
        return int(await self._ask("agent", action="start", host=host))

    async def stop(self, host: str) -> None:
        """SIGTERM to a host's agent; returns when it has ended."""
        await self._ask("agent", action="stop", host=host)

    async def kill(self, host: str) -> None:
        """SIGKILL to a host's agent; returns when it has ended."""
        await self._ask("agent", action="kill", host=host)

    async def reload(self, host: str) -> None:
        """SIGHUP: the agent runs its code anew, as after an upgrade."""
        await self._ask("agent", action="reload", host=host)

    async def freeze(self, host: str) -> None:
        """SIGSTOP to a host's agent."""
        await self._ask("agent", action="freeze", host=host)

    async def thaw(self, host: str) -> None:
        """SIGCONT to a host's agent."""
        await self._ask("agent", action="thaw", host=host)

    async def power_off(self, host: str) -> None:
        """Crash a host: every process, interface and connection of it is gone at once. Its state directory stays."""
        await self._ask("power-off", host=host)

    async def power_on(self, host: str, *, agent: bool | None = None) -> None:
        """Boot a host again and start its agent (unless told not to, or the lab has none)."""
        if agent is None:
            agent = self.spec is None or self.spec.agents
        await self._ask("power-on", host=host, agent=agent)

    async def cut(self, host: str, *kinds: str) -> None:
        """Drop silently what a host exchanges with `etcd`, its `location`, all `others`, or `all`, what it forwards
        (`forwarding`), what goes to its WireGuard `port`, or a `fifth` of that; cuts add up."""
        await self._ask("cut", host=host, **{"from": kinds or ("all",)})

    async def heal(self, host: str) -> None:
        """Undo all cuts of a host."""
        await self._ask("cut", host=host, **{"from": ()})

    async def cut_site(self, site: str, *kinds: str) -> None:
        """Drop at a site's router what it exchanges with `etcd`, all `others`, or `all`."""
        await self._ask("cut-site", site=site, **{"from": kinds or ("all",)})

    async def heal_site(self, site: str) -> None:
        """Undo all cuts of a site."""
        await self._ask("cut-site", site=site, **{"from": ()})

    async def label(self, host: str, label: str) -> None:
        """Label a host, with the real etcdctl."""
        await self._ask("label", host=host, label=label)

    async def unlabel(self, host: str) -> None:
        """Remove a host's label."""
        await self._ask("label", host=host, label=None)

    async def etcd(self, action: str, member: str = "etcd1") -> None:
        """kill, stop, start, freeze or thaw an etcd member (`etcd1`, ...); cut it off from the others, or heal that."""
        await self._ask("etcd", action=action, member=member)

    async def etcd_ready(self, deadline: float = 20.0) -> None:
        """Wait until all etcd members are healthy."""
        await self._ask("etcd-ready", seconds=deadline)

    async def agent_pid(self, host: str) -> int | None:
        """The pid of a host's agent (in the lab); None if it does not run."""
        return (await self.host(host)).agent_pid

    # --- observing -----------------------------------------------------------------------------------------

    async def status(self) -> list[HostStatus]:
        """All hosts."""
        rows = await self._ask("status")
        return [
            HostStatus(**{**row, **{key: tuple(row[key]) for key in ("private", "public", "mesh", "cuts")}})
            for row in rows
        ]

    async def host(self, name: str) -> HostStatus:
        """One host."""
        for row in await self.status():
            if row.host == name:
                return row
        raise LabError(f"there is no host {name!r} in this lab")

    async def mesh_address(self, host: str) -> IPAddress:
        """A host's mesh address, as its WireGuard interface has it."""
        addresses = (await self.host(host)).mesh
        if not addresses:
            raise LabError(f"{host} has no mesh address yet: its agent has not set up its interface")
        return ip_address(addresses[0])

    async def missing_pings(self, *hosts: str, timeout: float = 1.0) -> list[tuple[str, str]]:
        """Ordered pairs of hosts (all that are on, unless named) whose ping is not answered in time."""
        return [(a, b) for a, b in await self._ask("pings", hosts=hosts, timeout=timeout)]

    async def all_pairs_ping(self, deadline: float = 30.0, *, hosts: Iterable[str] = ()) -> None:
        """Wait until all ordered pairs ping in one and the same round. LabError names those that do not."""
        chosen = tuple(hosts)
        missing: list[tuple[str, str]] = []
        with trio.move_on_after(deadline):
            while missing := await self.missing_pings(*chosen):  # noqa: ASYNC110 (another process's news)
                await trio.sleep(_SETTLE)
            return
        raise LabError(await self._why(missing, deadline))

    async def _why(self, missing: Sequence[tuple[str, str]], deadline: float) -> str:
        pairs = ", ".join(f"{a} to {b}" for a, b in missing[:6]) + (", ..." if len(missing) > 6 else "")
        ended = [row for row in await self.status() if row.agent_pid is None and row.agent != "none"]
        text = f"after {deadline:g} s {len(missing)} pairs do not ping: {pairs}"
        for row in ended[:3]:
            with suppress(LabError):
                last = (await self.log(row.host)).strip().splitlines()[-1:]
                text += f"; the agent of {row.host} {row.agent}" + (f" ({last[0]})" if last else "")
        return text

    async def ping(self, source: str, target: str, *, timeout: float = 1.0) -> bool:
        """Whether one ping from a machine to a host's mesh address, or to a literal address, is answered in time."""
        return bool(await self._ask("ping", timeout=timeout, to=target, **{"from": source}))

    async def counters(self, site: str) -> dict[str, Count]:
        """A router's counters since the start: wireguard, etcd, icmp (errors), other, and stray (between the
        subnets of a strict site). An open lab lets the last two through, every other lab drops them."""
        return {name: Count(**count) for name, count in (await self._ask("counters", site=site)).items()}

    @asynccontextmanager
    async def probe(
        self, source: str, target: str, interval: float = 0.01, *, address: IPAddress | str | None = None
    ) -> AsyncIterator[RunningProbe]:
        """Ping a host's mesh address (or `address`) every `interval` seconds while in the block."""
        connection = await control.connect(self._path)
        try:
            request = {"op": "probe", "from": source, "to": target, "interval": interval}
            await connection.send({**request, "address": str(address) if address else None})
            probe = RunningProbe(connection, str(await connection.result()))
            yield probe
            await connection.send({"op": "stop"})
            probe.result = ProbeResult.from_mapping(await connection.result())
        finally:
            connection.close()

    @asynccontextmanager
    async def capture(
        self, machine: str, interfaces: Iterable[str] = (), *, incoming_only: bool | None = None
    ) -> AsyncIterator[RunningCapture]:
        """Count flows on a machine's interfaces while in the block; then `flows`.

        Unless named, a router's ports to its hosts (each packet counted once, as it comes from a host), or a
        host's `eth0` (both directions).
        """
        if incoming_only is None:
            incoming_only = machine.startswith("router:")
        connection = await control.connect(self._path)
        try:
            request = {
                "op": "capture",
                "machine": machine,
                "interfaces": list(interfaces),
                "incoming_only": incoming_only,
            }
            await connection.send(request)
            capture = RunningCapture(tuple(await connection.result()))
            yield capture
            await connection.send({"op": "stop"})
            capture.flows = tuple(Flow.from_mapping(flow) for flow in await connection.result())
        finally:
            connection.close()

    @property
    def hosts(self) -> tuple[str, ...]:
        """The names of all hosts, where this process has started the lab."""
        return tuple(host.name for host in self.spec.hosts) if self.spec else ()

    @property
    def members(self) -> tuple[str, ...]:
        """The names of the etcd members, where this process has started the lab."""
        return tuple(member_of(i)[5:] for i in range(1, self.spec.etcd + 1)) if self.spec else ()


def attach(name: str | None = None) -> Lab:
    """A lab that runs already, by name, or the only one. LabError if there is none."""
    chosen = runtime.choose_lab(name)
    return Lab(chosen, runtime.socket_path(chosen))


@asynccontextmanager
async def running_lab(
    spec: Spec, name: str | None = None, *, say: Callable[[str], object] = lambda line: None
) -> AsyncIterator[Lab]:
    """Build a lab and have it while in the block; afterwards nothing of it is left, whatever happens to this process.

    It is built (etcd healthy, agents started) on entry; wait for `all_pairs_ping` besides. LabError, with one
    sentence, when it cannot be built. Call it from a thread that lives as long as the lab: the kernel ends it with
    its parent.
    """
    layout = lay_out(spec)
    try:
        check_root()
    except NamespaceError as error:
        raise LabError(error.strerror or str(error)) from None
    name = name or f"lab-{os.getpid()}-{next(_numbers)}"
    with runtime.hold(name) as held, tempfile.TemporaryFile() as errors:
        # trio would start it from a worker thread, whose end the kernel would take for ours (PDEATHSIG).
        process = subprocess.Popen(  # noqa: ASYNC220
            [sys.executable, "-m", "kilo_etcd.lab", name, str(held.listener.fileno()), str(held.directory.parent)],
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=errors.fileno(),
            pass_fds=(held.listener.fileno(),),
            start_new_session=True,
        )
        # With the listener open here too, a request to a lab that died would wait forever.
        held.listener.close()
        assert process.stdin is not None
        try:
            lab = Lab(name, held.directory / "control", spec, layout)
            with suppress(BrokenPipeError):
                process.stdin.write(json.dumps(spec.as_mapping()).encode() + b"\n")
                process.stdin.flush()
            try:
                await lab.build(say)
            except LabError as error:
                await _gone(process, 1)
                errors.seek(0)
                output = errors.read().decode(errors="replace").strip()
                raise LabError(output or str(error)) from None
            yield lab
        finally:
            with suppress(BrokenPipeError):
                process.stdin.close()
            with trio.CancelScope(shield=True):
                await _gone(process)


async def _gone(process: subprocess.Popen[bytes], patience: float = 5) -> None:
    """Wait for the lab's end; it has been told by the closing of its standard input, or is ending by itself."""
    if process.poll() is not None:
        return
    fd = os.pidfd_open(process.pid)
    try:
        with trio.move_on_after(patience) as waiting:
            await trio.lowlevel.wait_readable(fd)
        if waiting.cancelled_caught:
            process.kill()
            await trio.lowlevel.wait_readable(fd)
    finally:
        os.close(fd)
    process.wait()
