"""What is known against the hops of a packet's way: by what the agents report, and by what their kernels hold. Pure.

Each hop gets a clause for the headline. The remarks on the host hold the whole sentence with its remedy. A hop is
`broken` where packets are known not to arrive by it, as far as agents can know. Where nothing is known of a host,
because its agent does not report, that is a suspicion, and no more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import suppress
from functools import partial
from ipaddress import ip_address, ip_network

from attrs import evolve, frozen

from kilo_etcd.ctl.reports.arrivals import Loss, losses
from kilo_etcd.ctl.reports.causes import Cause, causes, silence
from kilo_etcd.ctl.reports.evidence import evidence, shown
from kilo_etcd.ctl.reports.internal_arrivals import internal_losses
from kilo_etcd.ctl.reports.live import Live, LiveTunnel, ago, differs, pairs, tunnels
from kilo_etcd.ctl.reports.lossy import unsteady
from kilo_etcd.ctl.reports.narrow import narrow
from kilo_etcd.ctl.reports.one_sided import echo_refused
from kilo_etcd.ctl.reports.probed import unanswered
from kilo_etcd.ctl.reports.report import DROPPED, contradictions
from kilo_etcd.ctl.reports.trace import MEDIUM, Plans, Step, Trace, TracedPath
from kilo_etcd.model import InternalIPs, IPAddress, IPNetwork, is_within
from kilo_etcd.model.hostplan import Via
from kilo_etcd.planning.dropped import certainly_dropped, dropped_networks
from kilo_etcd.planning.exit_node import NOTHING_BACK
from kilo_etcd.planning.plan import NOT_ENCAPSULATED
from kilo_etcd.planning.reach import about_member
from kilo_etcd.runtime.hostnames import NAMES_TROUBLE
from kilo_etcd.store.records import StatusRecord
from kilo_etcd.store.session.contested import about_status_key
from kilo_etcd.store.status_texts import CLOCK_WENT_BACK, ETCD_INSIDE, NO_BASELINE, STATE_TROUBLE
from kilo_etcd.topology.nat import about_partner
from kilo_etcd.topology.places import has_address
from kilo_etcd.topology.segments import Topology


def weigh(
    traces: tuple[Trace, ...],
    source: str,
    plans: Plans,
    live: Live | None = None,
) -> tuple[Trace, ...]:
    """The traces from node `source` with what is known against their hops. `live`: what the hosts on the way have
    answered."""
    check = _HopCheck(plans, Live() if live is None else live)
    return tuple(evolve(_weighed(trace, source, check), asked=live is not None) for trace in traces)


@frozen
class _HopCheck:
    plans: Plans
    live: Live

    @property
    def topology(self) -> Topology:
        return self.plans.topology

    @property
    def statuses(self) -> Mapping[str, StatusRecord]:
        return self.plans.statuses

    def broken(self, step: Step) -> str:
        """Why packets do not arrive by a hop; empty: nothing is known."""
        source, target = step.source, step.target
        status = self.statuses.get(source)
        node = self.topology.snapshot.nodes.get(target)
        tunneled = step.medium == MEDIUM[Via.TUNNEL]
        at = {str(address) for address in node.mesh_addresses} if node is not None and tunneled else {step.over}
        for unreachable in status.unreachable if status is not None else ():
            if unreachable.node == target and unreachable.address in at:
                return f"{target} does not answer {source} at {unreachable.address}"
        if not tunneled:
            return ""
        for here, there in ((source, target), (target, source)):
            if any(about_partner(text) == there for text in self._errors(here)):
                return f"there is no tunnel between {here} and {there}, which are both behind NAT"
        if any(text.startswith(f"{NOTHING_BACK}{target},") for text in self._errors(source)):
            return f"nothing comes back to {source} from {target}"
        for here, there in ((source, target), (target, source)):
            reporting = self.statuses.get(here)
            if reporting is not None and there in reporting.unanswered:
                return f"{there} does not answer WireGuard of {here}"
        return self._no_session(source, target)

    def another_route(self, name: str, address: str) -> str:
        """The route by which a host's kernel takes packets for an address, if it is not the agent's; else empty."""
        answer = self.live.answers.get(name)
        routes = () if answer is None else answer.routes
        return next((route.route for route in routes if route.foreign and route.address == address), "")

    def cut(self, name: str, destination: IPAddress | None) -> bool:
        """Whether a host's firewall is known to drop packets for an address or the answers, and not for all."""
        answer = self.live.answers.get(name)
        texts = (*self._errors(name), *(answer.trouble if answer is not None else ()))
        return any(
            _in_one_of(certainly_dropped(text, self.plans[name].behind), destination)
            for text in texts
            if dropped_networks(text) is not None
        )

    def _no_session(self, source: str, target: str) -> str:
        by_node = tunnels(self.topology, self.live)
        ends: list[LiveTunnel] = [
            tunnel
            for here, there in ((source, target.removeprefix("peer ")), (target, source))
            for tunnel in by_node.get(here, ())
            if tunnel.other == there
        ]
        if not ends:
            missing = [(here, there) for here, there in ((source, target), (target, source)) if here in by_node]
            return "{} has no tunnel to {}".format(*missing[0]) if missing else ""
        if any(end.up for end in ends):
            return ""
        handshakes = [end.handshake for end in ends if end.handshake is not None]
        last = f"last handshake {ago(min(handshakes))} ago" if handshakes else "no handshake yet"
        dropped = f"; {DROPPED}" if self.topology.internal_ips is InternalIPs.ENCRYPTED else ""
        return f"the tunnel between {source} and {target} has no session: {last}{dropped}"

    def suspicion(self, name: str, destination: IPAddress | None, *, forwards: bool) -> str:
        """Why packets may not get through a host, which `forwards` them or is an end; empty: nothing is known."""
        if name not in self.topology.snapshot.nodes:
            return ""
        status = self.statuses.get(name)
        if status is None:
            return f"the agent of {name} does not report"
        if reasons := contradictions(name, status, self.topology):
            return f"{name} does not follow etcd: {reasons[0]}"
        structural = {problem.text for problem in self.plans[name].problems}
        errors = [
            text for text in status.errors if text not in structural and _concerns(text, destination, forwards=forwards)
        ]
        if errors:
            return f"{name} reports {'an error' if len(errors) == 1 else f'{len(errors)} errors'}"
        answer = self.live.answers.get(name)
        if answer is not None and (
            answer.undone or any(_concerns(text, destination, forwards=forwards) for text in answer.trouble)
        ):  # fmt: skip
            return f"{name} does not have all of its plan in force"
        return f"{name} has not answered in time" if name in self.live.silent else ""

    def _errors(self, name: str) -> tuple[str, ...]:
        status = self.statuses.get(name)
        return status.errors if status is not None else ()


