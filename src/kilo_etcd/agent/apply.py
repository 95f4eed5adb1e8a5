"""Brings one plan after the other to the kernel, the handshake order of new peers included.

In the agent only this module calls `Kernel.apply`. Between two plans it remembers which peers are new
(`planning.handshake_order`); the rest are arguments. It decides nothing about the mesh and knows nothing of etcd.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import trio
from attrs import evolve, frozen

from kilo_etcd import kernel
from kilo_etcd.kernel.state import SetPeer
from kilo_etcd.model import IPAddress
from kilo_etcd.model.hostplan import TAKEOVER_CHECK_KEEPALIVE, HostPlan
from kilo_etcd.planning.handshake_order import (
    MOST_TRIGGERED,
    STAGES,
    begins,
    handshake_order,
    must_come,
    peered_since,
    promotions,
)
from kilo_etcd.runtime.handshakes import moved, trigger_handshakes
from kilo_etcd.topology.segments import Topology


class PlanApplier:
    """One host's kernel, as the reconciler uses it."""

    def __init__(self, device: kernel.Kernel) -> None:
        self.programmed: HostPlan | None = None
        """What was last asked of the kernel: the plan in its handshake order, and with the takeover checks."""
        self._device = device
        self._since: Mapping[str, float] = {}
        self._waiting: Mapping[str, int] = {}
        self._due: float | None = None
        self._topology: Topology | None = None
        self._reset_session: set[str] = set()
        self._renew: set[str] = set()
        """Those of them whose handshakes of before are forgotten, so that new ones are to be started."""
        self._proving: frozenset[str] = frozenset()
        self._due_changed = trio.Event()

    async def apply(self, plan: HostPlan, topology: Topology, *, standby: bool, fresh: bool) -> kernel.ApplyReport:
        """Bring the kernel to `plan`, which was made of `topology`; a `standby` exchanges no packets with its peers.

        KernelError if nothing can be programmed at all. `wait_due` says when to call again although nothing changed.
        """
        now = trio.current_time()
        since = peered_since(self._since, plan, standby=standby, now=now)
        order = handshake_order(
            plan, topology.snapshot, since, self._waiting,
            promoted=promotions(self._topology, topology), standby=standby, now=now,
        )  # fmt: skip
        desired = self._with_takeover_checks(order.plan, plan, standby=standby)
        silent = await self._silent(order.late.keys())
        reset = silent | self._reset_session
        report = await self._device.apply(desired, fresh=fresh, reset=reset)
        # Only an apply that succeeded is remembered: after an error the next one takes the same peers for new.
        self._since, before, self.programmed = since, self.programmed, desired
        new_keys = {change.public_key for change in report.changes if isinstance(change, SetPeer) and change.new}
        self._reset_session = (self._reset_session - new_keys) & desired.peers.keys()
        trigger_handshakes({**order.trigger, **{key: order.late[key] for key in silent}}.values())
        renewed, self._renew = self._renew & new_keys, self._renew & self._reset_session
        waiting, due = order.waiting, order.due
        if not standby:
            started = _Renewals.of(renewed, report, order.plan, topology)
            trigger_handshakes(started.trigger)
            if started.wait:
                # From here on they are like new peers: the other end may have made this host anew as well.
                self._since = {**since, **dict.fromkeys(started.wait, now)}
                waiting = {**waiting, **dict.fromkeys(started.wait, 0)}
                due = min(now + STAGES[0], now + STAGES[0] if due is None else due)
            trigger_handshakes(_set_to_observed(report, order.plan, topology, apart_from=renewed)[:MOST_TRIGGERED])
            trigger_handshakes(moved(report, before, order.plan, topology, apart_from=reset)[:MOST_TRIGGERED])
            remade = _remade(report, before, topology)
            trigger_handshakes(remade if len(remade) <= MOST_TRIGGERED else ())
        self._waiting, self._due, self._topology = waiting, due, topology
        self._due_changed.set()
        return report

    async def silence(self, plan: HostPlan) -> None:
        """Bring the kernel to `plan`, which has no peers; the next `apply` takes all peers for new. KernelError."""
        await self._device.apply(plan, fresh=True)
        self._since, self._waiting, self._due = {}, {}, None
        self.programmed, self._topology = plan, None

    def reset_session(self, keys: Collection[str]) -> None:
        """Have the next `apply` make these peers anew: their sessions are dead, and others know where they are now."""
        self._reset_session.update(keys)

    def renew(self, keys: Collection[str]) -> None:
        """Have the next `apply` make these peers anew, so that their handshakes of before are forgotten, and see to it
        that there is a new one."""
        self._reset_session.update(keys)
        self._renew.update(keys)

    def check_takeover(self, keys: Collection[str]) -> None:
        """Have the next `apply`, and those after it, start handshakes with these peers although this host is a standby:
        a handshake shows that it could lead. None: no more."""
        to_check = frozenset(keys)
        self._reset_session.update(to_check - self._proving)
        self._proving = to_check

    def _with_takeover_checks(self, programmed: HostPlan, plan: HostPlan, *, standby: bool) -> HostPlan:
        # A peer with keepalive sends at once, and needs an endpoint, which a standby's peers do not get. A host
        # that leads by now needs no takeover check.
        takeover_checks = {
            key: evolve(plan.peers[key], persistent_keepalive=TAKEOVER_CHECK_KEEPALIVE)
            for key in self._proving & plan.peers.keys()
            if standby or not plan.peers[key].in_use
        }
        return evolve(programmed, peers={**programmed.peers, **takeover_checks}) if takeover_checks else programmed

    async def wait_due(self) -> None:
        """Return when the last plan is to be applied again, read afresh, for the sake of new peers."""
        while True:
            await self._due_changed.wait()
            self._due_changed = trio.Event()
            if self._due is not None:
                with trio.move_on_at(self._due):
                    await self._due_changed.wait()
                    continue
                return

    async def _silent(self, late: Collection[str]) -> frozenset[str]:
        """Those of `late` that have had no handshake and must be reset.

        Packets for a peer without an endpoint count as an attempt with some WireGuards, and the next one is five
        seconds away; a peer that is new has made none.
        """
        if not late:
            return frozenset()
        observed = (await self._device.observe()).peers
        return frozenset(key for key in late if key in observed and not observed[key].last_handshake)


