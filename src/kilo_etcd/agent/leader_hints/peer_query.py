"""The peer query: queries other nodes about leaders while etcd is away, and responds to their queries.

One UDP socket for each family on one port, 1107 as a rule. While etcd answers it is silent: it waits for queries and
looks once a second whether etcd has gone. A host that has lost etcd queries one node every half second, of its own
location and of others in turn. `agent.leader_hints.hints` decides what the responses mean.

It reads the messages of known nodes only (`leader_hints.unpack`), answers each query once
(`agent.leader_hints.admission`), and it never raises: if the port is taken, one warning says so, and this host goes
without. The sockets are bound to all addresses, which come and go, but datagrams count only if they were sent to a mesh
address or an internal IP of this host: the kernel says with each where it was sent to (IP_PKTINFO). If an internal IP
is translated on its way (1:1 NAT, `force-internal-ip`), that is one of the host's own private addresses (`served`).
"""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable, Collection
from contextlib import suppress
from ipaddress import ip_address
from typing import Protocol

import trio
from attrs import evolve

from kilo_etcd.agent.leader_hints.admission import Admission, stamp
from kilo_etcd.agent.leader_hints.hints import (
    LeaderHint,
    LeaderHints,
    LeaderHistory,
    PeerMessage,
    digest,
    leaders_hinted,
    nonce_of,
    sender_of,
    unpack,
)
from kilo_etcd.agent.probing.reachability import Reachability
from kilo_etcd.base import descriptors
from kilo_etcd.model import IPAddress, Node, is_public
from kilo_etcd.topology.segments import Topology, UnknownNode

LOOK_SECONDS = 1.0
"""Between two looks whether etcd is away."""

ASK_SECONDS = 0.5
"""Between two queries."""

FORGET_SECONDS = 10.0
"""How long etcd may take, once it answers again, to show what was hinted meanwhile."""

MOST_ASKED = 8
"""Of each kind, local members and leaders elsewhere, so many are queried in turn."""

_QUERIES_KEPT = 16
_LOCAL_QUERIES_KEPT = 1024

MOST_SECRETS = 16384
"""Secrets kept, more than a mesh has nodes: to compute one takes as long as to check twenty messages, and whoever knows
public keys can name each node once. One and its key have 200 bytes."""

_IP_PKTINFO, _IPV6_RECVPKTINFO, _IPV6_PKTINFO = 8, 49, 50
"""Options of sockets, which neither Python nor pyroute2 has (linux/in.h, linux/in6.h)."""
_AT_ONCE = 64
"""Datagrams that are taken from a socket before other tasks have their turn: a batch of local queries has as many
answers."""


