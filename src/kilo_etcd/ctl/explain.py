"""`kgctl explain FROM TO`: the way of a packet through the mesh, there and back, step by step.

What it says follows from what etcd holds: each host's plan is computed as that host computes it, and the packet is
led through them (`topology.walk`). So it finds what is wrong with the mesh as it is meant to be, on the operator's
desk and without touching a host. What the agents on the way report as wrong, and which of them report nothing, is
added. With `--live` they are asked what their kernels have; a firewall or a broken link shows there as a tunnel without
a session.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from ipaddress import ip_address, ip_network
from types import MappingProxyType
from typing import Any

import click
from attrs import frozen

from kilo_etcd.ctl import complete
from kilo_etcd.ctl.arrivals import losses
from kilo_etcd.ctl.context import Failure, Mesh
from kilo_etcd.ctl.live import Live, differs, gather, pairs, tunnels
from kilo_etcd.ctl.output import output_option, show
from kilo_etcd.ctl.render import Table, clean, shown_location
from kilo_etcd.model import IPAddress, Snapshot
from kilo_etcd.store.records import StatusRecord
from kilo_etcd.topology.hostplan import HostPlan, Problem, Via
from kilo_etcd.topology.plan import host_plan
from kilo_etcd.topology.reach import Silent, Target, withhold
from kilo_etcd.topology.segments import Topology
from kilo_etcd.topology.walk import Hop, Path, walk

_MEDIUM = {Via.TUNNEL: "WireGuard", Via.UNDERLAY: "clear", Via.IPIP: "clear, in IPIP"}


_NO_STATUSES: Mapping[str, StatusRecord] = MappingProxyType({})


class Unknown(ValueError):
    """A name or an address that the mesh does not know; the message is one sentence."""


@frozen(kw_only=True)
class Step:
    """One hop, in words. `over` is where on the underlay the packet goes."""

    source: str
    target: str
    encrypted: bool
    medium: str
    over: str


@frozen(kw_only=True)
class Way:
    """A packet's way in one direction; `dropped` is empty where it arrives."""

    source: str
    destination: str
    steps: tuple[Step, ...]
    dropped: str = ""


@frozen(kw_only=True)
class Journey:
    """There and back in one family. `back` is None where the far end is not ours to ask."""

    there: Way
    back: Way | None = None
    unasked: str = ""
    """Why `back` is None, in a sentence."""

    @property
    def works(self) -> bool:
        """Whether nothing is dropped in either direction."""
        return not self.there.dropped and not (self.back is not None and self.back.dropped)


@frozen(kw_only=True)
class Explanation:
    """All that `kgctl explain` has to say. `remarks` are about the hosts on the way: (name, sentence)."""

    journeys: tuple[Journey, ...]
    remarks: tuple[tuple[str, str], ...] = ()
    live: tuple[tuple[str, str], ...] | None = None
    """What speaks against it in the kernels of the hosts on the way, likewise; None: they were not asked."""

    @property
    def works(self) -> bool:
        """Whether every journey works, as far as is known."""
        return all(journey.works for journey in self.journeys) and not self.live


class Plans(Mapping[str, HostPlan]):
    """The plan of every node, each computed when it is first asked for: a packet meets only a few.

    `statuses`: what the agents report; what they say is not reached they send nothing to.
    """

    def __init__(self, topology: Topology, statuses: Mapping[str, StatusRecord]) -> None:
        self._topology = topology
        self._statuses = statuses
        self._made: dict[str, HostPlan] = {}

    def __getitem__(self, name: str) -> HostPlan:
        if name not in self._made:
            if name not in self._topology.snapshot.nodes:
                raise KeyError(name)
            plan = host_plan(self._topology, name)
            self._made[name] = withhold(plan, self._topology, _silent(self._statuses.get(name)))
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._topology.snapshot.nodes)

    def __len__(self) -> int:
        return len(self._topology.snapshot.nodes)


def _silent(status: StatusRecord | None) -> tuple[Silent, ...]:
    found = []
    for one in status.unreachable if status is not None else ():
        with suppress(ValueError):
            target = Target(one.node, ip_address(one.address))
            if not one.routed:
                found.append(Silent(target=target, withheld=True, named=False))
    return tuple(found)


