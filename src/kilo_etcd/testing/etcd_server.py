"""Real etcd processes for tests: one member or several, on free loopback ports, in a directory that goes with them.

    async with EtcdServer.run() as server, open_client(server.config()) as etcd: ...
    async with EtcdCluster.run(3) as cluster: cluster.members[0].freeze()

It promises that the servers it gives are healthy and its own (not something else on the port), and that its processes
end with the block, also when this process is killed. A server that does not come up is an error that shows its log.
Needs etcd and, for `etcdctl` and `enable_auth`, etcdctl; for a slow disk, strace.
"""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from pathlib import Path

import trio
from attrs import define, evolve, field, frozen

from kilo_etcd.etcd.api import Config, EtcdError, Tls
from kilo_etcd.etcd.client import open_client

from .certificates import Authority

START_TIMEOUT = 20.0
"""Seconds until a server must be healthy; generous, for machines that do ten things at once."""
ROOT_PASSWORD = "root-secret"


class EtcdFailed(Exception):
    """etcd could not be started; the message has the end of its log."""


@frozen(kw_only=True)
class ServerOptions:
    """How the servers are run."""

    tls: bool = False
    """Serve clients over TLS, with a certificate for 127.0.0.1 and localhost from `EtcdServer.authority`."""
    client_cert: bool = False
    """Ask clients for a certificate of the same authority (implies `tls`)."""
    token_ttl: int | None = None
    """Seconds that an auth token lives."""
    disk_delay: float = 0.0
    """Seconds that the disk takes to confirm each write (each fsync), by strace's doing."""
    arguments: tuple[str, ...] = ()
    """More arguments for etcd."""


