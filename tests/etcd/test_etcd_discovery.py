"""Endpoints from SRV records: real DNS packets, real etcd."""

from __future__ import annotations

import subprocess
import sys

import pytest
import trio
from attrs import evolve

from helpers import eventually
from helpers_dns import DnsServer, ask, dns_server
from kilo_etcd.etcd.api import Config, ConnectionRefusedByTls, Discovery, EtcdError, Unavailable
from kilo_etcd.etcd.client import open_client
from kilo_etcd.etcd.discovery import Discovered, SrvRecord, choose, service
from kilo_etcd.etcd.endpoint import EtcdEndpoint
from kilo_etcd.testing.etcd_server import EtcdCluster, EtcdServer, ServerOptions

SECURE, PLAIN = "_etcd-client-ssl._tcp.example.com", "_etcd-client._tcp.example.com"
LEFT_OUT = (
    f"http://b:2379 of the SRV records of {PLAIN} is left out, since it is without TLS (--insecure-discovery takes it)"
)


def discovered(
    domain: str = "example.com", *, insecure: bool = False, of: Config | None = None, name: str = ""
) -> Config:  # fmt: skip
    discovery = Discovery(domain=domain, service_name=name, insecure=insecure)
    return evolve(of or Config(), endpoints=(), discovery=discovery)


@pytest.mark.parametrize(
    ("name", "tls", "expected"),
    [
        ("", True, SECURE),
        ("", False, PLAIN),
        ("mesh", True, "_etcd-client-ssl-mesh._tcp.example.com"),
        ("mesh", False, "_etcd-client-mesh._tcp.example.com"),
    ],
)
def test_services_have_etcdctls_names(name: str, tls: bool, expected: str) -> None:
    assert service(Discovery(domain="example.com", service_name=name), tls=tls) == expected


def test_endpoints_without_tls_are_left_out_and_certificates_are_for_the_domain() -> None:
    secure, plain = [SrvRecord("a", 2379), SrvRecord("", 0)], [SrvRecord("b", 2379)]
    assert choose(Discovery(domain="example.com"), secure, plain) == Discovered(
        endpoints=(EtcdEndpoint("a", 2379, True, "example.com"),), remarks=(LEFT_OUT,)
    )
    assert choose(Discovery(domain="example.com", insecure=True), secure, plain) == Discovered(
        endpoints=(EtcdEndpoint("a", 2379, True), EtcdEndpoint("b", 2379, False))
    )


def test_dnspython_is_imported_by_a_look_up_only() -> None:
    code = "import sys, kilo_etcd.etcd.client, kilo_etcd.runtime.options; sys.exit('dns' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


async def refused(server: DnsServer, config: Config) -> str:
    async with open_client(evolve(config, call_timeout=1.0)) as client:
        with pytest.raises(EtcdError) as error:
            await client.get("/x")
    return str(error.value)


async def test_a_domain_without_records_is_named_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    async with dns_server() as dns:
        ask(dns, monkeypatch)
        assert await refused(dns, discovered()) == (
            f"cannot reach etcd at the endpoints of example.com: {SECURE}: there are no SRV records; "
            f"{PLAIN}: there are no SRV records"
        )
        dns.records[PLAIN] = [("b.", 2379)]
        assert await refused(dns, discovered()) == (
            f"cannot reach etcd at the endpoints of example.com: {SECURE}: there are no SRV records; {LEFT_OUT}"
        )
        dns.records = {SECURE: [(".", 0)], PLAIN: [(".", 0)]}
        assert "its SRV records name no host" in await refused(dns, discovered())


async def test_a_dns_server_that_does_not_answer_is_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    async with dns_server() as dns:
        ask(dns, monkeypatch)
        dns.silent = True
        monkeypatch.setattr("kilo_etcd.etcd.discovery.LOOKUP_SECONDS", 0.5)
        async with open_client(evolve(discovered(), call_timeout=1.5)) as client:
            with pytest.raises(Unavailable, match=f"{SECURE}: no DNS server answers; {PLAIN}: no DNS server answers"):
                await client.get("/x")


@pytest.mark.etcd
async def test_insecure_discovery_reaches_an_etcd_without_tls(monkeypatch: pytest.MonkeyPatch) -> None:
    async with EtcdServer.run() as server, dns_server() as dns:
        ask(dns, monkeypatch)
        dns.records["_etcd-client-mesh._tcp.example.com"] = [("localhost.", server.client_port)]
        async with open_client(discovered(insecure=True, name="mesh")) as client:
            assert await client.get("/x") is None
            assert client.endpoints == (f"http://localhost:{server.client_port}",)


@pytest.mark.etcd
async def test_a_certificate_must_be_good_for_the_domain_unless_the_discovery_is_insecure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The server's certificate is for 127.0.0.1 and localhost."""
    async with EtcdServer.run(ServerOptions(tls=True, client_cert=True)) as server, dns_server() as dns:
        ask(dns, monkeypatch)
        target = [("localhost.", server.client_port)]
        dns.records = {SECURE: target, "_etcd-client-ssl._tcp.localhost": [("127.0.0.1.", server.client_port)]}
        async with open_client(discovered(of=server.config())) as client:
            with pytest.raises(ConnectionRefusedByTls, match=r"for another name .*example\.com"):
                await client.get("/x")
            with pytest.raises(ConnectionRefusedByTls, match=r"for another name .*example\.com"):
                await client.status(f"https://localhost:{server.client_port}")
        async with open_client(discovered("localhost.", of=server.config())) as client:
            assert await client.get("/x") is None
            assert (await client.status(client.endpoints[0])).leader
        async with open_client(discovered(insecure=True, of=server.config())) as client:
            assert await client.get("/x") is None


@pytest.mark.etcd
async def test_endpoints_are_looked_up_again_when_none_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    remarks: list[str] = []
    async with EtcdCluster.run(3, ServerOptions(tls=True)) as cluster, dns_server() as dns:
        ask(dns, monkeypatch)
        first, second, _ = cluster.members
        name = "_etcd-client-ssl._tcp.localhost"
        dns.records = {
            name: [("localhost.", first.client_port)],
            "_etcd-client._tcp.localhost": [("localhost.", 1)],
        }
        async with open_client(discovered("localhost", of=cluster.config()), on_remark=remarks.append) as client:
            assert await client.get("/x") is None
            queries = dns.queries
            await client.put("/x", "1")
            assert dns.queries == queries
            await first.kill()
            dns.records[name] = [("localhost.", second.client_port)]

            async def reads() -> bool:
                with trio.move_on_after(5):
                    try:
                        return await client.get("/x") is not None
                    except EtcdError:
                        return False
                return False

            await eventually(reads, 30)
            assert client.endpoints == (f"https://localhost:{second.client_port}",)
    (remark,) = remarks
    assert remark.startswith("http://localhost:1 of the SRV records of _etcd-client._tcp.localhost is left out")


@pytest.mark.etcd
async def test_discovered_endpoints_stay_if_dns_is_away(monkeypatch: pytest.MonkeyPatch) -> None:
    async with EtcdServer.run(ServerOptions(tls=True)) as server, dns_server() as dns:
        ask(dns, monkeypatch)
        dns.records["_etcd-client-ssl._tcp.localhost"] = [("localhost.", server.client_port)]
        async with open_client(discovered("localhost", of=server.config())) as client:
            assert await client.get("/x") is None
            dns.silent, queries = True, dns.queries
            await server.kill()
            with pytest.raises(Unavailable):
                await client.get("/x")
            await eventually(lambda: dns.queries > queries, 30, what="a look-up")
            await server.start()
            assert await client.get("/x") is None