def explain(
    topology: Topology, source: str, target: str, statuses: Mapping[str, StatusRecord] = _NO_STATUSES
) -> tuple[Journey, ...]:
    """The journeys from node `source` to a node, a peer or an address, one for each family that they share.

    `statuses` are what the agents report, by node.

    Unknown: `source` is no node, or `target` is nothing that the mesh knows.
    """
    snapshot = topology.snapshot
    if source not in snapshot.nodes:
        raise Unknown(_no_node(snapshot, source))
    plans = Plans(topology, statuses)
    sender = snapshot.nodes[source]
    if not sender.mesh_addresses:
        raise Unknown(f"node {source} has no mesh address yet, so nothing can be sent from it")
    found = [
        _journey(topology, plans, source, own, destination)
        for destination in _destinations(snapshot, target)
        if (own := sender.mesh_address(destination.version)) is not None
    ]
    if not found:
        families = " and ".join(f"IPv{address.version}" for address in sender.mesh_addresses)
        raise Unknown(f"node {source} has {families} only, in which {target} has no address")
    return tuple(found)


def _no_node(snapshot: Snapshot, name: str) -> str:
    for aside in snapshot.set_aside:
        if aside.key.endswith(f"/nodes/{name}"):
            return f"node {name} is not in force: {aside.reason}"
    if name in snapshot.peers:
        return f"{name} is a peer; explain starts at a node, so ask the other way round: the answer's way is shown too"
    return f"there is no node {name}; kgctl status lists them"


def _destinations(snapshot: Snapshot, target: str) -> tuple[IPAddress, ...]:
    if target in snapshot.nodes:
        found = snapshot.nodes[target].mesh_addresses
        if not found:
            raise Unknown(f"node {target} has no mesh address yet")
        return found
    if target in snapshot.peers:
        allowed = snapshot.peers[target].allowed_ips
        if not allowed:
            raise Unknown(f"peer {target} has no allowed IPs, so nothing can be sent to it")
        return tuple({network.version: network.network_address for network in reversed(allowed)}.values())
    try:
        return (ip_address(target),)
    except ValueError:
        for aside in snapshot.set_aside:
            if aside.key.endswith((f"/nodes/{target}", f"/peers/{target}")):
                raise Unknown(f"{target} is not in force: {aside.reason}") from None
        raise Unknown(f"{target} is no node, no peer and no address; kgctl status lists them") from None


def _journey(topology: Topology, plans: Plans, source: str, own: IPAddress, destination: IPAddress) -> Journey:
    nodes = topology.snapshot.nodes
    path = walk(plans, topology, source, destination, sender=own)
    plan = plans[source]
    routed = any(destination in n for n in (*plan.routes, *plan.refused) if n.version == destination.version)
    if not routed and destination not in nodes[source].mesh_addresses:
        why = next((problem.text for problem in topology.problems if _about(problem, destination)), None)
        raise Unknown(
            f"{destination} is no part of the mesh: {source} sends it by its own routing table"
            + (f" ({why})" if why else "")
        )
    there = _way(path, source, own, destination, topology, plans)
    end = path.hops[-1].target if path.hops else source
    if path.dropped:
        return Journey(there=there, unasked="what does not arrive is not answered")
    if end not in nodes:
        return Journey(there=there, unasked=f"{end} answers by its own configuration, which is not in etcd")
    back = walk(plans, topology, end, own, sender=destination)
    return Journey(there=there, back=_way(back, end, destination, own, topology, plans))


def _about(problem: Problem, destination: IPAddress) -> bool:
    """Whether it says that a network with this address in it was left out; a default route holds nobody's."""
    with suppress(ValueError):
        network = ip_network(problem.subject)
        return bool(network.prefixlen) and network.version == destination.version and destination in network
    return False


def _way(
    path: Path, start: str, own: IPAddress, destination: IPAddress, topology: Topology, plans: Plans
) -> Way:  # fmt: skip
    return Way(
        source=f"{start} ({own})" if own in topology.snapshot.nodes[start].mesh_addresses else f"{own} at {start}",
        destination=str(destination),
        steps=tuple(_step(hop, topology, plans, destination) for hop in path.hops),
        dropped=path.dropped,
    )


