"""A DNS server for tests: the SRV records that a test gives it, and nothing else."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import dns.asyncresolver
import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest
import trio
from attrs import define, field

from kilo_etcd.etcd import discovery


@define
class DnsServer:
    """A server on UDP, on loopback."""

    port: int
    records: dict[str, list[tuple[str, int]]] = field(factory=dict)
    """Name of a service -> its targets and their ports; other names do not exist."""
    queries: int = 0
    silent: bool = False
    """It answers nobody."""

    def answer(self, query: dns.message.Message) -> dns.message.Message:
        """What the records say."""
        response = dns.message.make_response(query)
        name = query.question[0].name
        targets = self.records.get(name.to_text(omit_final_dot=True))
        if targets is None:
            response.set_rcode(dns.rcode.NXDOMAIN)
        else:
            texts = [f"0 0 {port} {target}" for target, port in targets]
            response.answer.append(dns.rrset.from_text(name, 0, "IN", "SRV", *texts))
        return response

    def resolver(self) -> dns.asyncresolver.Resolver:
        """A resolver that asks this server."""
        resolver = dns.asyncresolver.Resolver(configure=False)
        resolver.nameservers, resolver.port = ["127.0.0.1"], self.port
        return resolver


@asynccontextmanager
async def dns_server(port: int = 0) -> AsyncIterator[DnsServer]:
    """The server, until the block ends."""
    socket = trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM)
    await socket.bind(("127.0.0.1", port))
    server = DnsServer(socket.getsockname()[1])

    async def serve() -> None:
        while True:
            data, client = await socket.recvfrom(4096)
            server.queries += 1
            if not server.silent:
                await socket.sendto(server.answer(dns.message.from_wire(data)).to_wire(), client)

    with socket:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            yield server
            nursery.cancel_scope.cancel()


def ask(server: DnsServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have discovery in this process ask `server`."""
    monkeypatch.setattr(discovery, "resolver", server.resolver)
