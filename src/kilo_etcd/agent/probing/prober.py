"""The prober's tasks: try whether packets get through the leader, and report in etcd if they do not.

`agent.probing.probe_assignment` and `topology.probe_reports` decide what to try and what follows; here it is done: echo
requests, the check of itself before it reports another, the takeover check, and the record under the short lease. As
long as all is well there is one small packet and its answer every PERIOD on one host of a location, and no write
anywhere.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Collection, Container, Mapping
from contextlib import suppress

import trio
from attrs import define, evolve

from kilo_etcd import kernel
from kilo_etcd.agent.probing import probe_assignment as periods
from kilo_etcd.agent.probing.baseline import OPEN_SECONDS, NoBaseline
from kilo_etcd.agent.probing.probe_assignment import (
    CrossCheck,
    ProbeAssignment,
    ProbeHistory,
    assignment_of,
    cross_checks_of,
    is_candidate,
)
from kilo_etcd.agent.probing.takeover import TakeoverCheck
from kilo_etcd.kernel.echo import EchoRequests
from kilo_etcd.model import IPAddress, Node
from kilo_etcd.runtime.logs import Once
from kilo_etcd.store.records import ProbeReportRecord
from kilo_etcd.store.session.session import Session
from kilo_etcd.topology.probe_reports import standing
from kilo_etcd.topology.segments import Topology, UnknownNode

SUSPECT_PERIOD = 0.5
"""Seconds between two looks while the report stands that the leader does not forward."""

FAR_PERIOD = 1.0
"""The same for another location's leader."""

ONCE_MORE = 3
"""Requests through the leader after the takeover check: it may have passed because a path is open again for all."""

OTHERS_WAIT = 1.0
"""Seconds after their first report after which others than the next in line run their takeover check."""

TAKEOVER_CHECK_RETRY = 6.0
"""Seconds until a failed takeover check is tried again: WireGuard starts a handshake every five seconds at most."""

TAKE_BACK = 0.25
"""Seconds between an answer and the withdrawal of the report, in which it may turn out that another leads now."""

UNABLE_SECONDS = 60.0
"""Where this host may not ping, it is tried again so much later."""


@define
class _OwnReport:
    """What goes with this host's present report on its leader. Times are trio's."""

    since: float | None = None
    """When it was made, or was adopted from an earlier agent of the host."""
    alone_since: float = 0.0
    """Since when it is the only one on this leader."""
    former: frozenset[float] | None = None
    """When the last handshakes with any peers were, from before targets could know this host by its report."""
    takeover_check_due: float = 0.0


