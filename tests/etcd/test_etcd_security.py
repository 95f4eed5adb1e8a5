"""TLS, users and tokens against real etcd; each refusal is one clear sentence that names the endpoint."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager
from pathlib import Path

import pytest
import trio
from attrs import evolve
from cryptography.hazmat.primitives import serialization

from helpers import eventually, require
from helpers_load import soon
from kilo_etcd.etcd.api import (
    Client,
    Config,
    ConnectionRefusedByTls,
    EtcdError,
    Event,
    PermissionDenied,
    Put,
    Tls,
    Unauthenticated,
    Unavailable,
    Watch,
    WatchBatch,
)
from kilo_etcd.etcd.client import open_client
from kilo_etcd.etcd.grpc import TransportFailed
from kilo_etcd.etcd.tls import tls_context
from kilo_etcd.testing.certificates import Authority
from kilo_etcd.testing.etcd_server import EtcdServer, ServerOptions

pytestmark = pytest.mark.etcd
KILO = {"kilo": ("secret", ["/kilo/"])}


async def refusal(config: Config, kind: type[EtcdError], words: str) -> None:
    """A call and a watch both fail with `kind`, in one sentence with `words`, soon."""
    async with open_client(config) as client:
        for attempt in (lambda: client.get("/k"), lambda: first(client.watch("/k"))):
            with pytest.raises(kind, match=words) as caught, soon(4):
                await attempt()
            assert type(caught.value) is kind
            assert config.endpoints[0].split("//")[-1] in str(caught.value)
            assert "\n" not in str(caught.value)


async def first(watch: AbstractAsyncContextManager[Watch]) -> WatchBatch:
    async with watch as watching:
        return await anext(watching)


def user_of(server: EtcdServer, user: str | None, password: str | None) -> Config:
    return evolve(server.config(), user=user, password=password)


async def test_tls_refusals_are_told_apart(tmp_path: Path) -> None:
    require("etcd")
    async with EtcdServer.run(ServerOptions(client_cert=True)) as server:
        good = server.config()
        assert good.tls
        assert server.authority
        async with open_client(good) as client:
            await client.put("/k", "over TLS")
        stranger = Authority(tmp_path, "other CA")
        foreign = stranger.issue("foreign")
        plain = evolve(good, endpoints=(f"http://127.0.0.1:{server.client_port}",))
        no_cert = evolve(good, tls=evolve(good.tls, cert=None, key=None))
        bad_cert = evolve(good, tls=evolve(good.tls, cert=str(foreign.cert), key=str(foreign.key)))
        tls = ConnectionRefusedByTls
        await refusal(evolve(good, tls=evolve(good.tls, ca=str(stranger.ca))), tls, "not trusted.*--cacert")
        await refusal(evolve(good, tls=evolve(good.tls, ca=None)), tls, "not trusted.*--cacert")
        await refusal(no_cert, tls, "client certificate.*--cert")
        await refusal(bad_cert, tls, "refuses the client certificate.*--cert")
        await refusal(evolve(good, tls=evolve(good.tls, ca="/none.pem")), tls, r"cannot read /none\.pem")
        await refusal(evolve(good, tls=evolve(good.tls, cert=__file__)), tls, "not usable as PEM")
        async with open_client(evolve(plain, call_timeout=1.0)) as client:
            with pytest.raises(EtcdError, match="https://"):
                await client.get("/k")


async def test_a_certificate_for_another_name_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require("etcd")
    authority = Authority(tmp_path)
    async with EtcdServer.run(ServerOptions(tls=True)) as server:
        server.authority = authority
        await server.kill()
        issue = authority.issue
        monkeypatch.setattr(authority, "issue", lambda name, _hosts=(): issue(name, ("other.example",)))
        await server.start(wait=False)
        config = evolve(server.config(), tls=Tls(ca=str(authority.ca)))
        await eventually(lambda: listens(server.client_port))
        await refusal(config, ConnectionRefusedByTls, "another name.*use a name")
        assert config.tls
        async with open_client(evolve(config, tls=evolve(config.tls, insecure_skip_verify=True))) as client:
            await client.put("/k", "unverified")


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


async def test_https_to_a_plain_port() -> None:
    require("etcd")
    async with EtcdServer.run() as server:
        config = Config(endpoints=(server.endpoint.replace("http://", "https://"),))
        # etcd hangs up without a word, which a member that is stopping does too: so it is tried again for a while.
        config = evolve(config, call_timeout=1.0)
        await refusal(config, Unavailable, "does not speak TLS.*http://")


async def test_what_is_not_etcd_is_told_so() -> None:
    async def answer(stream: trio.SocketStream) -> None:
        async with stream:
            await stream.receive_some()
            await stream.send_all(b"SSH-2.0-OpenSSH_9.2p1\r\n")
            await stream.receive_some()

    async with trio.open_nursery() as nursery:
        listeners = await nursery.start(trio.serve_tcp, answer, 0)
        port = next(
            listener.socket.getsockname()[1] for listener in listeners if listener.socket.family == socket.AF_INET
        )
        await refusal(Config(endpoints=(f"127.0.0.1:{port}",)), ConnectionRefusedByTls, "does not speak HTTP/2")
        nursery.cancel_scope.cancel()


async def test_a_dns_that_does_not_answer_uses_up_no_more_than_a_few_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    waiting: list[str] = []
    over = threading.Event()

    def lookup(host: str | bytes, *args: object, **kwargs: object) -> list[object]:
        if threading.current_thread() is not threading.main_thread():
            waiting.append(str(host))
            over.wait(30)
        raise socket.gaierror(socket.EAI_NONAME, "no such name")

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    names = tuple(f"etcd-{n}.example:2379" for n in range(3))
    try:
        async with open_client(Config(endpoints=names, dial_timeout=0.02, call_timeout=1.0)) as client:
            for _ in range(3):
                with pytest.raises(Unavailable, match="did not answer"):
                    await client.get("/k")
            assert 3 <= len(waiting) <= 6
            assert trio.to_thread.current_default_thread_limiter().borrowed_tokens == 0
            over.set()
            lookups = client._caller.channel._lookups.values()
            await eventually(lambda: not any(one.limiter.borrowed_tokens for one in lookups))
            with pytest.raises(Unavailable, match="does not resolve"):
                await client.get("/k")
    finally:
        over.set()


async def test_renewed_certificate_files_count_from_the_next_connection() -> None:
    require("etcd")
    async with EtcdServer.run(ServerOptions(client_cert=True)) as server:
        config = server.config()
        assert config.tls
        assert config.tls.cert
        cert = trio.Path(config.tls.cert)
        good = await cert.read_bytes()
        async with open_client(evolve(config, call_timeout=10)) as client:
            await client.put("/k", "1")
            await cert.write_bytes(b"")
            await server.kill()
            await server.start(wait=False)
            await eventually(lambda: listens(server.client_port))
            with pytest.raises(ConnectionRefusedByTls, match="not usable as PEM"):
                await client.get("/k")
            await cert.write_bytes(good)
            await eventually(lambda: client.get("/k"))


async def test_a_client_certificate_that_expires_ends_nothing_and_its_renewal_needs_no_restart() -> None:
    require("etcd")
    async with EtcdServer.run(ServerOptions(client_cert=True)) as server:
        assert server.authority
        short = server.authority.issue("short", seconds=5)
        config = evolve(
            server.config(),
            tls=Tls(ca=str(server.authority.ca), cert=str(short.cert), key=str(short.key)),
            call_timeout=5,
        )
        async with open_client(config) as client, client.watch("/k") as watch:
            lease = await client.grant_lease(5)
            async with client.keep_alive(lease.id, lease.ttl) as kept:
                await client.put("/k", "1", lease=lease.id)
                await eventually(lambda: new_connection_refused(config), every=0.2)
                # What was connected before stays so.
                await client.put("/k", "2", lease=lease.id)
                assert [event.kv.value async for event in events(watch, 2)] == [b"1", b"2"]
                # etcd is restarted: now it matters. It is said, and tried again all the time.
                await server.kill()
                await server.start(wait=False)
                await eventually(lambda: listens(server.client_port))
                with pytest.raises(
                    ConnectionRefusedByTls, match=r"refuses the client certificate.*--cert .has it expired"
                ):
                    await client.put("/k", "3")
                server.authority.issue("short")
                await eventually(lambda: client.get("/k"))
                renewed = trio.current_time()
                await eventually(lambda: kept.expires_at > renewed + 5)
                assert not kept.lost.is_set()
                async with client.watch("/k") as after:
                    await client.put("/k", "4", lease=lease.id)
                    assert (await anext(after)).events[0].kv.value == b"4"


async def new_connection_refused(config: Config) -> bool:
    async with open_client(config) as client:
        try:
            await client.get("/k")
        except ConnectionRefusedByTls:
            return True
    return False


async def test_users_and_permissions() -> None:
    require("etcd", "etcdctl")
    async with EtcdServer.run() as server:
        # A user given to an etcd without users is no error, as with etcdctl; and counts as soon as it has users.
        async with open_client(user_of(server, "kilo", "secret")) as client:
            await client.put("/kilo/early", "x")
            await server.enable_auth(KILO)
            await client.put("/kilo/k", "x")
            async with client.watch_prefix("/kilo/", start_revision=2) as watch:
                assert (await anext(watch)).events
            with pytest.raises(PermissionDenied, match=r"'kilo' may not write '/other'.*grant-permission"):
                await client.put("/other", "x")
            with pytest.raises(PermissionDenied, match="transaction on '/other'"):
                await client.txn([], [Put("/other", "x")])
            with pytest.raises(PermissionDenied, match="watch '/other'"):
                await first(client.watch("/other"))
            with pytest.raises(PermissionDenied, match="read '/other'"):
                await client.get_prefix("/other")
            await client.put("/kilo/k", "still usable")
        await refusal(user_of(server, "kilo", "wrong"), Unauthenticated, "'kilo': wrong password or no such user")
        await refusal(user_of(server, "nobody", "secret"), Unauthenticated, "'nobody'.*no such user")
        async with open_client(user_of(server, None, None)) as client:
            with pytest.raises(Unauthenticated, match="--user"):
                await client.get("/k")
            with pytest.raises((Unauthenticated, PermissionDenied)):
                await first(client.watch("/k"))


async def test_a_token_is_fetched_once_and_renewed_when_it_expires() -> None:
    require("etcd", "etcdctl")
    async with EtcdServer.run(ServerOptions(token_ttl=1)) as server:
        await server.enable_auth(KILO)
        async with open_client(user_of(server, "kilo", "secret")) as client:
            tokens = client._caller.tokens
            assert tokens
            used = set[str]()
            async with client.watch_prefix("/kilo/") as watch:
                for n in range(20):
                    await client.put(f"/kilo/{n}", "")
                    used.add(tokens._token or "")
                assert len(used) == 1
                old = used.pop()
                await eventually(lambda: refused(server, old))
                # The token is dead: a put, a read, a new watch, and the old watch all go on.
                await client.put("/kilo/after", "")
                assert tokens._token != old
                seen = [event.kv.key async for event in events(watch, 21)]
                assert seen[-1] == b"/kilo/after"
            tokens._token = old
            async with client.watch_prefix("/kilo/") as watch:
                await client.put("/kilo/again", "")
                assert (await anext(watch)).events[0].kv.key == b"/kilo/again"


async def refused(server: EtcdServer, token: str) -> bool:
    """Whether etcd takes `token` no longer; asking with etcd's own expiry means asking not too often."""
    async with open_client(user_of(server, "kilo", "secret")) as probe:
        assert probe._caller.tokens
        probe._caller.tokens._token = token
        await trio.sleep(1.5)  # Each use gives a simple token its time again: it must be left alone for its TTL.
        await probe.get("/kilo/0")
        return probe._caller.tokens._token != token


