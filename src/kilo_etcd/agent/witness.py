"""The tasks of a witness: tries whether packets get through its leader, and says in etcd when they do not.

What to try and what follows from it is decided by `agent.duty` and `topology.verdicts`; here it is done: echo requests,
the look at itself before it accuses another, the handshake that proves that it could do better, and the record under
the short lease. As long as all is well there is one small packet and its answer every PERIOD on one host of a location,
and no write anywhere.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Collection, Container, Mapping
from contextlib import suppress

import trio
from attrs import evolve

from kilo_etcd import kernel, store
from kilo_etcd.agent import duty as duties
from kilo_etcd.agent.baseline import OPEN_SECONDS, NoBaseline
from kilo_etcd.agent.duty import Account, Duty, Summons, accused, duty_of, stands, summons_of
from kilo_etcd.agent.logs import Once
from kilo_etcd.agent.takeover import TakeoverCheck
from kilo_etcd.model import IPAddress, Node
from kilo_etcd.topology import Topology, UnknownNode

IN_DOUBT = 0.5
"""Seconds between two looks while it stands that the leader does not forward."""

FAR_PERIOD = 1.0
"""The same for another location's leader."""

ONCE_MORE = 3
"""Requests through the leader once the proof is there: it may have come because a way is open again for all."""

OTHERS_WAIT = 1.0
"""Seconds after their first word after which others than the next in line prove that they could lead."""

PROOF_AGAIN = 6.0
"""Seconds until a proof that failed is tried again: WireGuard shakes hands every five seconds at most."""

TAKE_BACK = 0.25
"""Seconds between an answer and the taking back of what was said, in which it may turn out that another leads now."""

UNABLE_SECONDS = 60.0
"""Where this host may not ping, it is tried again so much later."""