_OF_NO_PACKET = (
    *("--", "metrics and health are not served", NAMES_TROUBLE, NOTHING_BACK),
    *STATE_TROUBLE, ETCD_INSIDE, CLOCK_WENT_BACK,
)  # fmt: skip
"""How errors begin that are about a flag, about the agent itself, its files or etcd, about the hosts file, or about an
exit node, which has a hop of its own. Of a clock that went back tell those that do not answer."""


def _concerns(error: str, destination: IPAddress | None, *, forwards: bool) -> bool:
    """Whether an agent's error may be about packets for this address. What concerns single pairs is weighed at their
    hops."""
    if error.startswith(_OF_NO_PACKET) or NOT_ENCAPSULATED in error or about_status_key(error):
        return False
    if about_partner(error) is not None or about_member(error) is not None:
        return False
    if (networks := dropped_networks(error)) is not None:
        return not networks or _in_one_of(networks, destination)
    if "forward" in error and not (forwards or error.startswith(NO_BASELINE)):
        return False
    with suppress(ValueError):
        return _in_one_of((ip_network(error.partition(" ")[0]),), destination)
    return True


def _in_one_of(networks: Iterable[IPNetwork], address: IPAddress | None) -> bool:
    return address is not None and is_within(address, networks)


def _weighed(trace: Trace, source: str, check: _HopCheck) -> Trace:
    there = _weighed_path(trace.there, check)
    back = None if trace.back is None else _weighed_path(trace.back, check)
    answer = check.live.answers.get(source)
    answered = answer is not None and there.destination in answer.reached
    unanswered = answer is not None and there.destination in answer.unreached
    routes = () if answer is None else (route for route in answer.routes if route.address == there.destination)
    if (route := next(iter(routes), None)) is not None:
        there = evolve(there, kernel_route=route.route)
    # Somebody else may have answered.
    strayed = any(step.foreign_route for path in (there, back) if path is not None for step in path.steps)
    # The route that takes them elsewhere is why.
    suspicion = f"none of the echo requests of {source} was answered" if unanswered and not strayed else ""
    return evolve(
        trace, there=there, back=back, answered=answered and not strayed, tried=answered or unanswered,
        suspicion=suspicion,
    )  # fmt: skip


def _weighed_path(path: TracedPath, check: _HopCheck) -> TracedPath:
    destination = _address(path.destination)
    steps: list[Step] = []
    for number, step in enumerate(path.steps, 1):
        broken = check.broken(step)
        forwards = _forwards(check.topology, path, number)
        trouble = broken or check.suspicion(step.target, destination, forwards=forwards)
        if not trouble and not steps:
            trouble = check.suspicion(step.source, destination, forwards=False)
        if not trouble and step.medium == MEDIUM[Via.TUNNEL] and step.source in check.topology.snapshot.nodes:
            trouble = unanswered(check.topology, step.source, step.target)
        route = check.another_route(step.source, path.destination)
        if route:
            trouble = f"the kernel of {step.source} sends it by another route than the agent's: {route}"
            broken = trouble if _ends_here(route) else ""
        elif not broken and (cut := next((n for n in (step.source, step.target) if check.cut(n, destination)), "")):
            broken = trouble = f"the firewall of {cut} drops what is for {path.destination}, or the answers"
        steps.append(evolve(step, trouble=trouble, broken=bool(broken), foreign_route=route))
    return evolve(path, steps=tuple(steps))