@frozen
class _Renewals:
    """How the sessions with peers begin that were made anew since their handshakes were to be forgotten."""

    trigger: Sequence[IPAddress] = ()
    """The mesh addresses of those with which this host starts the handshake."""
    wait: Sequence[str] = ()
    """The public keys of those that may start it, and have a moment for it."""

    @classmethod
    def of(cls, renewed: Collection[str], report: kernel.ApplyReport, plan: HostPlan, topology: Topology) -> _Renewals:
        own, trigger, wait = topology.snapshot.nodes[plan.node], list[IPAddress](), list[str]()
        set_to = {change.public_key: change.endpoint for change in report.changes if isinstance(change, SetPeer)}
        # If the kernel refused changes for a while there may be more; traffic begins with the others.
        for key in sorted(renewed & plan.peers.keys())[:MOST_TRIGGERED]:
            peer, endpoint = plan.peers[key], set_to.get(key)
            node = topology.snapshot.nodes.get(peer.name)
            if not peer.in_use or node is None:
                continue
            # Where one behind NAT was heard it may be found still, and it may have no reason to begin.
            heard = endpoint is not None and endpoint.public
            if begins(own, node, peer) or (heard and must_come(own, node, peer)):
                trigger += node.mesh_addresses[:1]
            elif not must_come(own, node, peer):
                wait.append(key)
        return cls(trigger, wait)


def _set_to_observed(
    report: kernel.ApplyReport, plan: HostPlan, topology: Topology, *, apart_from: Collection[str]
) -> list[IPAddress]:
    """Mesh addresses of nodes that were just set to where others see them: both ends do so at about the same time. Not
    of those that were made anew for another reason (`apart_from`)."""
    addresses: list[IPAddress] = []
    for change in report.changes:
        if isinstance(change, SetPeer) and change.endpoint is not None and change.public_key not in apart_from:
            peer = plan.peers.get(change.public_key)
            node = topology.snapshot.nodes.get(peer.name) if peer is not None and peer.observed else None
            addresses += node.mesh_addresses[:1] if node is not None else ()
    return addresses


def _remade(report: kernel.ApplyReport, before: HostPlan | None, topology: Topology) -> list[IPAddress]:
    """Mesh addresses of nodes that had to be made peers once more, since somebody took them or the whole device away.

    They go on with a session that is lost here, and would not notice for fifteen seconds. Those that were reset on
    purpose are not among them.
    """
    addresses: list[IPAddress] = []
    for change in report.changes:
        if isinstance(change, SetPeer) and change.new and not change.reset and before is not None:
            peer = before.peers.get(change.public_key)
            node = None if peer is None else topology.snapshot.nodes.get(peer.name)
            addresses += node.mesh_addresses[:1] if node is not None else ()
    return addresses
