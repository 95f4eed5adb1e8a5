"""The lab itself, inside its namespaces: it builds the machines and operates them.

Promises: everything it makes lives in namespaces that end with its process. Operations on one
machine are made one after the other. It refuses nothing that a person can do to a real host; what the
kernel refuses is told in one sentence.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import socket
import sys
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import suppress
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import trio
from attrs import define, field

from kilo_etcd.lab import addressing
from kilo_etcd.lab.addressing import ETCD_PEER_PORT, ETCD_PORT, Layout, router_of
from kilo_etcd.lab.machine import BASE, STATE_DIR, Machine, Process, run_program
from kilo_etcd.lab.namespaces import NamespaceError, spawn
from kilo_etcd.lab.probe import Pinger
from kilo_etcd.lab.runtime import NAME_VARIABLE, VARIABLE, LabError
from kilo_etcd.model import DEFAULT_INTERFACE, DEFAULT_PREFIX, InternalIPs, IPAddress

Say = Callable[[str], Awaitable[None]]

_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PASSED_ON = ("HOME", "LANG", "LC_ALL", "TERM", "COLORTERM", "PYTHONPATH", "PYTHONDONTWRITEBYTECODE", "USER", "SHELL")
_ETCD_WAIT = 20.0


@define(eq=False)
class World:
    """A built, or half-built, lab."""

    layout: Layout
    name: str
    nursery: trio.Nursery
    pinger: Pinger
    machines: dict[str, Machine] = field(factory=dict)
    agents: dict[str, Process] = field(factory=dict)
    members: dict[str, Process] = field(factory=dict)
    _cuts: dict[str, set[str]] = field(factory=dict)
    _mesh: dict[str, tuple[IPAddress, ...]] = field(factory=dict)
    _locks: dict[str, trio.Lock] = field(factory=dict)

    # --- building ------------------------------------------------------------------------------------------

    async def build(self, say: Say) -> None:
        """Make everything the spec asks for. LabError or NamespaceError says what was impossible."""
        spec = self.layout.spec
        self._require_programs()
        os.mkdir(f"{BASE}/logs")
        await say(f"{len(spec.hosts)} hosts at {len(spec.sites)} sites, {spec.etcd} etcd")
        for name in self.layout.machines:
            self._boot(name)
            await trio.lowlevel.checkpoint()
        await self._wire(self.layout.wires)
        for name in self.layout.machines:
            await self._configure(name)
        for site in self.layout.sites:
            await self._nft(router_of(site), addressing.router_firewall(self.layout, site))
        for machine, lines in addressing.netem_commands(self.layout).items():
            try:
                await self._run(machine, ["tc", "-batch", "-"], "\n".join(lines) + "\n")
            except NamespaceError:
                raise LabError(
                    "latency_ms and loss_percent need a kernel with netem (module sch_netem); "
                    "this one has none, so leave them out or load it"
                ) from None
        await say("wires, routers and firewalls are up")
        for member in self.layout.members:
            self._start_member(member)
        await self._etcd_ready(_ETCD_WAIT)
        await say(f"etcd answers at {', '.join(self.layout.endpoints)}")
        for host in spec.hosts:
            if host.label is not None and host.agent:
                await self.label(host.name, host.label)
        if spec.agents:
            await self._require_wireguard()
            nodes = self._nodes()
            for node in nodes:
                self.start_agent(node)
                await trio.lowlevel.checkpoint()
            await say(f"{len(nodes)} agents started")

    def _require_programs(self) -> None:
        needed = ["ip", "nft", "etcd", "etcdctl", "sleep"]
        path = self._environment("operator")["PATH"]
        missing = [program for program in needed if not shutil.which(program, path=path)]
        if missing:
            raise LabError(
                f"the lab needs {', '.join(missing)}; on Debian or Ubuntu: "
                "apt install etcd-server etcd-client iproute2 nftables wireguard-go"
            )

    async def _require_wireguard(self) -> None:
        """Say at once what every agent would find out by itself: neither kernel nor userspace WireGuard is possible."""
        if self.layout.spec.agent_command or os.access("/dev/net/tun", os.R_OK | os.W_OK):
            return
        try:
            await self._run("operator", ["ip", "link", "add", "try0", "type", "wireguard"])
            await self._run("operator", ["ip", "link", "del", "try0"])
        except NamespaceError:
            raise LabError(
                "this kernel has no WireGuard, and userspace WireGuard needs /dev/net/tun, which this user "
                "may not open: run as root, or once: sudo chmod 666 /dev/net/tun"
            ) from None

    def _environment(self, machine: str) -> dict[str, str]:
        passed_on = {key: os.environ[key] for key in _PASSED_ON if key in os.environ}
        return {
            **passed_on,
            # kg and kgctl are installed beside the interpreter.
            "PATH": f"{Path(sys.executable).parent}:{os.environ.get('PATH', '')}:{_PATH}",
            "ETCDCTL_API": "3",
            "ETCDCTL_ENDPOINTS": ",".join(self.layout.endpoints_for(machine)),
            "PYTHONUNBUFFERED": "1",
            VARIABLE: f"{BASE}/control",
            NAME_VARIABLE: self.name,
            "KILO_LAB_MACHINE": machine,
        }

    def _boot(self, name: str) -> None:
        self.machines[name] = Machine.boot(
            name,
            self.nursery,
            environment=self._environment(name),
            hosts_file=addressing.hosts_file(self.layout, name),
            sysctls=addressing.sysctls(name),
        )

    async def _wire(self, wires: Iterable[addressing.Wire]) -> None:
        pids = {name: machine.first.pid for name, machine in self.machines.items()}
        # Names are unique within a machine only, so the world's own network stays empty: both ends are born elsewhere.
        lines = [addressing.wire_command(wire, pids) for wire in wires]

        def start(stdio: tuple[int, int, int]) -> Process:
            process = Process(spawn(["ip", "-batch", "-"], env=self._environment("world"), stdio=stdio))
            self.nursery.start_soon(process.mind)
            return process

        await run_program(start, "making the wires", "\n".join(lines) + "\n")

    async def _configure(self, name: str) -> None:
        await self._ip(name, addressing.interface_commands(self.layout, name))

    async def _ip(self, machine: str, lines: Sequence[str]) -> None:
        await self._run(machine, ["ip", "-batch", "-"], "\n".join(lines) + "\n")

    async def _nft(self, machine: str, script: str) -> None:
        await self._run(machine, ["nft", "-f", "-"], script)

    async def _run(self, machine: str, argv: Sequence[str], stdin: str = "") -> str:
        return await self.machine(machine).run(self.nursery, argv, stdin)

    # --- looking up ----------------------------------------------------------------------------------------

    def machine(self, name: str) -> Machine:
        """A machine that is on. LabError names what is wrong."""
        machine = self.machines.get(name) or self.machines.get(f"etcd:{name}")
        if machine is None:
            if name in self.layout.machines:
                raise LabError(f"{name} is powered off; kgctl lab power-on {name} switches it on")
            raise LabError(f"there is no {name!r} in this lab; there are {', '.join(self.layout.machines)}")
        return machine

    def _nodes(self) -> list[str]:
        """The hosts that run, or could run, an agent."""
        return [host.name for host in self.layout.spec.hosts if host.agent]

    def _host(self, name: str) -> str:
        if name not in self.layout.hosts:
            raise LabError(f"there is no host {name!r} in this lab; there are {', '.join(self.layout.hosts)}")
        return name

    def _member(self, name: str) -> str:
        for candidate in (name, f"etcd:{name}", f"etcd:etcd{name}"):
            if candidate in self.layout.members:
                return candidate
        raise LabError(f"there is no etcd member {name!r} in this lab; there are {', '.join(self.layout.members)}")

    def _lock(self, name: str) -> trio.Lock:
        return self._locks.setdefault(name, trio.Lock())

    def mesh_addresses(self, host: str) -> tuple[IPAddress, ...]:
        """A host's addresses on its WireGuard interface; empty until its agent has set them.

        A mesh address never moves, so it is remembered while the host is off.
        """
        machine = self.machines.get(self._host(host))
        addresses = machine.interface_addresses(DEFAULT_INTERFACE) if machine else ()
        if addresses:
            self._mesh[host] = addresses
        return addresses or self._mesh.get(host, ())

    # --- etcd ----------------------------------------------------------------------------------------------

    def _start_member(self, name: str) -> None:
        if name in self.members and self.members[name].alive:
            return
        short = name.removeprefix("etcd:")
        urls = {
            member: [f"http://{addressing.literal(ip)}" for ip in addresses]
            for member, addresses in self.layout.members.items()
        }
        clients = ",".join(f"{url}:{ETCD_PORT}" for url in urls[name])
        peers = ",".join(f"{url}:{ETCD_PEER_PORT}" for url in urls[name])
        cluster = ",".join(f"{m.removeprefix('etcd:')}={u[0]}:{ETCD_PEER_PORT}" for m, u in urls.items())
        argv = [
            "etcd", "--name", short, "--data-dir", f"{BASE}/etcd/{short}",
            "--listen-client-urls", f"{clients},http://127.0.0.1:{ETCD_PORT}",
            "--advertise-client-urls", clients,
            "--listen-peer-urls", peers, "--initial-advertise-peer-urls", f"{urls[name][0]}:{ETCD_PEER_PORT}",
            "--initial-cluster", cluster, "--initial-cluster-state", "new", "--initial-cluster-token", "kilo-lab",
            *self.layout.spec.etcd_args,
        ]  # fmt: skip
        env: dict[str, str | None] = {"ETCDCTL_ENDPOINTS": None, "ETCDCTL_API": None}
        if platform.machine() == "aarch64":
            # etcd 3.4 refuses to start there without it.
            env["ETCD_UNSUPPORTED_ARCH"] = "arm64"
        self.members[name] = self._daemon(name, short, argv, env)

    def _daemon(self, machine: str, log: str, argv: Sequence[str], env: dict[str, str | None] | None = None) -> Process:
        output = os.open(f"{BASE}/logs/{log}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        null = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        try:
            return self.machine(machine).spawn(self.nursery, argv, (null, output, output), env=env)
        finally:
            os.close(output)
            os.close(null)

    async def _etcd_ready(self, seconds: float) -> None:
        with trio.move_on_after(seconds):
            for name, addresses in self.layout.members.items():
                while not await self._healthy(addresses[0]):
                    if not self.members[name].alive:
                        raise LabError(f"etcd member {name} {self.members[name].description}: {log_tail(name[5:])}")
                    await trio.sleep(0.05)
            return
        raise LabError(f"etcd did not become healthy within {seconds:.0f} s: {log_tail('etcd1')}")

    async def _healthy(self, address: IPAddress) -> bool:
        """Whether a member answers `GET /health` with true, asked from the operator's machine."""
        machine = self.machine("operator")
        raw = machine.socket(socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_STREAM)
        machine.closers.remove(raw)
        answer = b""
        with trio.socket.from_stdlib_socket(raw) as sock, suppress(OSError), trio.move_on_after(3):
            await sock.connect((str(address), ETCD_PORT))
            await sock.send(b"GET /health HTTP/1.0\r\nHost: etcd\r\n\r\n")
            while part := await sock.recv(4096):
                answer += part
        return b'"health":"true"' in answer.replace(b" ", b"")

    async def etcd(self, action: str, name: str) -> None:
        """kill (SIGKILL), stop (SIGTERM), start, freeze or thaw a member; cut it off from the others, or heal that."""
        member = self._member(name)
        async with self._lock(member):
            process = self.members[member]
            if action == "start":
                self._start_member(member)
            elif action in ("cut", "heal"):
                await self._nft(member, addressing.member_cut_script(cut=action == "cut"))
            elif action in ("kill", "stop"):
                await end(process, action)
            else:
                freeze(process, action == "freeze", member)

    async def etcd_ready(self, seconds: float) -> None:
        """Wait until every member is healthy."""
        await self._etcd_ready(seconds)

    async def label(self, host: str, label: str | None) -> None:
        """Put, or delete, a host's location label, with the real etcdctl as a person would."""
        key = f"{DEFAULT_PREFIX}/locations/{self._host(host)}"
        command = ["del", key] if label is None else ["put", "--", key, label]
        await self._run("operator", ["etcdctl", *command])

    # --- agents and hosts ------------------------------------------------------------------------------------

    def agent_command(self, host: str) -> list[str]:
        """The agent's command line on a host."""
        spec = self.layout.spec
        (own,) = (h for h in spec.hosts if h.name == host)
        script = Path(sys.executable).parent / "kg"
        program = list(spec.agent_command) or (
            [str(script)]
            if script.exists()
            else [sys.executable, "-c", "from kilo_etcd.agent.entry import main; main()"]
        )
        return [
            *program,
            "--hostname", host,
            "--endpoints", ",".join(self.layout.endpoints_for(host)),
            "--state-dir", STATE_DIR,
            "--mesh-granularity", spec.granularity.value,
            # By default nobody asks for it, so that agents do not complain when an operator sets another value.
            *(() if spec.internal_ips is InternalIPs.ROUTED else ("--internal-ips", spec.internal_ips.value)),
            "--lease-ttl", f"{spec.lease_ttl}s",
            "--wireguard", spec.wireguard,
            *spec.agent_args,
            *own.args,
        ]  # fmt: skip

    def start_agent(self, host: str) -> int:
        """Start a host's agent unless it runs; its pid as the lab sees it."""
        running = self.agents.get(self._host(host))
        if host not in self._nodes():
            raise LabError(f"{host} runs no agent: it is described with agent = false")
        if running is None or not running.alive:
            running = self.agents[host] = self._daemon(host, host, self.agent_command(host))
        return running.pid

    async def agent(self, action: str, host: str) -> int | None:
        """start, stop (SIGTERM, waits), kill (SIGKILL, waits), reload (SIGHUP), freeze or thaw a host's agent."""
        async with self._lock(self._host(host)):
            if action == "start":
                return self.start_agent(host)
            process = self.agents.get(host)
            if process is None or not process.alive:
                raise LabError(f"the agent of {host} does not run; kgctl lab start {host} starts it")
            if action in ("stop", "kill"):
                await end(process, action)
            elif action == "reload":
                process.signal(signal.SIGHUP)
            else:
                freeze(process, action == "freeze", f"the agent of {host}")
            return None

    async def power_off(self, host: str) -> None:
        """A crash of the whole host: all its processes, interfaces and memory are gone at once; its disk is kept."""
        async with self._lock(self._host(host)):
            machine = self.machine(host)
            del self.machines[host]
            self._cuts.pop(host, None)
            machine.first.signal(signal.SIGKILL)
            # Network namespaces are taken apart in the kernel's own time; a dead host answers nothing from now on.
            wire = self.layout.hosts[host].wire
            await self._ip(wire.other, [f"link del {wire.other_interface}"])
            await machine.power_off()

    async def power_on(self, host: str, *, agent: bool) -> None:
        """Boot a host again, with its old disk, and start its agent."""
        async with self._lock(self._host(host)):
            if host in self.machines:
                raise LabError(f"{host} is on already")
            self._boot(host)
            addresses = self.layout.hosts[host]
            await self._wire([addresses.wire])
            await self._configure(host)
            await self._ip(addresses.wire.other, addressing.port_commands(addresses))
            if agent and host in self._nodes():
                self.start_agent(host)

    # --- cuts ----------------------------------------------------------------------------------------------

    async def cut(self, host: str, kinds: Iterable[str]) -> None:
        """Drop a host's traffic silently: with etcd, its location's hosts, all others, or all; what it forwards; what
        goes to its WireGuard port, or a fifth of that. Empty: heal."""
        kinds = set(kinds)
        if unknown := kinds - set(addressing.CUTS):
            raise LabError(f"{', '.join(unknown)} cannot be cut from; choose {', '.join(addressing.CUTS)}")
        async with self._lock(self._host(host)):
            now = self._cuts.get(host, set()) | kinds if kinds else set()
            await self._nft(host, addressing.host_cut_script(self.layout, host, now))
            self._cuts[host] = now

    async def cut_site(self, site: str, kinds: Iterable[str]) -> None:
        """The same for a whole site, at its router. Empty: heal."""
        kinds = set(kinds)
        if site not in self.layout.sites:
            raise LabError(f"there is no site {site!r} in this lab; there are {', '.join(self.layout.sites)}")
        if unknown := kinds - set(addressing.SITE_CUTS):
            raise LabError(f"{', '.join(unknown)} cannot be cut from; choose {', '.join(addressing.SITE_CUTS)}")
        name = router_of(site)
        async with self._lock(name):
            now = self._cuts.get(name, set()) | kinds if kinds else set()
            await self._nft(name, addressing.site_cut_script(self.layout, site, now))
            self._cuts[name] = now

    # --- observing -----------------------------------------------------------------------------------------

    async def counters(self, site: str) -> dict[str, dict[str, int]]:
        """A router's counters since the start: {wireguard, etcd, icmp, stray, other: {packets, bytes}}."""
        if site not in self.layout.sites:
            raise LabError(f"there is no site {site!r} in this lab; there are {', '.join(self.layout.sites)}")
        printed = await self._run(router_of(site), ["nft", "-j", "list", "counters", "table", "inet", "lab"])
        counters = (item["counter"] for item in json.loads(printed)["nftables"] if "counter" in item)
        # `icmp` itself is a keyword of nftables'.
        return {
            counter["name"].removesuffix("errors"): {"packets": counter["packets"], "bytes": counter["bytes"]}
            for counter in counters
        }

    def captured_by_default(self, machine: str) -> list[str]:
        """The interfaces to capture where none is named: a router's ports to its hosts, else `eth0`."""
        if not machine.startswith("router:"):
            return ["eth0"]
        return [
            host.wire.other_interface
            for host in self.layout.hosts.values()
            if host.wire.other == machine and host.name in self.machines
        ]

    def status(self) -> list[dict[str, Any]]:
        """The hosts, as a person would ask for them."""
        rows, nodes = [], set(self._nodes())
        for host, addresses in self.layout.hosts.items():
            agent = self.agents.get(host)
            rows.append(
                {
                    "host": host,
                    "site": addresses.site,
                    "power": host in self.machines,
                    "private": [str(interface) for interface in addresses.private],
                    "public": [str(ip) for ip in addresses.public],
                    "mesh": [str(ip) for ip in self.mesh_addresses(host)],
                    "agent": agent.description if agent else "not started" if host in nodes else "none",
                    "agent_pid": agent.pid if agent and agent.alive else None,
                    "cuts": sorted(self._cuts.get(host, ())),
                }
            )
        return rows

    async def missing_pings(self, hosts: Sequence[str], timeout: float) -> list[tuple[str, str]]:
        """Ordered pairs among `hosts` (all nodes that are on, if empty) that do not ping at their mesh addresses."""
        chosen = [self._host(host) for host in hosts] or [host for host in self._nodes() if host in self.machines]
        targets = {host: self.mesh_addresses(host) for host in chosen}
        missing = [(a, b) for a in chosen for b in chosen if a != b and (not targets[b] or a not in self.machines)]
        pairs = [
            (self.machines[a], b, address)
            for a in chosen
            if a in self.machines
            for b in chosen
            if a != b
            for address in targets[b]
        ]
        unanswered = await self.pinger.missing(pairs, timeout)
        return sorted({*missing, *((machine.name, name) for machine, name in unanswered)})

    def address_of(self, target: str) -> IPAddress:
        """A host's (first) mesh address, or a literal address as it is."""
        if target in self.layout.hosts:
            addresses = self.mesh_addresses(target)
            if not addresses:
                raise LabError(f"{target} has no mesh address yet: its agent has not set up {DEFAULT_INTERFACE}")
            return addresses[0]
        try:
            return ip_address(target)
        except ValueError:
            raise LabError(f"{target!r} is neither a host of this lab nor an address") from None


async def end(process: Process, action: str) -> None:
    """Stop (SIGTERM; a frozen one would never notice, so it is thawed) or kill (SIGKILL), and wait for the end."""
    if action == "kill":
        process.signal(signal.SIGKILL)
    else:
        process.signal(signal.SIGTERM)
        if process.frozen:
            process.signal(signal.SIGCONT)
    await process.ended.wait()


def freeze(process: Process, frozen: bool, called: str) -> None:
    """SIGSTOP or SIGCONT."""
    if not process.alive:
        raise LabError(f"{called} does not run")
    process.signal(signal.SIGSTOP if frozen else signal.SIGCONT)
    process.frozen = frozen


def log_tail(name: str, lines: int = 3) -> str:
    """The last lines of a log, joined, for an error."""
    with suppress(OSError):
        text = (Path(BASE, "logs", f"{name}.log")).read_text(errors="replace")
        return " / ".join(text.splitlines()[-lines:])
    return "it wrote no log"
