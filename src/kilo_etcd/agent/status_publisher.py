"""How this host is, put together from the parts that know, for its status, its log and its metrics."""

from __future__ import annotations

from collections.abc import Callable

from kilo_etcd.agent.config import AgentConfig
from kilo_etcd.agent.etcd_trouble import EtcdTrouble
from kilo_etcd.agent.host_state import HostState
from kilo_etcd.agent.leader_hints.service import PeerQueryService
from kilo_etcd.agent.metrics import Metrics
from kilo_etcd.agent.namesakes import Namesakes
from kilo_etcd.agent.probing.reachability import Reachability
from kilo_etcd.agent.registration import HostRegistration
from kilo_etcd.agent.status import State, StatusReporter
from kilo_etcd.agent.troubles import HostTrouble, Troubles
from kilo_etcd.model import PEER_QUERY_PORT, Snapshot
from kilo_etcd.planning.exit_node import BYPASSES
from kilo_etcd.runtime.logs import Once
from kilo_etcd.runtime.unanswered_peers import UnansweredPeers
from kilo_etcd.store.mirror import Mirror
from kilo_etcd.store.records import Unreachable
from kilo_etcd.store.status_texts import FORWARDING_LOOK, WAS_DEMOTED
from kilo_etcd.topology.mesh_settings import disagreements

MOST_LISTED = 64
"""Members that do not answer, and exemptions, in the status."""

DEMOTED = (
    f"for some minutes it leads only if no other node can. Look for {FORWARDING_LOOK}, or blocks UDP 51820 (--port), "
    "or for an endpoint at which others do not reach it (kgctl node show); once that is mended, restart the agent to "
    "clear it now: systemctl restart kilo-etcd"
)
"""What follows for a host that was demoted, and what to do."""


class StatusPublisher:
    """Writes the status of this host to etcd. `snapshot` gives the one that is to be in force, `state` what is;
    `leaving` says whether the agent was asked to stop."""

    def __init__(
        self,
        config: AgentConfig,
        reporter: StatusReporter,
        troubles: Troubles,
        once: Once,
        metrics: Metrics,
        *,
        etcd_trouble: EtcdTrouble,
        registration: HostRegistration,
        namesakes: Namesakes,
        reachability: Reachability | None,
        peer_queries: PeerQueryService,
        snapshot: Callable[[], Snapshot | None],
        state: Callable[[], HostState],
        leaving: Callable[[], bool],
    ) -> None:
        self._config, self._reporter, self._troubles, self._once = config, reporter, troubles, once
        self._metrics, self._etcd_trouble, self._registration = metrics, etcd_trouble, registration
        self._namesakes, self._reachability, self._peer_queries = namesakes, reachability, peer_queries
        self._snapshot, self._state, self._leaving = snapshot, state, leaving
        self._clear = tuple(map(str, config.clear)) if len(config.clear) <= MOST_LISTED else None
        self._peer_query_port = config.peer_query_port if config.peer_query_port != PEER_QUERY_PORT else None
        self.unanswered = UnansweredPeers()
        """The peers that do not answer although WireGuard sends to them."""

    async def run(self) -> None:
        """Write what is published, until cancelled."""
        await self._reporter.run()

    def publish(self, snapshot: Snapshot) -> None:
        """Publish how this host is, next to what `snapshot` has."""
        current, reachability = self._state(), self._reachability
        state = State(
            role=current.role,
            revision=current.revision,
            failures=current.failures,
            errors=self._troubles.all(),
            programmed=current.programmed,
            address=self._registration.address,
            unreachable=self._unreachable(),
            unsigned=() if reachability is None else reachability.unsigned[:MOST_LISTED],
            unanswered=self.unanswered.nodes[:MOST_LISTED],
            unanswered_peers=self.unanswered.peers[:MOST_LISTED],
            answers=self._peer_queries.answers,
            peer_query_port=self._peer_query_port,
            clear=self._clear,
            without_etcd=self._etcd_trouble.without_etcd(),
        )
        self._reporter.publish(snapshot, state, leaving=self._leaving())

    def publish_again(self) -> None:
        """The status has changed by itself."""
        if (snapshot := self._snapshot()) is not None and self._state().role is not None:
            self.publish(snapshot)

    def _unreachable(self) -> tuple[Unreachable, ...]:
        silent = () if self._reachability is None else self._reachability.silent
        named = (
            Unreachable(member.target.node, str(member.target.address), not member.withheld)
            for member in silent
            if member.named
        )
        return tuple(sorted(named))[:MOST_LISTED]

    def note_snapshot(self, snapshot: Snapshot) -> None:
        """Report what is wrong in the snapshot that is about to be applied."""
        self._once.errors("rejected", snapshot.rejected, noun="rejected records", revision=snapshot.revision)
        config = self._config
        differing = disagreements(
            snapshot,
            granularity=config.mesh_granularity,
            subnets=config.wanted_subnets,
            internal_ips=config.internal_ips,
        )
        self._troubles.keep(HostTrouble.SETTINGS, differing)
        self._once.errors("names", self._namesakes.look())
        self._metrics.snapshot(snapshot)

    def note_unanswered(self, unanswered: UnansweredPeers) -> None:
        """These do not answer now."""
        self.unanswered = unanswered
        # A phone that sleeps is nothing to warn of.
        for kind, names, level in (("node", unanswered.nodes, "warning"), ("peer", unanswered.peers, "info")):
            self._metrics.unanswered.labels(kind).set(len(names))
            self._once.errors(
                f"unanswered {kind}",
                tuple(f"{kind} {name} does not answer, although WireGuard sends to it" for name in names),
                level=level,
            )
        self.publish_again()

    async def follow_outages(self, mirror: Mirror) -> None:
        """Have the status say when etcd is not trusted or cannot be read, and when it is followed again: the plan stays
        what it was. Until cancelled."""
        outage: str | None = None
        while True:
            outage = await mirror.wait_outage_change(outage)
            if (snapshot := self._snapshot()) is not None and self._state().topology is not None:
                self.publish(snapshot)


def demotion(why: str | None) -> str | None:
    """The sentence on this host's hold-down, of which `why` is the reason; None: there is none."""
    return why and f"{WAS_DEMOTED} {why}; {DEMOTED}"


def exit_node_failure(name: str, sentence: str | None) -> str | None:
    """What to say of the exit node of node `name`, given the monitor's sentence; None: it answers."""
    return sentence and (
        f"{sentence}, so nothing leaves this host but for {BYPASSES}: is it up, does UDP reach "
        f"it? else kgctl annotate {name} exit-node=ANOTHER, or exit-node-"
    )