@define(eq=False, kw_only=True)
class EtcdServer:
    """One member. Its ports and data stay the same over `kill` and `restart`."""

    name: str
    directory: Path
    client_port: int
    peer_port: int
    cluster: str
    token: str
    options: ServerOptions
    authority: Authority | None = None
    user: str | None = None
    password: str | None = field(default=None, repr=False)
    process: subprocess.Popen[bytes] | None = None

    @classmethod
    @asynccontextmanager
    async def run(cls, options: ServerOptions | None = None) -> AsyncIterator[EtcdServer]:
        """One healthy server until the block ends."""
        async with EtcdCluster.run(1, options) as cluster:
            yield cluster.members[0]

    @property
    def endpoint(self) -> str:
        """The URL at which clients reach this member."""
        return f"{'https' if self.authority else 'http'}://127.0.0.1:{self.client_port}"

    @property
    def pid(self) -> int:
        """The number of the etcd process. AssertionError if none was started."""
        assert self.process is not None, f"{self.name} is not running"
        return self.process.pid

    @property
    def running(self) -> bool:
        """Whether the process lives; one that is frozen does."""
        return self.process is not None and self.process.poll() is None

    def config(self) -> Config:
        """How a client with all rights reaches this member."""
        tls = None
        if self.authority:
            client = self.authority.issue("client")
            tls = Tls(ca=str(self.authority.ca), cert=str(client.cert), key=str(client.key))
        return Config(endpoints=(self.endpoint,), tls=tls, user=self.user, password=self.password)

    # -- what can be done to it ------------------------------------------------------------------------------------

    async def start(self, *, initial: bool = False, wait: bool = True) -> None:
        """Start the process; `wait` until it is healthy. Raises EtcdFailed."""
        assert not self.running, f"{self.name} runs already"
        command = [*self._slow_disk(), shutil.which("etcd") or "etcd", *self._arguments(initial)]
        self.process = _spawn(command, self._log)
        if wait:
            await self.healthy()

    async def restart(self, *, wait: bool = True) -> None:
        """Start again on the same ports and data, after stopping it where it runs."""
        await self.stop()
        await self.start(wait=wait)

    async def stop(self) -> None:
        """SIGTERM, and SIGKILL if that is not enough."""
        if self.process is not None and self.running:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
            with trio.move_on_after(5):
                await self._ended()
        await self.kill()

    async def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        if self.process is not None:
            self.process.kill()
            with trio.CancelScope(shield=True):
                await self._ended()

    def freeze(self) -> None:
        """SIGSTOP: its kernel still takes connections, the process answers nothing."""
        os.kill(self.pid, signal.SIGSTOP)

    def thaw(self) -> None:
        """SIGCONT: a frozen process goes on, and finds its clocks ahead."""
        os.kill(self.pid, signal.SIGCONT)

    async def healthy(self) -> None:
        """Wait until this very process answers and has a leader. Raises EtcdFailed."""
        last: object = "it did not answer"
        async with open_client(evolve(self.config(), user=None, password=None)) as client:
            with trio.move_on_after(START_TIMEOUT):
                while self.running:
                    try:
                        status = await client.status(self.endpoint)
                        if status.leader:
                            own = [m.name for m in await client.members() if m.id == status.header.member_id]
                            if own == [self.name]:
                                return
                            last = f"another etcd ({own}) answers at {self.endpoint}"
                    except EtcdError as error:
                        last = error
                    await trio.sleep(0.02)
                last = "it exited"
        raise EtcdFailed(f"etcd {self.name} at {self.endpoint} is not healthy: {last}\n{self.log()}")

    def log(self, lines: int = 15) -> str:
        """The end of its log."""
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-lines:])

    async def etcdctl(self, *arguments: str) -> str:
        """Run the real etcdctl against this member with all rights; its output. Raises CalledProcessError."""
        config = self.config()
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("ETCD")},
            "ETCDCTL_API": "3",
            "ETCDCTL_ENDPOINTS": self.endpoint,
        }
        if config.tls:
            environment |= {"ETCDCTL_CACERT": config.tls.ca or "", "ETCDCTL_CERT": config.tls.cert or ""}
            environment |= {"ETCDCTL_KEY": config.tls.key or ""}
        if config.user:
            environment["ETCDCTL_USER"] = f"{config.user}:{config.password}"
        completed = await trio.run_process(
            ["etcdctl", *arguments], env=environment, capture_stdout=True, capture_stderr=True
        )
        return completed.stdout.decode()

    async def enable_auth(self, users: Mapping[str, tuple[str, Sequence[str]]] | None = None) -> None:
        """Turn authentication on, with root and `users`: name -> (password, prefixes it may read and write)."""
        await self.etcdctl("user", "add", f"root:{ROOT_PASSWORD}")
        await self.etcdctl("user", "grant-role", "root", "root")
        for name, (password, prefixes) in (users or {}).items():
            await self.etcdctl("user", "add", f"{name}:{password}")
            await self.etcdctl("role", "add", name)
            for prefix in prefixes:
                await self.etcdctl("role", "grant-permission", name, "--prefix=true", "readwrite", prefix)
            await self.etcdctl("user", "grant-role", name, name)
        await self.etcdctl("auth", "enable")
        self.user, self.password = "root", ROOT_PASSWORD

    # -- details ---------------------------------------------------------------------------------------------------

    async def _ended(self) -> None:
        while self.running:  # noqa: ASYNC110
            await trio.sleep(0.005)

    def _slow_disk(self) -> list[str]:
        """What runs etcd with a disk that takes its time. The tracer is nobody's parent, and ends with etcd."""
        if not self.options.disk_delay:
            return []
        calls, delay = "fsync,fdatasync", round(self.options.disk_delay * 1e6)
        return [
            "strace", "-D", "-f", "--seccomp-bpf", "-qq", "-o", "/dev/null", "-e", f"trace={calls}",
            "-e", f"inject={calls}:delay_exit={delay}",
        ]  # fmt: skip

    @property
    def _log(self) -> Path:
        return self.directory / f"{self.name}.log"

    def _arguments(self, initial: bool) -> list[str]:
        options, peer = self.options, f"http://127.0.0.1:{self.peer_port}"
        arguments = ["--name", self.name, "--data-dir", str(self.directory / self.name)]
        arguments += ["--listen-client-urls", self.endpoint, "--advertise-client-urls", self.endpoint]
        arguments += ["--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer]
        arguments += ["--initial-cluster", self.cluster, "--initial-cluster-token", self.token]
        arguments += ["--initial-cluster-state", "new" if initial else "existing"]
        if self.authority:
            server = self.authority.issue(f"server-{self.name}", ("127.0.0.1", "localhost"))
            arguments += ["--cert-file", str(server.cert), "--key-file", str(server.key)]
            if options.client_cert:
                arguments += ["--client-cert-auth", "--trusted-ca-file", str(self.authority.ca)]
        if options.token_ttl is not None:
            arguments += ["--auth-token-ttl", str(options.token_ttl)]
        return [*arguments, *options.arguments]


@define(eq=False, kw_only=True)
class EtcdProxy:
    """One `etcd grpc-proxy` before a member. Its port stays the same over `restart`."""

    server: EtcdServer
    port: int
    metrics_port: int
    process: subprocess.Popen[bytes] | None = None

    @classmethod
    @asynccontextmanager
    async def run(cls, server: EtcdServer) -> AsyncIterator[EtcdProxy]:
        """A proxy that answers, until the block ends. It serves with TLS if `server` does, and asks for certificates as
        that does. Raises EtcdFailed."""
        proxy = cls(server=server, port=(ports := _free_ports(2))[0], metrics_port=ports[1])
        try:
            await proxy.start()
            yield proxy
        finally:
            await proxy.kill()

    @property
    def endpoint(self) -> str:
        """The URL at which clients reach the proxy."""
        return f"{'https' if self.server.authority else 'http'}://127.0.0.1:{self.port}"

    def config(self) -> Config:
        """How a client reaches etcd through the proxy alone."""
        return evolve(self.server.config(), endpoints=(self.endpoint,))

    async def start(self) -> None:
        """Start the process, and wait until it answers. Raises EtcdFailed."""
        directory = self.server.directory
        self.process = _spawn(
            [
                shutil.which("etcd") or "etcd", "grpc-proxy", "start", "--endpoints", self.server.endpoint,
                "--listen-addr", f"127.0.0.1:{self.port}", "--advertise-client-url", f"127.0.0.1:{self.port}",
                "--metrics-addr", f"http://127.0.0.1:{self.metrics_port}", "--data-dir", str(directory / "proxy"),
                *self._tls(),
            ],
            directory / "proxy.log",
        )  # fmt: skip
        async with open_client(self.config()) as client:
            with trio.move_on_after(START_TIMEOUT):
                while self.process.poll() is None:
                    with suppress(EtcdError):
                        await client.status()
                        return
                    await trio.sleep(0.02)
        raise EtcdFailed(f"etcd grpc-proxy at {self.endpoint} does not answer\n{(directory / 'proxy.log').read_text()}")

    def _tls(self) -> list[str]:
        authority = self.server.authority
        if authority is None:
            return []
        own = authority.issue("proxy", ("127.0.0.1",))
        # The proxy does not start with one that has a common name.
        client = authority.issue("proxy-client", nameless=True)
        return [
            "--cert-file", str(own.cert), "--key-file", str(own.key),
            *(("--trusted-ca-file", str(authority.ca)) if self.server.options.client_cert else ()),
            "--cacert", str(authority.ca), "--cert", str(client.cert), "--key", str(client.key),
        ]  # fmt: skip

    async def restart(self) -> None:
        """Kill it, and start it again on the same port."""
        await self.kill()
        await self.start()

    async def kill(self) -> None:
        """SIGKILL, and wait for the end."""
        if self.process is not None:
            self.process.kill()
            with trio.CancelScope(shield=True):
                while self.process.poll() is None:  # noqa: ASYNC110
                    await trio.sleep(0.005)


@define(eq=False)
class EtcdCluster:
    """Several members that form one cluster, started and ended together."""

    members: list[EtcdServer]

    @classmethod
    @asynccontextmanager
    async def run(cls, size: int = 3, options: ServerOptions | None = None) -> AsyncIterator[EtcdCluster]:
        """A healthy cluster of `size` members until the block ends. Raises EtcdFailed."""
        if shutil.which("etcd") is None:
            raise EtcdFailed("etcd is not installed: apt-get install etcd-server")
        async with AsyncExitStack() as stack:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="etcd-test-")))
            # A free port may be taken before etcd binds it: then once more with others.
            for attempt in range(3):
                cluster = cls(_members(size, directory / str(attempt), options or ServerOptions()))
                stack.push_async_callback(cluster._end)
                try:
                    await cluster._begin()
                    break
                except EtcdFailed as error:
                    await cluster._end()
                    if attempt == 2 or "address already in use" not in str(error):
                        raise
            yield cluster

    def config(self) -> Config:
        """How a client with all rights reaches all members."""
        return evolve(self.members[0].config(), endpoints=tuple(member.endpoint for member in self.members))

    def member_at(self, endpoint: str) -> EtcdServer:
        """The member at an endpoint, as `EtcdServer.endpoint` writes it. StopIteration if there is none."""
        return next(member for member in self.members if member.endpoint == endpoint)

    async def add(self) -> EtcdServer:
        """A further member, healthy, with the options of the others."""
        running = next(member for member in self.members if member.running)
        client_port, peer_port = _free_ports(2)
        name, peer = f"member-{client_port}-{running.token}", f"http://127.0.0.1:{peer_port}"
        for attempt in range(100):
            try:
                await running.etcdctl("member", "add", name, f"--peer-urls={peer}")
                break
            except subprocess.CalledProcessError:
                # It wants all members to have been connected for some seconds.
                if attempt == 99:
                    raise
                await trio.sleep(0.2)
        cluster = ",".join(f"{each.name}=http://127.0.0.1:{each.peer_port}" for each in self.members)
        new = evolve(
            running, name=name, client_port=client_port, peer_port=peer_port, cluster=f"{cluster},{name}={peer}",
            process=None,
        )  # fmt: skip
        self.members.append(new)
        await new.start()
        return new

    async def remove(self, member: EtcdServer) -> None:
        """Have the cluster without `member`, which ends."""
        other = next(each for each in self.members if each.running and each is not member)
        listed = await other.etcdctl("member", "list")
        number = next(line.partition(",")[0] for line in listed.splitlines() if f", {member.name}, " in line)
        await other.etcdctl("member", "remove", number)
        self.members.remove(member)
        await member.kill()

    async def _begin(self) -> None:
        for member in self.members:
            await member.start(initial=True, wait=False)
        for member in self.members:
            await member.healthy()

    async def _end(self) -> None:
        for member in self.members:
            await member.kill()