class Witness:
    """Of node `name`.

    `sound` says whether this host's kernel is as planned, and `forwards` whether nothing is known on this host that
    drops what it forwards; `prove` has handshakes made with these public keys, and with none any more when it is empty;
    `look_again` is called when the kernel may not be as planned: this host has seen it, or others say that it does not
    forward; `on_no_baseline` takes a sentence for the operator while there is no baseline, and None when there is one.
    """

    def __init__(
        self,
        device: kernel.Kernel,
        session: store.Session,
        name: str,
        once: Once,
        *,
        sound: Callable[[], Awaitable[bool]],
        forwards: Callable[[], Awaitable[bool]],
        prove: Callable[[Collection[str]], object],
        look_again: Callable[[], object],
        on_no_baseline: Callable[[str | None], object],
        rng: random.Random | None = None,
    ) -> None:
        self._device = device
        self._session = session
        self._name = name
        self._once = once
        self._sound = sound
        self._forwards = forwards
        self._check = TakeoverCheck(device, prove)
        self._look_again = look_again
        self._on_no_baseline = on_no_baseline
        self._rng = rng or random.Random()
        self._account = Account()
        self._baseline: NoBaseline | None = NoBaseline()
        """None: somebody has answered through the leader."""
        self._watched = ("", 0)
        """The leader, and its candidacy, that the account is of."""
        self._topology: Topology | None = None
        self._duty: Duty | None = None
        self._summons: tuple[Summons, ...] = ()
        self._accusers: tuple[str, ...] = ()
        self._news = trio.Event()
        self._far_news = trio.Event()
        self._proof_due = 0.0
        self._since = 0.0
        """When this host's present report on its leader was made."""
        self._no_baseline: str | None = None
        self._lock = trio.Lock()

    def follow(self, topology: Topology) -> None:
        """`topology` is in the kernel."""
        self._topology = topology
        before, self._duty = self._duty, duty_of(topology, self._name)
        if self._duty is not None and not self._duty.about(*self._watched):
            self._watched, self._account = (self._duty.leader.name, self._duty.candidacy), Account()
            self._baseline = NoBaseline()
        if self._duty is None or not self._duty.first:
            self._note_no_baseline(None)
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

    def try_again(self) -> None:
        """This host can lead now, which it could not: have it look at its leader at once."""
        if self._baseline is not None:
            self._baseline.hurry()
            news, self._news = self._news, trio.Event()
            news.set()

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
                self._check.stop()
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
            self._check.stop()
            await self._say(duty.location, None)
        if not targets:
            if not duty.first:
                return duties.PERIOD
            now = trio.current_time()
            target = self._account.next(duty, now)
            if target is None:
                return duties.BLIND_PERIOD
            counts = self._account.knows(target, now)
            if await self._through([target], times=1) or not (counts or self._account.blind(duty, now)):
                return self._pause(duty)
            if counts:
                targets = self._in_doubt(duty)
            elif self._without_baseline().silent(duty.targets, now):
                targets = duty.targets[: duties.TOGETHER]
            else:
                return self._pause(duty)
        if not targets:
            return duties.PERIOD
        through, near = await self._try_hard(duty, targets)
        if through and self._says(duty):
            # It may have answered by way of a successor whose plan is being applied; `follow` is called after that.
            await trio.sleep(TAKE_BACK)
        if not self._current(duty) or self._duty is None:
            return 0.0
        duty = self._duty
        said = self._said(duty)
        if through:
            self._check.stop()
            if said is not None:
                await self._say(duty.location, None)
            return self._pause(duty)
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
            reaches=said is not None and said.reaches and (self._baseline is None or bool(duty.far_reports)),
        )
        if not self._may_say(duty, found):
            self._check.stop()
            await self._say(duty.location, None)
            return self._pause(duty)
        if said is None:
            self._since = trio.current_time()
            self._proof_due = self._since + (0.0 if duty.first else OTHERS_WAIT)
        former = await self._check.handshakes([node.public_key for node in targets])
        await self._say(duty.location, found)
        if not found.reaches and trio.current_time() >= self._proof_due:
            self._proof_due = trio.current_time() + PROOF_AGAIN
            if await self._can_take_over(duty, targets, former):
                if await self._through(targets, times=ONCE_MORE):
                    # What kept both of us from them is over.
                    return 0.0
                if self._current(duty):
                    await self._say(duty.location, evolve(found, reaches=True))
        return IN_DOUBT

    def _may_say(self, duty: Duty, found: store.VerdictRecord) -> bool:
        """Whether silence is enough for a report. Without a baseline it takes a leader that answers on the location's
        network, or another member of the location that has doubts too; and there is an end to it if no target
        confirms it."""
        baseline, now = self._baseline, trio.current_time()
        if baseline is None:
            return True
        if baseline.over(now):
            baseline.close(now)
        if baseline.waits(now):
            return False
        if duty.reported_nearby and baseline.opened is None:
            return True
        if not duty.first:
            return False
        if not found.answers:
            if baseline.opened is None:
                baseline.defer(now)
            return False
        baseline.open(now)
        return True

    async def _can_take_over(self, duty: Duty, targets: Collection[Node], former: Container[float] | None) -> bool:
        """Whether this host could do better than the leader; if there is no baseline, a target must say too that the
        leader does not forward."""
        reaches = await self._check.reaches(targets, former)
        if self._baseline is not None:
            self._baseline.handshakes = reaches
        return reaches and await self._confirmed(duty) and await self._forwards()

    async def _confirmed(self, duty: Duty) -> bool:
        baseline, until = self._baseline, self._since + OPEN_SECONDS
        if baseline is None:
            return True
        while self._current(duty):
            news, now = self._news, trio.current_time()
            assert self._duty is not None
            if baseline.confirms(self._duty.far_reports, self._since, now):
                return True
            if now >= until:
                break
            with trio.move_on_at(min(until, now + IN_DOUBT)):
                await news.wait()
        return False

    def _without_baseline(self) -> NoBaseline:
        """The baseline is lost with time, if nobody answers any more and no report stands."""
        if self._baseline is None:
            self._baseline = NoBaseline()
        return self._baseline

    def _pause(self, duty: Duty) -> float:
        """The seconds until the next try, and a word to the operator if nobody ever answers."""
        now = trio.current_time()
        if not self._account.blind(duty, now):
            self._baseline = None
            self._note_no_baseline(None)
            return duties.PERIOD
        baseline = self._without_baseline()
        self._note_no_baseline(baseline.sentence(duty.leader.name, now))
        return duties.BLIND_PERIOD if baseline.waits(now) else duties.PERIOD

    def _note_no_baseline(self, sentence: str | None) -> None:
        if sentence != self._no_baseline:
            self._no_baseline = sentence
            self._on_no_baseline(sentence)

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
        if answered:
            self._baseline = None
        # Of several, one answer is enough, and the others were not waited for.
        tried = [node for node in targets if node.name in answered] if answered else targets
        self._account.tried(tried, answered, trio.current_time())
        return bool(answered)

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