def _step(hop: Hop, topology: Topology, plans: Plans, destination: IPAddress) -> Step:
    plan = plans[hop.source]
    if hop.peer is not None:
        endpoint = plan.peers[hop.peer].endpoint
        over = str(endpoint) if endpoint is not None else "the endpoint that its WireGuard has learnt"
    else:
        # The walker has taken the narrowest route; its gateway is the next node's internal IP.
        there = topology.snapshot.nodes[hop.target]
        gateways = {route.gateway for route in plan.routes.values() if route.gateway is not None}
        over = ", ".join(str(ip.ip) for ip in there.internal_ips if ip.ip in gateways) or str(destination)
    return Step(
        source=hop.source, target=hop.target, encrypted=hop.encrypted, medium=_MEDIUM[hop.medium], over=over
    )  # fmt: skip


def met(journeys: tuple[Journey, ...]) -> frozenset[str]:
    """The names on the way."""
    ways = [way for journey in journeys for way in (journey.there, journey.back) if way is not None]
    return frozenset(name for way in ways for step in way.steps for name in (step.source, step.target))


def ends(journeys: tuple[Journey, ...], snapshot: Snapshot) -> tuple[str, ...]:
    """The mesh addresses of the nodes that the journeys begin and end at and pass, which the hosts on the way try."""
    nodes = [snapshot.nodes[name] for name in sorted(met(journeys) & snapshot.nodes.keys())]
    return tuple(str(address) for node in nodes for address in node.mesh_addresses)


def doubts(journeys: tuple[Journey, ...], topology: Topology, live: Live) -> tuple[tuple[str, str], ...]:
    """What the kernels of the hosts on the way say against the journeys: (name, sentence)."""
    if live.refused:
        return (("-", f"the hosts could not be asked: {live.refused}"),)
    found = [(name, "its agent lives, but has not answered in time") for name in live.silent]
    for name, answer in sorted(live.answers.items()):
        if answer.undone:
            found.append((name, f"its kernel is {differs(answer)}"))
        found.extend((name, text) for text in answer.trouble)
    used = {
        frozenset((step.source, step.target))
        for journey in journeys
        for way in (journey.there, journey.back)
        if way is not None
        for step in way.steps
        if step.medium == _MEDIUM[Via.TUNNEL]
    }
    down = set()
    for pair in pairs(topology, tunnels(topology, live)):
        if pair.up is False and frozenset((pair.one, pair.other)) in used:
            down.add(frozenset((pair.one, pair.other)))
            found.append((pair.one, f"its tunnel to {pair.other} has no session: {pair.last}"))
    found.extend((loss.subject, f"{loss.text}: {loss.remedy}") for loss in losses(topology, live, down))
    return tuple(dict.fromkeys(found))