def _members(size: int, directory: Path, options: ServerOptions) -> list[EtcdServer]:
    directory.mkdir()
    ports = _free_ports(2 * size)
    token = secrets.token_hex(4)
    names = [f"member-{place}-{token}" for place in range(size)]
    cluster = ",".join(f"{name}=http://127.0.0.1:{port}" for name, port in zip(names, ports[size:], strict=True))
    authority = Authority(directory / "pki") if options.tls or options.client_cert else None
    return [
        EtcdServer(
            name=name,
            directory=directory,
            client_port=client_port,
            peer_port=peer_port,
            cluster=cluster,
            token=token,
            options=options,
            authority=authority,
        )
        for name, client_port, peer_port in zip(names, ports[:size], ports[size:], strict=True)
    ]


def _spawn(command: Sequence[str], log_path: Path) -> subprocess.Popen[bytes]:
    """Start a process that ends with this one."""
    if setpriv := shutil.which("setpriv"):
        command = [setpriv, "--pdeathsig", "KILL", *command]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("ETCD")}
    with log_path.open("ab") as log:
        # Not trio's open_process: that forks in a worker thread, and the kernel's death signal comes when the
        # *thread* that forked ends, which trio's idle workers do after ten seconds.
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment, start_new_session=True
        )


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [sock.getsockname()[1] for sock in sockets]
    finally:
        for sock in sockets:
            sock.close()
