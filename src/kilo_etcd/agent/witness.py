"""The tasks of a witness: tries whether packets get through its leader, and says in etcd when they do not.

What to try and what follows from it is decided by `agent.duty` and `topology.verdicts`; here it is done: echo requests,
the look at itself before it accuses another, the handshake that proves that it could do better, and the record under
the short lease. As long as all is well there is one small packet and its answer every PERIOD on one host of a location,
and no write anywhere.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from contextlib import suppress

import trio
from attrs import evolve

from kilo_etcd import kernel, store
from kilo_etcd.agent import duty as duties
from kilo_etcd.agent.duty import Account, Duty, Summons, accused, duty_of, stands, summons_of
from kilo_etcd.agent.logs import Once
from kilo_etcd.model import IPAddress, Node
from kilo_etcd.topology import Topology, UnknownNode

IN_DOUBT = 0.5
"""Seconds between two looks while it stands that the leader does not forward."""

FAR_PERIOD = 1.0
"""The same for another location's leader."""

PROOF_SECONDS, PROOF_POLL = 1.0, 0.04
"""How long a handshake may take that proves that this host could lead, and the time between two looks for it."""

PROOF_AGAIN = 6.0
"""Seconds until a proof that failed is tried again: WireGuard shakes hands every five seconds at most."""

TAKE_BACK = 0.25
"""Seconds between an answer and the taking back of what was said, in which it may turn out that another leads now."""

UNABLE_SECONDS = 60.0
"""Where this host may not ping, it is tried again so much later."""


