"""The end of an agent that was asked to stop: the successor leads first, then its records are taken away."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence

import trio

from kilo_etcd import kernel
from kilo_etcd.agent.host_state import HostState
from kilo_etcd.agent.leadership import candidacy_policy
from kilo_etcd.etcd import api as etcd
from kilo_etcd.runtime.logs import Logger
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.operator import statuses
from kilo_etcd.store.session.session import Session

HANDOVER_SECONDS = 2.0
"""How long a stopping leader waits for the others to have applied its successor's plan (docs/design.md, "Election,
failure detection and handover")."""

CONFIRM_POLL_SECONDS = 0.02

RESIGN_SECONDS = 2.0
"""How long a stopping agent tries to take its records away; they are under leases that end by themselves."""


class Leaving:
    """Hands over what the host `name` leads, and removes what it wrote, when its agent stops. `state` gives what is
    in force, `applied` the event of the next apply, after which that is another. `keep` has a last write to disk
    done, `forget` remove copies there (OSError), and `remove_names` the names in the hosts file; None: there are
    none."""

    def __init__(
        self,
        session: Session,
        client: etcd.Client,
        keys: Keys,
        name: str,
        public_key: str,
        log: Callable[[], Logger],
        *,
        state: Callable[[], HostState],
        applied: Callable[[], trio.Event],
        keep: Callable[[], Awaitable[object]],
        forget: Sequence[Callable[[], Awaitable[object]]],
        remove_names: Callable[[], Awaitable[object]] | None,
    ) -> None:
        self._session, self._client, self._keys, self._name, self._public_key = session, client, keys, name, public_key
        self._log, self._state, self._applied = log, state, applied
        self._keep, self._forget, self._remove_names = keep, forget, remove_names

    async def hand_over(self) -> None:
        """Let the successor lead before we go: candidacy away, its plan applied here, then seen applied elsewhere."""
        topology, session = self._state().topology, self._session
        if session.candidacy is None or topology is None or self._state().role is None:
            return
        if self._name not in topology.snapshot.nodes:
            return  # Its record or its address was taken away, and is on its way back.
        segment = topology.segment_of(self._name)
        led = segment.leader.name == self._name and segment.next_in_line is not None
        written = False
        with trio.move_on_after(HANDOVER_SECONDS):
            try:
                succeeded = candidacy_policy.succeeded(topology, self._name, session.candidacy.location, leaves=True)
                written = await session.leave(succeeded=succeeded)
                if not led or not written:
                    return
                while self._leader() == self._name:
                    await self._applied().wait()
                revision = self._state().revision
                while not candidacy_policy.confirmed(  # noqa: ASYNC110 - what is waited for happens on other hosts
                    {node: status.revision for node, status in (await statuses(self._client, self._keys)).items()},
                    revision,
                    self._name,
                ):
                    await trio.sleep(CONFIRM_POLL_SECONDS)
            except etcd.EtcdError as error:
                self._log().warning("leadership was not handed over", error=str(error))
                return
            self._log().info("leadership handed over", location=segment.location, leader=self._leader())
            return
        if led and written:
            self._log().warning("not every host has confirmed the new leader in time; stopping anyway",
                                location=segment.location)  # fmt: skip
        elif led:
            self._log().warning("leadership was not handed over, since etcd does not answer; the lease ends by itself",
                                location=segment.location)  # fmt: skip

    def _leader(self) -> str | None:
        role = self._state().role
        return None if role is None else role.leader

    async def leave(self, interface: str, *, ephemeral: bool, cleans_up: bool) -> None:
        """Take away what is only a live agent's; if it `cleans_up`, everything, and of an ephemeral host all but its
        files: its address may be another's from now on."""
        leaves = ephemeral or cleans_up
        await self._take_records_away(forget=leaves)
        if leaves:
            await self._clean_up(interface)
        if cleans_up:
            await self._forget_files()
        else:
            await self._keep()
        self._log().info("stopped", kernel_state="removed" if leaves else "left in place")

    async def _take_records_away(self, *, forget: bool) -> None:
        error: etcd.EtcdError | str = "it did not answer in time"
        with trio.move_on_after(RESIGN_SECONDS):
            try:
                await (self._session.forget() if forget else self._session.resign())
                return
            except etcd.EtcdError as refusal:
                error = refusal
        self._log().warning("the records in etcd could not be removed; their leases end by themselves",
                            error=str(error))  # fmt: skip

    async def _clean_up(self, interface: str) -> None:
        changes = await kernel.cleanup(interface, public_key=self._public_key)
        if self._remove_names is not None:
            await self._remove_names()
        self._log().info("cleaned up", changes=len(changes))

    async def _forget_files(self) -> None:
        try:
            for forget in self._forget:
                await forget()
        except OSError as failure:
            self._log().warning("the cached snapshot could not be removed from disk", error=str(failure))