class DatagramTransport(Protocol):
    """Datagrams to and from mesh addresses, and internal IPs of the location."""

    admit: Callable[[bytes, IPAddress], bool]
    """Whether a datagram from this address is worth being received; asked before it costs anything more."""

    def serve(self, addresses: Collection[IPAddress]) -> None:
        """Receive what is sent to these addresses of this host, and nothing else."""

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Receive until cancelled. OSError: it cannot be had."""

    async def send(self, data: bytes, address: IPAddress) -> None:
        """To the same task on the host with this mesh address. What cannot be sent is lost, as it might be anyway."""

    async def receive(self) -> tuple[bytes, IPAddress]:
        """The next datagram, and where it says that it comes from."""


class UdpTransport:
    """The real one, on one UDP port, which is that of all hosts of the mesh."""

    def __init__(self, port: int) -> None:
        self._port = port
        self.admit: Callable[[bytes, IPAddress], bool] = lambda _data, _source: True
        self._served: frozenset[bytes] | None = None
        """Packed addresses; None: all."""
        self._sockets: dict[int, socket.socket] = {}
        self._arrived_in, self._arrived = trio.open_memory_channel[tuple[bytes, IPAddress]](2 * _AT_ONCE)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Receive until cancelled. OSError: the port is taken."""
        async with trio.open_nursery() as nursery:
            for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
                try:
                    sock = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK)
                except OSError as error:
                    if descriptors.is_shortage(error):
                        raise
                    continue  # A kernel without that family.
                try:
                    if version == 6:
                        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                        sock.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO, 1)
                    else:
                        sock.setsockopt(socket.IPPROTO_IP, _IP_PKTINFO, 1)
                    sock.bind(("" if version == 4 else "::", self._port))
                except BaseException:
                    sock.close()
                    raise
                self._sockets[version] = sock
                nursery.start_soon(self._listen, sock)
            task_status.started()

    def serve(self, addresses: Collection[IPAddress]) -> None:
        """Implements `DatagramTransport.serve`. Until the first call, what is sent to any address is received."""
        self._served = frozenset(address.packed for address in addresses)

    async def _listen(self, sock: socket.socket) -> None:
        with sock:
            while True:
                await trio.lowlevel.wait_readable(sock)
                for _ in range(_AT_ONCE):
                    try:
                        data, ancillary, _, sender = sock.recvmsg(2048, 64)
                    except BlockingIOError:
                        break
                    except OSError:
                        continue  # An ICMP error about an earlier packet that did not arrive.
                    if self._served is not None and _sent_to(ancillary) not in self._served:
                        continue
                    source = ip_address(sender[0].partition("%")[0])
                    if self.admit(data, source):
                        with suppress(trio.WouldBlock):  # As if it had been lost on its way.
                            self._arrived_in.send_nowait((data, source))

    async def send(self, data: bytes, address: IPAddress) -> None:
        """Implements `DatagramTransport.send`."""
        await trio.lowlevel.checkpoint()
        sock = self._sockets.get(address.version)
        with suppress(OSError):
            if sock is not None:
                sock.sendto(data, (str(address), self._port))

    async def receive(self) -> tuple[bytes, IPAddress]:
        """Implements `DatagramTransport.receive`. Datagrams that `admit` refuses are dropped; so are others while many
        wait."""
        return await self._arrived.receive()


def _sent_to(ancillary: list[tuple[int, int, bytes]]) -> bytes | None:
    """The address in a datagram's header as it came, packed: of struct in_pktinfo the third field, of in6_pktinfo the
    first, ip(7), ipv6(7)."""
    for level, kind, info in ancillary:
        if level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
            address: bytes = struct.unpack("=i4s4s", info[:12])[2]
            return address
        if level == socket.IPPROTO_IPV6 and kind == _IPV6_PKTINFO:
            return info[:16]
    return None