@click.command(
    "explain",
    epilog="Examples:\n\n\b\n  kgctl explain node-1 node-7\n  kgctl explain node-1 node-7 --live\n"
    "  kgctl explain node-1 10.9.0.2 -o json",
)
@click.argument("source", metavar="FROM", shell_complete=complete.nodes)
@click.argument("target", metavar="TO", shell_complete=complete.ends)
@click.option("--live", is_flag=True, help="Ask the hosts on the way whether their kernels hold what they should.")
@output_option
@click.pass_obj
def explain_command(mesh: Mesh, source: str, target: str, output: str, live: bool) -> None:
    """Show the way of a packet from node FROM to a node, a peer or an address, and back.

    It follows from what etcd holds. Exit status 1: something on the way would drop the packet, or, with --live, a host
    there differs.
    """
    from kilo_etcd.ctl.report import remarks_on
    from kilo_etcd.ctl.status import look

    looked = mesh.ask(look)
    snapshot = looked.topology.snapshot
    try:
        journeys = explain(looked.topology, source, target, looked.statuses)
    except Unknown as error:
        raise Failure(str(error)) from None
    names = met(journeys) | {source} | ({target} if target in snapshot.nodes else set())
    against, tried = None, False
    if live:
        living = names & looked.statuses.keys()
        said = mesh.ask(partial(gather, names=living, targets=ends(journeys, snapshot)))
        against = doubts(journeys, looked.topology, said)
        answer, far = said.answers.get(source), snapshot.nodes.get(target)
        addresses = {target} if far is None else set(map(str, far.mesh_addresses))
        if answer is not None:
            if not against and (lost := sorted(addresses.intersection(answer.unreached))):
                # Its agent does not live, or was not asked.
                against = ((source, f"{target} does not answer its echo requests at {', '.join(lost)}: is it up?"),)
            tried = bool(addresses.intersection(answer.reached))
    found = Explanation(journeys=journeys, remarks=remarks_on(looked.report(about=names), names), live=against)
    if output == "json":
        click.echo(explanation_json(found))
    else:
        for journey in found.journeys:
            show(journey_tables(journey, snapshot), journey_heading(journey))
            click.echo()
        if found.remarks:
            show([Table("Hosts on the way", ("NODE", "REMARK"), tuple((clean(n), clean(t)) for n, t in found.remarks))])
        if found.live:
            rows = tuple((clean(n), clean(t)) for n, t in found.live)
            show([Table("What their kernels say against it", ("NODE", "REMARK"), rows)])
        elif found.live is not None:
            arrive = ", and packets arrive" if tried else f"; whether packets arrive was not tried by {source}"
            click.echo(f"The kernels of the hosts on the way hold what they should{arrive}.")
    if not found.works:
        raise SystemExit(1)


def journey_heading(journey: Journey) -> str:
    """The outcome in one line."""
    there, back = journey.there, journey.back
    if there.dropped:
        return f"{there.source} to {there.destination}: dropped on the way there: {there.dropped}"
    if back is None:
        return f"{there.source} to {there.destination}: arrives; {journey.unasked}"
    if back.dropped:
        return f"{there.source} to {there.destination}: arrives, but the answer is dropped: {back.dropped}"
    same = tuple((s.target, s.source, s.medium) for s in reversed(back.steps))
    way = (
        "the answer takes the same way"
        if same == tuple((s.source, s.target, s.medium) for s in there.steps)
        else "the answer takes another way"
    )
    return f"{there.source} to {there.destination}: arrives; {way}"


def journey_tables(journey: Journey, snapshot: Snapshot) -> Iterator[Table]:
    """The steps there and back, as tables."""
    for title, way in (("There", journey.there), ("Back", journey.back)):
        if way is None or not (way.steps or way.dropped):
            continue
        rows = [
            (
                str(number),
                _called(step.source, snapshot),
                _called(step.target, snapshot),
                "yes" if step.encrypted else "no",
                step.medium,
                step.over,
            )
            for number, step in enumerate(way.steps, 1)
        ]
        if way.dropped:
            rows.append((str(len(rows) + 1), "", "dropped", "", "", clean(way.dropped)))
        yield Table(title, ("HOP", "FROM", "TO", "ENCRYPTED", "HOW", "TO ADDRESS"), tuple(rows))


def _called(name: str, snapshot: Snapshot) -> str:
    node = snapshot.nodes.get(name)
    return clean(name) if node is None else f"{clean(name)} [{shown_location(node.location)}]"


def explanation_json(found: Explanation) -> str:
    """The explanation as JSON; stable (docs/kgctl.md)."""

    def way(value: Way | None) -> dict[str, Any] | None:
        if value is None:
            return None
        return {
            "source": value.source,
            "destination": value.destination,
            "arrives": not value.dropped,
            "dropped": value.dropped or None,
            "hops": [
                {"from": s.source, "to": s.target, "encrypted": s.encrypted, "how": s.medium, "address": s.over}
                for s in value.steps
            ],
        }

    return json.dumps(
        {
            "works": found.works,
            "journeys": [
                {"works": j.works, "there": way(j.there), "back": way(j.back), "unasked": j.unasked or None}
                for j in found.journeys
            ],
            "remarks": [{"node": name, "text": text} for name, text in found.remarks],
            "live": None if found.live is None else [{"node": name, "text": text} for name, text in found.live],
        },
        indent=2,
        ensure_ascii=False,
    )