def _ends_here(route: str) -> bool:
    """Whether a route as `agent.probing.taken_routes` shows it leads no packet to another host."""
    return route.startswith("none: ") or route.split(" ")[1:2] == ["local"]


def _forwards(topology: Topology, path: TracedPath, number: int) -> bool:
    """Whether the host that the first `number` steps of a way lead to sends the packet on."""
    destination, node = _address(path.destination), topology.snapshot.nodes.get(path.steps[number - 1].target)
    return number < len(path.steps) or node is None or destination is None or not has_address(node, destination)


def _address(text: str) -> IPAddress | None:
    with suppress(ValueError):
        return ip_address(text)
    return None


def suspicions(
    traces: tuple[Trace, ...],
    topology: Topology,
    statuses: Mapping[str, StatusRecord],
    live: Live,
    names: Collection[str] | None = None,
) -> Iterator[tuple[str, str]]:
    """What the kernels of the hosts on the way lack for the traces, and why packets are lost there: (name, sentence).
    `names`: the hosts on the way; what others have answered tells at which of these packets are lost. None: all."""
    if live.refused:
        yield "-", f"the agents could not be asked: {live.refused}"
        return
    forwarders = {
        step.target
        for trace in traces
        for path in trace.paths
        for number, step in enumerate(path.steps, 1)
        if _forwards(topology, path, number)
    }
    destinations = [_address(path.destination) for trace in traces for path in trace.paths]
    far_ends = {trace.there.start for trace in traces}
    far_ends |= {trace.there.steps[-1].target for trace in traces if trace.there.steps}
    places = evidence(topology, statuses, live)
    whole = places.live
    live = whole.only(whole.answers.keys() if names is None else names)
    for name in live.silent:
        yield name, "its agent lives, but has not answered in time"
    for name, answer in sorted(live.answers.items()):
        if answer.undone:
            yield name, f"its kernel is {differs(answer)}"
        untested = answer.untested_obstacles if name in forwarders else ()
        # What a limit on echo requests drops is nothing that is wrong.
        meant = () if answer.limits_echoes else answer.refused
        own = (*answer.own_losses, *meant) if name in far_ends else ()
        for text in (*answer.trouble, *untested, *own):
            networks = dropped_networks(text)
            if not networks or names is None or any(_in_one_of(networks, address) for address in destinations):
                yield name, text
    used = {
        frozenset((step.source, step.target))
        for trace in traces
        for path in trace.paths
        for step in path.steps
        if step.medium == MEDIUM[Via.TUNNEL]
    }
    down = set()
    for pair in pairs(topology, tunnels(topology, live)):
        if pair.up is False and frozenset((pair.one, pair.other)) in used:
            down.add(frozenset((pair.one, pair.other)))
            yield pair.one, f"its tunnel to {pair.other} has no session: {pair.last}"
    silences = silence(topology, statuses, whole)
    unsettled = {*silences.apart, *silences.undecided}
    refused = partial(echo_refused, Plans(topology, statuses))

    def about(losses: Iterable[Loss | Cause]) -> Iterator[Loss | Cause]:
        return (loss for loss in losses if names is None or _is_about(loss.subject, topology, names))

    lost: list[Loss | Cause] = []
    astray = {name for trace in traces for path in trace.paths for name in _astray(path, live)}
    if names is None or astray or any(_is_lost(trace, live) for trace in traces):
        all_losses: tuple[Loss | Cause, ...] = (
            *shown(places),
            *causes(topology, silences),
            *losses(
                topology, whole, down, apart=unsettled, queries_answered=silences.queries_answered,
                explained=places.explains,
            ),
        )  # fmt: skip
        lost += about(all_losses)
    lost += about((*unsteady(topology, places.in_part), *narrow(topology, whole)))
    lost += internal_losses(topology, live, places, unsettled, explained=refused)
    for loss in lost:
        yield loss.subject, f"{loss.text}: {loss.remedy}"


def _is_lost(trace: Trace, live: Live) -> bool:
    """Whether the source of a trace got no answer."""
    answer = live.answers.get(trace.there.start)
    return answer is not None and trace.there.destination in answer.unreached


def _astray(path: TracedPath, live: Live) -> Iterator[str]:
    """The hosts on a way whose kernels send the packet elsewhere."""
    for name in dict.fromkeys(step.source for step in path.steps):
        answer = live.answers.get(name)
        if answer is not None and any(route.foreign and route.address == path.destination for route in answer.routes):
            yield name


def _is_about(subject: str, topology: Topology, names: Collection[str]) -> bool:
    """Whether all hosts that a loss is about are on the way, or it is about none."""
    nodes = topology.snapshot.nodes
    return all(name in names for name in subject.split(" - ") if name in nodes)
