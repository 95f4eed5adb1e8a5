"""What WireGuard does besides with a handshake: it drops one that is dated before another from the same peer, and a
session of which one end has forgotten the other is of no use.

The kernels in memory know of no session but the time of its handshake. For schedules about clocks `Sessions` keeps the
rest, for all hosts of a world: the greatest timestamp from each peer, which is forgotten with the peer, and when the
session began that both ends know. Packets go through a session for 180 s; then who sends begins a handshake, every
five seconds until one is answered (whitepaper sections 5.1 and 6.1).
"""

from __future__ import annotations

from collections.abc import Collection
from math import inf
from typing import TYPE_CHECKING

import trio
from attrs import define, evolve, field

from kilo_etcd.kernel.state import RemovePeer, SetPeer
from kilo_etcd.model import SESSION_SECONDS
from simulation.network import FRESH

if TYPE_CHECKING:
    from simulation.world import World

TICK, KEEPALIVE, AGAIN = 0.5, 10.0, 5.0
"""Seconds between two packets, between two answers to packets, and between two attempts at a handshake."""


@define
class Sessions:
    """Of all hosts of a world, whose network asks `takes` of each handshake."""

    world: World
    senders: Collection[tuple[str, str]] = ()
    """Who sends to whom, all the time; nobody sends back."""
    dropped: int = 0
    """Handshakes that were taken for replays."""
    cut: list[tuple[str, str, float]] = field(factory=list)
    """The host and the peer that it made anew although their session worked, and the session's age."""
    down_since: dict[tuple[str, str], float] = field(factory=dict)
    """Senders whose packets do not arrive, since when."""
    _latest: dict[tuple[str, str], float] = field(factory=dict)
    """Receiver and sender -> the greatest timestamp."""
    _began: dict[frozenset[str], float] = field(factory=dict)
    _read: dict[str, int] = field(factory=dict)
    _tried: dict[tuple[str, str], float] = field(factory=dict)
    _answered: dict[tuple[str, str], float] = field(factory=dict)

    def takes(self, source: str, target: str) -> bool:
        """Whether `target` takes a handshake that `source` begins now."""
        self._catch_up()
        if self.world.hosts[source].now() > self._latest.get((target, source), -inf):
            return True
        self.dropped += 1
        return False

    def begun(self, source: str, target: str) -> None:
        """A handshake that `source` began was answered."""
        self._latest[target, source] = self.world.hosts[source].now()
        self._began[frozenset((source, target))] = trio.current_time()

    def lost(self, name: str) -> None:
        """A host has no power, and no WireGuard device after it."""
        self._catch_up()
        self._latest = {pair: time for pair, time in self._latest.items() if pair[0] != name}
        self._began = {pair: time for pair, time in self._began.items() if name not in pair}

    def _catch_up(self) -> None:
        """Forget what the kernels have forgotten since."""
        names = {host.public_key: name for name, host in self.world.hosts.items()}
        for name, host in self.world.hosts.items():
            made = host.machine.history[self._read.get(name, 0) :]
            self._read[name] = len(host.machine.history)
            for change in made:
                if not isinstance(change, RemovePeer) and not (isinstance(change, SetPeer) and change.new):
                    continue
                other = names.get(change.public_key)
                if other is None:
                    continue
                self._latest.pop((name, other), None)
                began = self._began.pop(frozenset((name, other)), None)
                if began is not None and isinstance(change, SetPeer) and change.reset:
                    self.cut.append((name, other, trio.current_time() - began))

    async def send(self) -> None:
        """The packets of `senders`, until cancelled."""
        while True:
            await trio.sleep(TICK)
            self._catch_up()
            for source, target in self.senders:
                self._send(source, target)

    def _send(self, source: str, target: str) -> None:
        here, there, now = self.world.hosts[source], self.world.hosts[target], trio.current_time()
        if here.agent is None or not here.condition.powered or not there.condition.powered:
            return
        if there.public_key not in here.machine.observed.peers:
            return
        age = now - self._began.get(frozenset((source, target)), -inf)
        if age < SESSION_SECONDS:
            self.down_since.pop((source, target), None)
            self._receive(target, source, TICK)
            self._receive(source, target, KEEPALIVE)
        else:
            self.down_since.setdefault((source, target), now)
        if age > FRESH and now - self._tried.get((source, target), -inf) >= AGAIN:
            self._tried[source, target] = now
            if not self.world.network.shake(source, there.public_key):
                here.machine.send_to(there.public_key)

    def _receive(self, name: str, sender: str, period: float) -> None:
        """WireGuard of a host counts a packet of `sender`'s, if `period` seconds have gone since the last one."""
        machine, key, now = self.world.hosts[name].machine, self.world.hosts[sender].public_key, trio.current_time()
        peer = machine.observed.peers.get(key)
        if peer is not None and now - self._answered.get((name, sender), -inf) >= period:
            self._answered[name, sender] = now
            counted = evolve(peer, rx_bytes=peer.rx_bytes + 32)
            machine.observed = evolve(machine.observed, peers={**machine.observed.peers, key: counted})