class Prober:
    """Of node `name`.

    `sound` says whether this host's kernel is as planned and sends to some mesh addresses by the plan's routes, and
    `forwards` whether nothing is known on this host that drops what it forwards; `check_takeover` has handshakes made
    with these public keys, and with none any more when it is empty; `look_again` is called when the kernel may not be
    as planned: this host has seen it, or others say that it does not forward; `on_no_baseline` takes a sentence for the
    operator while there is no baseline, and None when there is one; `examined` says whether hosts send each other many
    echo requests at present since `kgctl` asks them to.
    """

    def __init__(
        self,
        device: kernel.Kernel,
        session: Session,
        name: str,
        once: Once,
        *,
        sound: Callable[[Collection[IPAddress]], Awaitable[bool]],
        forwards: Callable[[], Awaitable[bool]],
        check_takeover: Callable[[Collection[str]], object],
        look_again: Callable[[], object],
        on_no_baseline: Callable[[str | None], object],
        examined: Callable[[], bool] = lambda: False,
        rng: random.Random | None = None,
    ) -> None:
        self._device = device
        self._session = session
        self._name = name
        self._once = once
        self._sound = sound
        self._forwards = forwards
        self._check = TakeoverCheck(device, check_takeover)
        self._look_again = look_again
        self._on_no_baseline = on_no_baseline
        self._examined = examined
        self._rng = rng or random.Random()
        self._history = ProbeHistory()
        self._baseline: NoBaseline | None = NoBaseline()
        """None: a target has answered through the leader."""
        self._was_sound = True
        """Whether this host was as planned when requests got no answer the last time, or some got one since."""
        self._watched = ("", 0)
        """The leader, and its candidacy, that the account is of."""
        self._topology: Topology | None = None
        self._assignment: ProbeAssignment | None = None
        self._cross_checks: tuple[CrossCheck, ...] = ()
        self._reporters: tuple[str, ...] = ()
        self._news = trio.Event()
        self._far_news = trio.Event()
        self._own = _OwnReport()
        self._no_baseline: str | None = None
        self._lock = trio.Lock()

    def follow(self, topology: Topology) -> None:
        """`topology` is in the kernel."""
        self._topology = topology
        before, self._assignment = self._assignment, assignment_of(topology, self._name)
        if self._assignment is not None and not self._assignment.about(*self._watched):
            self._watched, self._history = (self._assignment.leader.name, self._assignment.candidacy), ProbeHistory()
            self._baseline = NoBaseline()
        if self._assignment is None or not self._assignment.first:
            self._note_no_baseline(None)
        if self._assignment != before:
            news, self._news = self._news, trio.Event()
            news.set()
        cross_check = cross_checks_of(topology, self._name)
        if cross_check != self._cross_checks or any(
            not self._holds(location) for location in self._session.probe_reports
        ):
            self._cross_checks = cross_check
            news, self._far_news = self._far_news, trio.Event()
            news.set()
        reporters = tuple(report.prober for report in standing(self._name, topology.snapshot))
        if set(reporters) - set(self._reporters):
            self._look_again()
        self._reporters = reporters

    def try_again(self) -> None:
        """This host can lead now, which it could not: have it look at its leader at once."""
        if self._baseline is not None:
            self._baseline.hurry()
            news, self._news = self._news, trio.Event()
            news.set()

    async def run(self) -> None:
        """Probe until cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch_leader)
            nursery.start_soon(self._serve_cross_checks)

    # -- this host's own leader ---------------------------------------------------------------------------------

    async def _watch_leader(self) -> None:
        while True:
            assignment, news = self._assignment, self._news
            if assignment is None or not (assignment.first or assignment.suspicions or self._has_reported(assignment)):
                self._check.stop()
                await news.wait()
                continue
            try:
                pause = await self._look(assignment)
            except kernel.KernelError as error:
                self._once.warning("pings", "this host cannot probe", error=str(error))
                pause = UNABLE_SECONDS
            else:
                self._once.clear("pings", "this host can probe again")
            with trio.move_on_after(pause * self._rng.uniform(0.95, 1.05)):
                await news.wait()

    async def _look(self, assignment: ProbeAssignment) -> float:
        """Try once, or harder on suspicion; the seconds until the next time."""
        targets = (
            self._suspicious_targets(assignment) if assignment.suspicions or self._has_reported(assignment) else ()
        )
        if not targets and self._has_reported(assignment):
            # The node that was reported is not the leader any more, so whether it answers says nothing about the path.
            self._check.stop()
            await self._put_reports(assignment.location, None)
        if not targets:
            if not assignment.first:
                return periods.PERIOD
            now = trio.current_time()
            target = self._history.next(assignment, now)
            if target is None:
                return periods.NO_BASELINE_PERIOD
            counts = self._history.knows(target, now)
            if await self._through([target], times=1) or not (counts or self._history.has_no_baseline(assignment, now)):
                return self._pause(assignment)
            if counts:
                targets = self._suspicious_targets(assignment)
            elif self._without_baseline().silent(assignment.targets, now):
                targets = assignment.targets[: periods.TOGETHER]
            else:
                return self._pause(assignment)
        if not targets:
            return periods.PERIOD
        through, near = await self._try_hard(assignment, targets)
        if through and self._has_reported(assignment):
            # It may have answered by way of a successor whose plan is being applied; `follow` is called after that.
            await trio.sleep(TAKE_BACK)
        if not self._current(assignment) or self._assignment is None:
            return 0.0
        assignment = self._assignment
        own_report = self._own_report(assignment)
        if through:
            self._check.stop()
            if own_report is not None:
                await self._put_reports(assignment.location, None)
            return self._pause(assignment)
        if own_report is None and self._examined():
            # These may use up what the leader's firewall lets through, and the targets'.
            return periods.PERIOD
        if assignment.is_deaf(near):
            return await self._has_nothing_to_say(assignment)
        was_sound, self._was_sound = self._was_sound, await self._sound([node.mesh_addresses[0] for node in targets])
        if not self._was_sound:
            # What is missing here is on its way back; it says nothing about the leader.
            self._look_again()
        if not (was_sound and self._was_sound):
            # Requests that were sent before all was there again say nothing about it either.
            return periods.PERIOD
        now = trio.current_time()
        if own_report is None or self._own.since is None:
            self._own.since, self._own.former = now, None
        if self._own.since == now or assignment.suspicions:
            self._own.alone_since = now
        unconfirmed = now - self._own.alone_since >= OPEN_SECONDS
        report = ProbeReportRecord(
            leader=assignment.leader.name,
            candidacy=assignment.candidacy,
            targets=tuple(sorted(node.name for node in targets)),
            leader_reachable=assignment.near in near,
            members_reachable=any(address in near for address in assignment.local_members),
            # The targets forget this host while nobody confirms its report; what was shown before says nothing later.
            can_take_over=own_report is not None
            and own_report.can_take_over
            and not unconfirmed
            and (self._baseline is None or bool(assignment.far_reports)),
            unconfirmed=unconfirmed,
        )
        if not self._may_say(assignment, report):
            return await self._has_nothing_to_say(assignment)
        if own_report is None:
            self._own.takeover_check_due = now + (0.0 if assignment.first else OTHERS_WAIT)
        if unconfirmed and own_report is not None and not own_report.unconfirmed:
            self._check.stop()
            self._own.former, self._own.takeover_check_due = None, now
        if self._own.former is None:
            self._own.former = await self._check.handshakes()
        await self._put_reports(assignment.location, report)
        if not unconfirmed and not report.can_take_over and trio.current_time() >= self._own.takeover_check_due:
            self._own.takeover_check_due = trio.current_time() + TAKEOVER_CHECK_RETRY
            if await self._can_take_over(assignment, targets, self._own.former):
                if await self._through(targets, times=ONCE_MORE):
                    # What kept both of us from them is over.
                    return 0.0
                if self._current(assignment):
                    await self._put_reports(assignment.location, evolve(report, can_take_over=True))
        return SUSPECT_PERIOD

    async def _has_nothing_to_say(self, assignment: ProbeAssignment) -> float:
        """Take back what was said; the seconds until the next try."""
        self._check.stop()
        await self._put_reports(assignment.location, None)
        return self._pause(assignment)

    def _may_say(self, assignment: ProbeAssignment, report: ProbeReportRecord) -> bool:
        """Whether silence is enough for a report. Without a baseline it takes a leader that answers on the location's
        network, or another member of the location that suspects it too; and there is an end to it if no target
        confirms it."""
        baseline, now = self._baseline, trio.current_time()
        if baseline is None:
            return True
        if baseline.over(now):
            baseline.close(now)
        if baseline.waits(now):
            return False
        if assignment.reported_nearby and baseline.opened is None:
            return True
        if not assignment.first:
            return False
        if not report.leader_reachable:
            if baseline.opened is None:
                baseline.defer(now)
            return False
        baseline.open(now)
        return True

    async def _can_take_over(
        self, assignment: ProbeAssignment, targets: Collection[Node], former: Container[float] | None
    ) -> bool:
        """Whether this host could do better than the leader; if there is no baseline, a target must say too that the
        leader does not forward."""
        can_take_over = await self._check.reaches(targets, former)
        if self._baseline is not None:
            self._baseline.handshakes = can_take_over
        return can_take_over and await self._confirmed(assignment) and await self._forwards()

    async def _confirmed(self, assignment: ProbeAssignment) -> bool:
        baseline, since = self._baseline, self._own.since
        if baseline is None:
            return True
        if since is None:
            return False
        until = since + OPEN_SECONDS
        while self._current(assignment):
            news, now = self._news, trio.current_time()
            assert self._assignment is not None
            if baseline.confirms(self._assignment.far_reports, since, now):
                return True
            if now >= until:
                break
            with trio.move_on_at(min(until, now + SUSPECT_PERIOD)):
                await news.wait()
        return False

    def _without_baseline(self) -> NoBaseline:
        """The baseline is lost with time, if no target answers any more and there is no report."""
        if self._baseline is None:
            self._baseline = NoBaseline()
        return self._baseline

    def _pause(self, assignment: ProbeAssignment) -> float:
        """The seconds until the next try, and a warning to the operator if nothing ever answers."""
        now = trio.current_time()
        if not self._history.has_no_baseline(assignment, now):
            self._baseline = None
            self._note_no_baseline(None)
            return periods.PERIOD
        baseline = self._without_baseline()
        self._note_no_baseline(baseline.sentence(assignment.leader.name, now))
        return periods.NO_BASELINE_PERIOD if baseline.waits(now) else periods.PERIOD

    def _note_no_baseline(self, sentence: str | None) -> None:
        if sentence != self._no_baseline:
            self._no_baseline = sentence
            self._on_no_baseline(sentence)

    def _suspicious_targets(self, assignment: ProbeAssignment) -> tuple[Node, ...]:
        own_report = self._own_report(assignment)
        return self._history.suspicious_targets(
            assignment, trio.current_time(), own_report.targets if own_report is not None else ()
        )

    async def _try_hard(
        self, assignment: ProbeAssignment, targets: Collection[Node]
    ) -> tuple[bool, Mapping[IPAddress, float]]:
        """Whether any of `targets` answers through the leader, and who answers in the location."""
        near: Mapping[IPAddress, float] = {}
        through = False
        trouble: kernel.KernelError | None = None

        async def try_near() -> None:
            nonlocal near
            # If this host may not ping, the other attempt says so.
            burst = EchoRequests(times=periods.BURST, patience=periods.PATIENCE)
            with suppress(kernel.KernelError):
                at_home = assignment.at_home.values()
                near = await self._device.ping([assignment.near, *assignment.local_members, *at_home], burst)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(try_near)
            try:
                through = await self._through(targets, times=periods.BURST)
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
            by_address, EchoRequests(times=times, patience=self._history.patience(targets), first=True)
        )  # fmt: skip
        answered = {by_address[address].name: took for address, took in answers.items()}
        self._was_sound = self._was_sound or bool(answered)
        if answered and self._baseline is not None:
            # From now on silence counts.
            self._baseline = None
            self._once.log.info(
                "a host elsewhere answers through the leader", leader=self._watched[0], answered=min(answered)
            )
        # Of several, one answer is enough, and the others were not waited for.
        tried = [node for node in targets if node.name in answered] if answered else targets
        self._history.tried(tried, answered, trio.current_time())
        return bool(answered)

    # -- others' leaders ----------------------------------------------------------------------------------------

    async def _serve_cross_checks(self) -> None:
        while True:
            news = self._far_news
            await self._drop_stale()
            try:
                for cross_check in self._cross_checks:
                    await self._examine(cross_check)
            except kernel.KernelError as error:
                self._once.warning("pings", "this host cannot probe", error=str(error))
            with trio.move_on_after(FAR_PERIOD if self._cross_checks else float("inf")):
                await news.wait()

    async def _examine(self, cross_check: CrossCheck) -> None:
        """Try the suspect leader, and others through it."""
        leader = cross_check.leader.mesh_addresses[0]
        members = [node.mesh_addresses[0] for node in cross_check.members]
        answers = await self._device.ping(
            [leader, *members], EchoRequests(times=periods.BURST, patience=periods.PATIENCE)
        )
        through = any(address in answers for address in members)
        own_report = self._session.probe_reports.get(cross_check.location)
        if through and own_report is not None:
            await trio.sleep(TAKE_BACK)  # as in `_look`
        if not any(cross_check.about(other.leader.name, other.candidacy) for other in self._cross_checks):
            return
        if (
            own_report is not None
            and not cross_check.about(own_report.leader, own_report.candidacy)
            and self._holds(cross_check.location)
        ):
            return  # There is one report for each location, and this host's own leader comes first.
        if through:
            await self._put_reports(cross_check.location, None)
            return
        if own_report is None and self._examined():
            return  # As in `_look`.
        await self._put_reports(
            cross_check.location,
            ProbeReportRecord(
                leader=cross_check.leader.name,
                candidacy=cross_check.candidacy,
                targets=tuple(sorted(node.name for node in cross_check.members)),
                leader_reachable=leader in answers,
            ),
        )

    # -- reports -------------------------------------------------------------------------------------------

    def _own_report(self, assignment: ProbeAssignment) -> ProbeReportRecord | None:
        own_report = self._session.probe_reports.get(assignment.location)
        return (
            own_report if own_report is not None and assignment.about(own_report.leader, own_report.candidacy) else None
        )

    def _has_reported(self, assignment: ProbeAssignment) -> bool:
        return self._own_report(assignment) is not None

    def _current(self, assignment: ProbeAssignment) -> bool:
        return self._assignment is not None and self._assignment.about(assignment.leader.name, assignment.candidacy)

    def _holds(self, location: str) -> bool:
        """Whether the report on a location's leader is still of use: as long as that candidacy stands, since
        without the report the demoted one would lead again."""
        own_report = self._session.probe_reports[location]
        topology = self._topology
        if topology is None:
            return True
        if not is_candidate(topology, location, own_report.leader, own_report.candidacy):
            return False
        try:
            home, led = topology.segment_of(self._name), topology.segment_of(own_report.leader)
        except UnknownNode:
            return False
        # A report on another segment's leader stays only while a member there reports it too. Others elsewhere do not
        # count: those that were triggered together would keep each other's reports in force forever.
        reporters = {node.name for node in led.members}
        return home is led or any(
            report.prober in reporters
            and (report.leader, report.candidacy) == (own_report.leader, own_report.candidacy)
            for report in topology.snapshot.probe_reports.get(location, ())
        )

    async def _drop_stale(self) -> None:
        for location in [location for location in self._session.probe_reports if not self._holds(location)]:
            await self._put_reports(location, None)

    async def _put_reports(self, location: str, record: ProbeReportRecord | None) -> None:
        async with self._lock:
            before = self._session.probe_reports
            after = {name: own_report for name, own_report in before.items() if name != location}
            if record is not None:
                after[location] = record
            if after == before:
                return
            if record is not None:
                self._once.warning(
                    f"probe report {location}",
                    "a leader does not forward, as far as this host can tell",
                    leader=record.leader,
                    location=location,
                    tried=record.targets,
                    leader_reachable=record.leader_reachable,
                )
            else:
                own_report = before[location]
                self._once.clear(f"probe report {location}", "a probe report is withdrawn", leader=own_report.leader)
            await self._session.put_probe_reports(after)