class PeerQuery:
    """Of node `name`. `secret` gives what this host's key and a public key agree on; `etcd_away` whether etcd does not
    answer; `on_hints` is called with the leader hints whenever they change."""

    def __init__(
        self,
        name: str,
        transport: DatagramTransport,
        secret: Callable[[str], bytes | None],
        *,
        etcd_away: Callable[[], bool],
        on_hints: Callable[[LeaderHints], object],
        sources: Callable[[], Collection[IPAddress]] = lambda: (),
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`reachability`, set later, is told of what comes over the location's own network. `sources` gives the host's
        own addresses on the underlay."""
        self._name = name
        self._transport = transport
        self._admission = Admission()
        self._wall = wall
        self._stamped = 0
        """The second of the last query's stamp: it never goes back."""
        transport.admit = self._admits
        self._sources = sources
        self._served: tuple[IPAddress, ...] | None = None
        self._secret = secret
        self._secrets: dict[str, bytes | None] = {}
        self._etcd_away = etcd_away
        self._on_hints = on_hints
        self.reachability: Reachability | None = None
        self._leader_history = LeaderHistory()
        self._topology: Topology | None = None
        """By etcd alone."""
        self._by_digest: dict[bytes, Node] | None = None
        self._asked: dict[bytes, bytes] = {}
        """Nonce -> digest of the node that it was sent to."""
        self._asked_locally: dict[bytes, None] = {}
        """Nonces of the last queries over the location's own network."""
        self._hints_by_sender: dict[bytes, LeaderHint] = {}
        self._hints = LeaderHints()
        self._back_since: float | None = None
        """Since when etcd answers again while there are leader hints."""
        self._turn = 0

    def follow(self, topology: Topology) -> None:
        """`topology` is that of the last snapshot, without later hints."""
        self._leader_history.note(topology)
        if self._topology is None or topology.snapshot.nodes is not self._topology.snapshot.nodes:
            self._by_digest = None
        self._topology = topology
        addresses = served(self._own(), self._sources())
        if addresses != self._served:
            self._served = addresses
            self._transport.serve(addresses)

    async def run(self) -> None:
        """Ask and answer until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._listen)
            while True:
                if self._etcd_away():
                    await self._ask()
                    await trio.sleep(ASK_SECONDS)
                else:
                    self._forget()
                    await trio.sleep(LOOK_SECONDS)

    def _forget(self) -> None:
        """etcd answers: the hints count until etcd has shown as much, which it does in a moment."""
        self._hints_by_sender.clear()
        self._asked.clear()
        if not self._hints.leaders:
            return
        now = trio.current_time()
        self._back_since = now if self._back_since is None else self._back_since
        shown = self._topology is not None and self._topology.snapshot.revision >= self._hints.revision
        if shown or now - self._back_since > FORGET_SECONDS:
            self._back_since, self._hints = None, LeaderHints()
            self._on_hints(self._hints)

    async def _ask(self) -> None:
        topology = self._topology
        own = None if topology is None else topology.snapshot.nodes.get(self._name)
        if topology is None or own is None:
            return
        whom = _to_query(topology, own)
        if not whom:
            return
        self._turn += 1
        node = whom[self._turn % len(whom)]
        secret = self._agreed(node.public_key)
        if secret is not None:
            nonce = self._nonce()
            self._asked[nonce] = digest(node.public_key)
            while len(self._asked) > _QUERIES_KEPT:
                del self._asked[next(iter(self._asked))]
            query = PeerMessage(
                is_response=False, nonce=nonce, sender=digest(own.public_key), revision=topology.snapshot.revision
            )
            await self._transport.send(query.pack(secret), node.mesh_addresses[0])
        self._evaluate()

    def _admits(self, data: bytes, source: IPAddress) -> bool:
        """Whether a datagram may be more than noise, by what costs next to nothing to look at."""
        sender = sender_of(data)
        node = None if sender is None else self._nodes_by_digest().get(sender)
        if sender is None or node is None:
            return False
        nonce, is_response = nonce_of(data)
        if is_response:
            if nonce not in self._asked and nonce not in self._asked_locally:
                return False
        elif self._admission.repeated(sender, nonce):
            return False
        return source in _addresses(node) or self._admission.from_stranger(source, trio.current_time())

    async def _listen(self) -> None:
        while True:
            data, address = await self._transport.receive()
            sender = sender_of(data)
            topology = self._topology
            if sender is None or topology is None:
                continue
            node = self._nodes_by_digest().get(sender)
            secret = None if node is None else self._agreed(node.public_key)
            message = None if secret is None else unpack(data, secret)
            if node is None or secret is None or message is None:
                continue
            if not message.is_response and not self._admission.answers(
                sender, message.nonce, now=trio.current_time(), wall=self._wall(), local=message.local
            ):
                continue
            if message.local:
                await self._local(message, node, secret, address)
            elif not message.is_response:
                own = topology.snapshot.nodes.get(self._name)
                # Not to wherever a query says that it comes from: somebody may have recorded it.
                reply_address = node.mesh_address(address.version)
                if own is not None and reply_address is not None and not self._etcd_away():
                    response = self._leader_history.response(message, topology, digest(own.public_key), node.name)
                    await self._transport.send(response.pack(secret), reply_address)
            elif self._asked.pop(message.nonce, None) == sender and self._etcd_away():
                self._hints_by_sender[sender] = LeaderHint(trio.current_time(), message.revision, dict(message.leaders))
                self._evaluate()

    async def ask_local(self, node: Node, address: IPAddress, note: Callable[[bytes], None]) -> None:
        """Ask a node of this location at its internal IP; `note` is told the nonce of the query before it is sent."""
        secret, own = self._agreed(node.public_key), self._own()
        if secret is None or own is None:
            await trio.lowlevel.checkpoint()
            return
        query = PeerMessage(
            is_response=False, nonce=self._nonce(), sender=digest(own.public_key), revision=0, local=True
        )
        self._asked_locally[query.nonce] = None
        while len(self._asked_locally) > _LOCAL_QUERIES_KEPT:
            del self._asked_locally[next(iter(self._asked_locally))]
        note(query.nonce)
        await self._transport.send(query.pack(secret), address)

    async def _local(self, message: PeerMessage, node: Node, secret: bytes, address: IPAddress) -> None:
        if self.reachability is None:
            return
        if message.is_response:
            self._asked_locally.pop(message.nonce, None)
            self.reachability.answered_by(message.nonce, node)
            return
        own, inside = self._own(), node.internal_ip(address.version)
        # To where the node's record says that it is, as with other queries.
        reply_address = address if address in node.mesh_addresses else None if inside is None else inside.ip
        if own is not None and reply_address is not None:
            response = evolve(message, is_response=True, sender=digest(own.public_key))
            await self._transport.send(response.pack(secret), reply_address)
            self.reachability.asked_by(node, reply_address)

    def _nonce(self) -> bytes:
        self._stamped = max(self._stamped, int(self._wall()))
        return stamp(self._stamped, int.from_bytes(os.urandom(2)))

    def _own(self) -> Node | None:
        return None if self._topology is None else self._topology.snapshot.nodes.get(self._name)

    def _evaluate(self) -> None:
        assert self._topology is not None
        hints = leaders_hinted(self._topology, self._hints_by_sender.values(), trio.current_time())
        self._back_since = None
        if hints.revision < self._hints.revision or not hints.leaders:
            return  # A hint stays until etcd is back, or a later one comes: silence is no news.
        leaders = {**self._hints.leaders, **hints.leaders}
        if leaders != self._hints.leaders:
            self._hints = LeaderHints(hints.revision, leaders)
            self._on_hints(self._hints)

    def _nodes_by_digest(self) -> dict[bytes, Node]:
        if self._by_digest is None:
            nodes = self._topology.snapshot.nodes.values() if self._topology is not None else ()
            self._by_digest = {digest(node.public_key): node for node in nodes if node.name != self._name}
        return self._by_digest

    def _agreed(self, public_key: str) -> bytes | None:
        if public_key not in self._secrets:
            if len(self._secrets) >= MOST_SECRETS:
                self._secrets.clear()
            self._secrets[public_key] = self._secret(public_key)
        return self._secrets[public_key]


def _addresses(node: Node | None) -> tuple[IPAddress, ...]:
    """Where a node sends from, and where it is asked."""
    if node is None:
        return ()
    return (*node.mesh_addresses, *(interface.ip for interface in node.internal_ips))


def served(node: Node | None, own: Collection[IPAddress]) -> tuple[IPAddress, ...]:
    """The addresses of this host to which queries for `node`, which it is, are sent; `own` are those that it has on the
    underlay. What is sent to an internal IP that it does not have comes to one of its private addresses of that family
    (public ones only if it has no other): it is a NAT's, and only the NAT knows to which."""
    if node is None:
        return ()
    addresses = list(_addresses(node))
    for interface in node.internal_ips:
        family = [address for address in own if address.version == interface.version]
        if interface.ip not in family:
            addresses += [address for address in family if not is_public(address)] or family
    return tuple(dict.fromkeys(addresses))


def _to_query(topology: Topology, own: Node) -> list[Node]:
    """The nodes to query, in turn: members of the location and leaders of others, one of each after the other."""
    try:
        home = topology.segment_of(own.name)
    except UnknownNode:
        return []
    order = home.election.order
    local_members = sorted(
        (node for node in home.members if node.name != own.name),
        key=lambda node: order.index(node.name) if node.name in order else len(order),
    )
    far = sorted(
        (segment.leader for segment in topology.segments.values() if segment is not home),
        key=lambda node: digest(own.name + " " + node.name),
    )
    nodes: list[Node] = []
    for index in range(MOST_ASKED):
        nodes += [*local_members[index : index + 1], *far[index : index + 1]]
    return [node for node in nodes if node.mesh_addresses]