async def events(watch: Watch, count: int) -> AsyncIterator[Event]:
    while count > 0:
        for event in (await anext(watch)).events:
            count -= 1
            yield event


async def test_tokens_lost_by_a_restart_are_renewed_for_calls_watch_and_lease() -> None:
    require("etcd", "etcdctl")
    async with EtcdServer.run() as server:
        await server.enable_auth(KILO)
        async with open_client(user_of(server, "kilo", "secret")) as client:
            lease = await client.grant_lease(10)
            async with client.keep_alive(lease.id, lease.ttl) as kept, client.watch_prefix("/kilo/") as watch:
                await client.put("/kilo/a", "", lease=lease.id)
                assert (await anext(watch)).events[0].kv.key == b"/kilo/a"
                await server.kill()
                await server.restart()
                restarted = trio.current_time()
                await client.put("/kilo/b", "")
                assert (await anext(watch)).events[0].kv.key == b"/kilo/b"
                await eventually(lambda: kept.expires_at > restarted + 10)
                assert not kept.lost.is_set()
            assert not await denied_once(client)


async def denied_once(client: Client) -> bool:
    try:
        await client.get("/kilo/a")
    except (PermissionDenied, Unauthenticated, Unavailable):
        return True
    return False


def test_an_encrypted_client_key_is_an_error_and_never_a_prompt(tmp_path: Path) -> None:
    issued = Authority(tmp_path).issue("client")
    key = serialization.load_pem_private_key(issued.key.read_bytes(), None)
    encrypted = tmp_path / "encrypted.pem"
    encrypted.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.BestAvailableEncryption(b"secret"),
        )
    )
    with pytest.raises(TransportFailed, match=r"encrypted\.pem is encrypted; write it without a passphrase") as caught:
        tls_context(Tls(cert=str(issued.cert), key=str(encrypted)))
    assert caught.value.permanent


def test_a_password_is_not_in_a_repr() -> None:
    assert not re.search("hidden-word", repr(Config(user="kilo", password="hidden-word")))