class Witness:
    """Of node `name`.

    `sound` says whether this host's kernel is as planned; `prove` has handshakes made with these public keys, and with
    none any more when it is empty; `look_again` is called when the kernel may not be as planned: this host has seen
    it, or others say that it does not forward.
    """

    def __init__(
        self,
        device: kernel.Kernel,
        session: store.Session,
        name: str,
        once: Once,
        *,
        sound: Callable[[], Awaitable[bool]],
        prove: Callable[[Collection[str]], object],
        look_again: Callable[[], object],
        rng: random.Random | None = None,
    ) -> None:
        self._device = device
        self._session = session
        self._name = name
        self._once = once
        self._sound = sound
        self._prove = prove
        self._look_again = look_again
        self._rng = rng or random.Random()
        self._account = Account()
        self._watched = ("", 0)
        """The leader, and its candidacy, that the account is of."""
        self._topology: Topology | None = None
        self._duty: Duty | None = None
        self._summons: tuple[Summons, ...] = ()
        self._accusers: tuple[str, ...] = ()
        self._news = trio.Event()
        self._far_news = trio.Event()
        self._proving: frozenset[str] = frozenset()
        self._proof_due = 0.0
        self._lock = trio.Lock()

    def follow(self, topology: Topology) -> None:
        """`topology` is in the kernel."""
        self._topology = topology
        before, self._duty = self._duty, duty_of(topology, self._name)
        if self._duty is not None and not self._duty.about(*self._watched):
            self._watched, self._account = (self._duty.leader.name, self._duty.candidacy), Account()
        if self._duty != before:
            news, self._news = self._news, trio.Event()
            news.set()
        summons = summons_of(topology, self._name)
        if summons != self._summons or any(not self._holds(location) for location in self._session.verdicts):
            self._summons = summons
            news, self._far_news = self._far_news, trio.Event()
            news.set()
        accusers = tuple(verdict.witness for verdict in accused(topology, self._name))
        if set(accusers) - set(self._accusers):
            self._look_again()
        self._accusers = accusers

    async def run(self) -> None:
        """Be a witness until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_leader)
            nursery.start_soon(self._heed_summons)

    # -- this host's own leader ---------------------------------------------------------------------------------

    async def _watch_leader(self) -> None:
        while True:
            duty, news = self._duty, self._news
            if duty is None or not (duty.first or duty.doubts or self._says(duty)):
                self._stop_proving()
                await news.wait()
                continue
            try:
                pause = await self._look(duty)
            except kernel.KernelError as error:
                self._once.warning("pings", "this host cannot be a witness", error=str(error))
                pause = UNABLE_SECONDS
            else:
                self._once.clear("pings", "this host can be a witness again")
            with trio.move_on_after(pause * self._rng.uniform(0.95, 1.05)):
                await news.wait()

    async def _look(self, duty: Duty) -> float:
        """Try once, or harder if there is doubt; the seconds until the next time."""
        targets = self._in_doubt(duty) if duty.doubts or self._says(duty) else ()
        if not targets and self._says(duty):
            # Whoever was named leads no more, so whether it answers says nothing about the way there.
            self._stop_proving()
            await self._say(duty.location, None)
        if not targets:
            if not duty.first:
                return duties.PERIOD
            now = trio.current_time()
            target = self._account.next(duty, now)
            if target is None:
                return duties.BLIND_PERIOD
            counts = self._account.knows(target, now)
            if await self._through([target], times=1) or not counts:
                return duties.BLIND_PERIOD if self._account.blind(duty, now) else duties.PERIOD
            targets = self._in_doubt(duty)
        if not targets:
            return duties.PERIOD
        through, near = await self._try_hard(duty, targets)
        if through and self._says(duty):
            # It may have answered by way of a successor whose plan is being applied; `follow` is called after that.
            await trio.sleep(TAKE_BACK)
        if not self._current(duty):
            return 0.0
        said = self._said(duty)
        if through:
            self._stop_proving()
            if said is not None:
                await self._say(duty.location, None)
            return duties.PERIOD
        if not await self._sound():
            # What is missing here is on its way back; it says nothing about the leader.
            self._look_again()
            return duties.PERIOD
        found = store.VerdictRecord(
            leader=duty.leader.name,
            candidacy=duty.candidacy,
            targets=tuple(sorted(node.name for node in targets)),
            answers=duty.near in near,
            fellows=any(address in near for address in duty.fellows),
            reaches=said is not None and said.reaches,
        )
        await self._say(duty.location, found)
        if duty.first and not found.reaches and trio.current_time() >= self._proof_due:
            if await self._reaches(targets):
                await self._say(duty.location, evolve(found, reaches=True))
            else:
                self._proof_due = trio.current_time() + PROOF_AGAIN
        return IN_DOUBT

    def _in_doubt(self, duty: Duty) -> tuple[Node, ...]:
        said = self._said(duty)
        return self._account.in_doubt(duty, trio.current_time(), said.targets if said is not None else ())

    async def _try_hard(self, duty: Duty, targets: Collection[Node]) -> tuple[bool, Mapping[IPAddress, float]]:
        """Whether any of `targets` answers through the leader, and who answers on the location's network."""
        near: Mapping[IPAddress, float] = {}
        through = False
        trouble: kernel.KernelError | None = None

        async def try_near() -> None:
            nonlocal near
            # If this host may not ping, the other attempt says so.
            with suppress(kernel.KernelError):
                near = await self._device.ping(
                    [duty.near, *duty.fellows], times=duties.BURST, patience=duties.PATIENCE
                )  # fmt: skip

        async with trio.open_nursery() as nursery:
            nursery.start_soon(try_near)
            try:
                through = await self._through(targets, times=duties.BURST)
            except kernel.KernelError as error:
                # Caught in here: a nursery would make a group of it.
                trouble = error
            if through or trouble is not None:
                nursery.cancel_scope.cancel()
        if trouble is not None:
            raise trouble
        return through, near

    async def _through(self, targets: Collection[Node], *, times: int) -> bool:
        """Whether any of them answers; this host's routes send the requests through its leader."""
        by_address = {node.mesh_addresses[0]: node for node in targets}
        answers = await self._device.ping(
            by_address, times=times, patience=self._account.patience(targets), first=True
        )  # fmt: skip
        answered = {by_address[address].name: took for address, took in answers.items()}
        # Of several, one answer is enough, and the others were not waited for.
        tried = [node for node in targets if node.name in answered] if answered else targets
        self._account.tried(tried, answered, trio.current_time())
        return bool(answered)

    async def _reaches(self, targets: Iterable[Node]) -> bool:
        """Whether this host itself can shake hands with one of them."""
        keys = frozenset(node.public_key for node in targets)
        try:
            # Any other handshake than the last one will do; whether it is a later one, a clock that jumps cannot tell.
            before = (await self._device.hear()).peers
            former = {0, *(before[key].last_handshake for key in keys & before.keys())}
            self._proving = keys
            self._prove(keys)
            with trio.move_on_after(PROOF_SECONDS):
                while True:
                    peers = (await self._device.hear()).peers
                    if any(peers[key].last_handshake not in former for key in keys & peers.keys()):
                        return True
                    await trio.sleep(PROOF_POLL)
        except (OSError, kernel.KernelError):
            pass
        self._stop_proving()
        return False

    def _stop_proving(self) -> None:
        if self._proving:
            self._proving = frozenset()
            self._prove(())

    # -- others' leaders ----------------------------------------------------------------------------------------

    async def _heed_summons(self) -> None:
        while True:
            news = self._far_news
            await self._drop_stale()
            try:
                for summons in self._summons:
                    await self._examine(summons)
            except kernel.KernelError as error:
                self._once.warning("pings", "this host cannot be a witness", error=str(error))
            with trio.move_on_after(FAR_PERIOD if self._summons else float("inf")):
                await news.wait()

    async def _examine(self, summons: Summons) -> None:
        """Try the accused leader, and others through it."""
        leader = summons.leader.mesh_addresses[0]
        members = [node.mesh_addresses[0] for node in summons.members]
        answers = await self._device.ping([leader, *members], times=duties.BURST, patience=duties.PATIENCE)
        through = any(address in answers for address in members)
        said = self._session.verdicts.get(summons.location)
        if through and said is not None:
            await trio.sleep(TAKE_BACK)  # as in `_look`
        if not any(summons.about(one.leader.name, one.candidacy) for one in self._summons):
            return
        if said is not None and not summons.about(said.leader, said.candidacy) and self._holds(summons.location):
            return  # There is one word for each location, and this host's own leader comes first.
        if through:
            await self._say(summons.location, None)
            return
        await self._say(
            summons.location,
            store.VerdictRecord(
                leader=summons.leader.name,
                candidacy=summons.candidacy,
                targets=tuple(sorted(node.name for node in summons.members)),
                answers=leader in answers,
            ),
        )

    # -- what is said -------------------------------------------------------------------------------------------

    def _said(self, duty: Duty) -> store.VerdictRecord | None:
        said = self._session.verdicts.get(duty.location)
        return said if said is not None and duty.about(said.leader, said.candidacy) else None

    def _says(self, duty: Duty) -> bool:
        return self._said(duty) is not None

    def _current(self, duty: Duty) -> bool:
        return self._duty is not None and self._duty.about(duty.leader.name, duty.candidacy)

    def _holds(self, location: str) -> bool:
        """Whether what is said of a location's leader is still of use: as long as that candidacy stands, since with
        the word the one passed over would lead again."""
        said = self._session.verdicts[location]
        topology = self._topology
        if topology is None:
            return True
        if not stands(topology, location, said.leader, said.candidacy):
            return False
        try:
            home, there = topology.segment_of(self._name), topology.segment_of(said.leader)
        except UnknownNode:
            return False
        # Of another segment's leader nothing is said that nobody there says. Others elsewhere do not count: those who
        # were called together would keep each other's words in force for ever.
        accusers = {node.name for node in there.members}
        return home is there or any(
            verdict.witness in accusers and (verdict.leader, verdict.candidacy) == (said.leader, said.candidacy)
            for verdict in topology.snapshot.verdicts.get(location, ())
        )

    async def _drop_stale(self) -> None:
        for location in [location for location in self._session.verdicts if not self._holds(location)]:
            await self._say(location, None)

    async def _say(self, location: str, record: store.VerdictRecord | None) -> None:
        async with self._lock:
            before = self._session.verdicts
            after = {name: said for name, said in before.items() if name != location}
            if record is not None:
                after[location] = record
            if after == before:
                return
            if record is not None:
                self._once.warning(
                    f"verdict {location}", "a leader does not forward, as far as this host can tell",
                    leader=record.leader, location=location, tried=record.targets, answers=record.answers,
                )  # fmt: skip
            else:
                said = before[location]
                self._once.clear(f"verdict {location}", "what was said of a leader is taken back", leader=said.leader)
            await self._session.put_verdicts(after)
