"""From key-values to the `Snapshot`: pure, and one change at a time.

A `View` holds what etcd holds under the prefix and keeps the joined values up to date: labels and annotations are
applied to their nodes, address claims are joined in, contradicting records are found. A change costs what it
touches (the node it concerns, plus one copy of the node table), and a node that a change does not concern is the same
object in the next snapshot.

The invariant (docs/design.md, "What must always hold"): a snapshot depends only on what etcd holds at its revision, not
on how the view got there; agents at one revision agree. From it follows what happens to a record that was good and
turns bad: it is left out, although the last good version is at hand, because an agent that started later never saw that
version and would disagree. The mesh's own settings are the exception: there the alternative to the last good value is a
default that would tear the whole mesh down, so the last good one is kept, and an agent that starts later looks it up
in etcd's history (`store.history`). The same holds when one of them is deleted. If nothing says what `internal-ips`
was, neither memory nor history, it follows from the node records of the same revision: a mesh with a node that takes
part in `encrypted` encrypts, so that a misspelt value and a compaction together let no node send in clear.

What is not in force is named, one by one, in `Snapshot.rejected`:

* records that cannot be read, and keys under the prefix that are none of ours;
* candidacies, leader records, probe reports and observed endpoints under no lease, which would outlive their host;
* unknown fields, alone; the whole record of a peer if it is most likely a known one mistyped (decision 0039);
* a public key that is another's: of two nodes, and of two peers, the one with the older record keeps it, and a node
  that is in force keeps it against every peer (`store.duplicate_keys`, decision 0024);
* annotations with bad values: the node is as it would be without them;
* address claims outside the mesh's subnets, and those of an address that somebody claimed before (`store.addresses`);
* a `mesh/subnets` that most nodes' addresses are not in.

Of a value that is rejected whole nothing is kept but the reason, so that what nobody uses fills no memory.

A node that has claimed no address yet is joining: it is left out silently. The annotations `subnets` and
`force-*` replace what the node's record says. The topology decides which owner gets a network that two offer
(`topology.prefix_allocation`), which knows locations and peers too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TypeVar

from attrs import evolve, frozen

from kilo_etcd.base.mappings import Changed, copied
from kilo_etcd.base.quoting import shown_name
from kilo_etcd.etcd.api import Event, EventType, Header, KeyValue
from kilo_etcd.model import (
    ACCEPTING,
    Candidate,
    Granularity,
    InternalIPs,
    IPAddress,
    IPInterface,
    IPNetwork,
    Node,
    ObservedEndpoint,
    Peer,
    ProbeReport,
    RejectedRecord,
    Snapshot,
)
from kilo_etcd.model.snapshot import REST_IN_FORCE
from kilo_etcd.store import keys as k
from kilo_etcd.store.addresses import AddressIndex, Claimant, place
from kilo_etcd.store.annotations import ANNOTATIONS, Registered, join, join_peer
from kilo_etcd.store.duplicate_keys import KeyIndex, KeyOwner
from kilo_etcd.store.raw_key_values import RawKeyValues
from kilo_etcd.store.records import (
    MAX_ANNOTATION,
    MAX_PROBE_REPORT,
    MAX_SMALL,
    PEER_FIELDS,
    CandidateRecord,
    NodeRecord,
    ObservedEndpointRecord,
    ProbeReportRecord,
    Read,
    RecordError,
    decode_granularity,
    decode_internal_ips,
    decode_label,
    decode_subnets,
    decode_text,
    read,
    read_peer,
    rejected,
)

R = TypeVar("R")
V = TypeVar("V")

_WITHOUT_VALUE = (k.AddressKey, k.ReservationKey, k.PeerAddressKey, k.LeaderKey)
"""Keys that say all by being there; whatever value they have counts for nothing."""

_MOST_SHOWN = 1000
"""Characters of a key that nobody knows."""


@frozen(kw_only=True)
class Holdings:
    """All that a view is made of: to be kept, and made a view of again later. Two of one mesh at one revision differ in
    nothing but the order of `kvs`."""

    header: Header
    """Dates the key-values: its revision is that of the last change."""
    kvs: tuple[KeyValue, ...]
    granularity: Granularity | None
    """What is in force, which may be better than what `kvs` say."""
    subnets: tuple[IPNetwork, ...]
    internal_ips: InternalIPs | None = None

    def snapshot(self, keys: k.Keys) -> Snapshot:
        """What is in force by these key-values under the prefix of `keys`."""
        view = View(keys, granularity=self.granularity, subnets=self.subnets or None, internal_ips=self.internal_ips)
        view.load(self.kvs, self.header)
        return view.snapshot()


def newest(kvs: Iterable[KeyValue]) -> tuple[bytes, int] | None:
    """The key among `kvs` that was written last, and its mod revision; None: there is none."""
    kv = max(kvs, key=lambda kv: kv.mod_revision, default=None)
    return None if kv is None else (kv.key, kv.mod_revision)


class View:
    """What etcd holds under the prefix of `keys`, joined. `granularity`, `subnets` and `internal_ips` are what is in
    force for as long as etcd's own values cannot be read."""

    def __init__(
        self,
        keys: k.Keys,
        *,
        granularity: Granularity | None = None,
        subnets: tuple[IPNetwork, ...] | None = None,
        internal_ips: InternalIPs | None = None,
    ) -> None:
        self._keys = keys
        self._kvs = RawKeyValues()
        self.revision = 0
        self.header = Header()
        self.granularity = granularity
        self.subnets = subnets
        self.internal_ips = internal_ips
        self._internal_ips_since = 0
        # What each key says, by name.
        self._registered: dict[str, Registered] = {}
        self._labels: dict[str, str] = {}
        self._annotations: dict[str, dict[str, str]] = {}
        self._encrypting: set[str] = set()
        """Nodes whose records say that they take part in `encrypted`."""
        self._addresses = AddressIndex()
        self._silent: set[str] = set()
        """Nodes whose records state no address."""
        self._subnets_stated: tuple[IPNetwork, ...] = ()
        """By etcd's value; empty: it is missing, or not valid."""
        self._subnets_in_force = subnets or ()
        self._peer_records: dict[str, Peer] = {}
        self._elections: dict[str, dict[str, Candidate]] = {}
        self._leaders: dict[str, dict[str, int]] = {}
        """Location -> the nodes that led it, each with the revision at which it said so last."""
        self._observers: dict[str, dict[str, ObservedEndpoint]] = {}
        self._subjects: dict[str, set[str]] = {}
        """Observer -> the subjects of its observed endpoints."""
        self._probers: dict[str, dict[str, ProbeReport]] = {}
        self._faulty: dict[str, set[bytes]] = {}
        """Node -> keys that its agent alone may write, under a lease, and that are under none or hold what cannot be
        read."""
        self._key_index = KeyIndex()
        self._aside: dict[object, tuple[RejectedRecord, ...]] = {}  # raw key, owner or place
        # What has changed since the last snapshot.
        self._dirty: set[KeyOwner] = set()
        self._dirty_elections: set[str] = set()
        self._dirty_leaders: set[str] = set()
        self._dirty_observed_endpoints: set[str] = set()
        self._dirty_probe_reports: set[str] = set()
        self._dirty_aside = False
        # What the last snapshot gave out: replaced, never changed.
        self._nodes: Mapping[str, Node] = {}
        self._nodes_changed: Changed[str, Node] | None = None
        self._peers: Mapping[str, Peer] = {}
        self._candidates: Mapping[str, tuple[Candidate, ...]] = {}
        self._leaders_given: Mapping[str, tuple[str, ...]] = {}
        self._observed_endpoints: Mapping[str, tuple[ObservedEndpoint, ...]] = {}
        self._probe_reports: Mapping[str, tuple[ProbeReport, ...]] = {}
        self._rejected: tuple[RejectedRecord, ...] = ()

    # --- taking in ---------------------------------------------------------------------------------------------

    def load(self, kvs: Iterable[KeyValue], header: Header) -> bool:
        """The view becomes the listing. Returns whether anything differed; if nothing did, the revision stays too."""
        listed = {kv.key: kv for kv in kvs}
        changed = self.revision == 0 or header.revision < self.revision or header.cluster_id != self.header.cluster_id
        for key in self._kvs.keys() - listed.keys():
            self._delete(key)
            changed = True
        for key, kv in listed.items():
            held = self._kvs.get(key)
            # What is kept of a rejected value is compared with what would be kept of this one.
            if held != kv and self._put(kv) != held:
                changed = True
        for setting in self._keys.settings:
            # Known from elsewhere, the value is missed all the same.
            if (raw := setting.encode()) not in listed:
                self._read(raw, None)
        # `subnets` may have been known from elsewhere.
        self._count_subnets()
        if changed:
            self.revision = header.revision
        self.header = header
        return changed

    def apply(self, events: Iterable[Event], header: Header) -> bool:
        """Take in events in revision order, skipping those that the view has seen. Returns whether any was news."""
        old_revision, newest = self.revision, self.revision
        for event in events:
            if event.kv.mod_revision <= old_revision:
                continue
            newest = max(newest, event.kv.mod_revision)
            if event.type is EventType.PUT:
                self._put(event.kv)
            else:
                self._delete(event.kv.key)
        self.revision = newest
        self.header = header
        return newest != old_revision

    def recall(
        self,
        *,
        granularity: Granularity | None = None,
        subnets: tuple[IPNetwork, ...] | None = None,
        internal_ips: InternalIPs | None = None,
    ) -> None:
        """These are in force, as far as they are given: etcd's history says so where its values are nonsense."""
        self.granularity = granularity or self.granularity
        self.internal_ips = internal_ips or self.internal_ips
        if subnets:
            self._set_subnets(subnets)

    def holder(self, address: IPAddress) -> Claimant | None:
        """Who has a mesh address; None: nobody."""
        return self._addresses.holder(address)

    def free(self, address: IPAddress) -> bool:
        """Whether nobody claims a mesh address, and no record states it."""
        return self._addresses.free(address)

    def claimed_by(self, claimant: Claimant) -> tuple[IPAddress, ...]:
        """The mesh addresses that somebody claims, whether it has them or not."""
        return self._addresses.claimed_by(claimant)

    def nodes_with_key(self, public_key: str) -> tuple[str, ...]:
        """The nodes whose records have a public key, the one that keeps it first."""
        return self._key_index.nodes(public_key)

    def observed_by(self, observer: str) -> frozenset[str]:
        """The nodes and peers whose endpoints a node says it has observed."""
        return frozenset(self._subjects.get(observer, ()))

    def faulty(self, node: str) -> frozenset[str]:
        """The keys in the name of a node that would have to be under one of its leases, and are under none or hold what
        cannot be read, all of it or a part."""
        return frozenset(key.decode(errors="replace") for key in self._faulty.get(node, ()))

    def kv(self, key: str | bytes) -> KeyValue | None:
        """The raw key-value, readable or not."""
        return self._kvs.get(key.encode() if isinstance(key, str) else key)

    def kvs(self, prefix: str) -> tuple[KeyValue, ...]:
        """The raw key-values under a prefix, sorted by key."""
        return self._kvs.below(prefix.encode())

    def newest(self) -> tuple[bytes, int] | None:
        """The key that was written last of those that are there, and its mod revision; None: there is none."""
        return newest(self._kvs.values())

    def holdings(self) -> Holdings:
        """What the view holds now."""
        return Holdings(
            header=evolve(self.header, revision=self.revision),
            kvs=tuple(self._kvs.values()),
            granularity=self.granularity,
            subnets=self.subnets or (),
            internal_ips=self.internal_ips,
        )

    # --- giving out --------------------------------------------------------------------------------------------

    def snapshot(self) -> Snapshot:
        """What is in force at `revision`."""
        if self._dirty and self._addresses.disputed(self.subnets or ()):
            # The holders of addresses, and the number of records, count then.
            self._count_subnets()
        self._note_subnets()
        self._note_internal_ips()
        self._join_all()
        return Snapshot(
            revision=self.revision,
            cluster_id=self.header.cluster_id,
            raft_term=self.header.raft_term,
            granularity=self.granularity or Granularity.LOCATION,
            subnets=self._subnets_in_force,
            internal_ips=self._internal_ips_in_force,
            internal_ips_since=self._internal_ips_since,
            nodes=self._nodes,
            peers=self._peers,
            candidates=self._candidates,
            leaders=self._leaders_given,
            observed_endpoints=self._observed_endpoints,
            probe_reports=self._probe_reports,
            rejected=self._rejected,
            nodes_changed=self._nodes_changed,
        )

    def _join_all(self) -> None:
        nodes, peers = copied(self._nodes), copied(self._peers)
        nodes_changed, peers_changed = set[str](), False
        while self._dirty:
            owner = self._dirty.pop()
            kind, name = owner
            if kind == "node":
                before = nodes.get(name)
                if _replace(nodes, name, self._join_node(name, nodes)):
                    nodes_changed.add(name)
                if (before is None) != (name not in nodes):
                    self._dirty |= self._key_index.peers(owner)
                if name in self._subjects and _public(before) != _public(nodes.get(name)):
                    # What it says of others counts now, or no more.
                    self._dirty |= {(kind, subject) for subject in self._subjects[name] for kind in ("node", "peer")}
            else:
                peers_changed |= _replace(peers, name, self._join_peer(name, nodes))
        if nodes_changed:
            self._nodes_changed = Changed(self._nodes, nodes, frozenset(nodes_changed))
            self._nodes = nodes
        if peers_changed:
            self._peers = peers
        self._candidates = _renewed(self._candidates, self._elections, self._dirty_elections)
        self._observed_endpoints = _renewed(self._observed_endpoints, self._observers, self._dirty_observed_endpoints)
        self._probe_reports = _renewed(self._probe_reports, self._probers, self._dirty_probe_reports)
        if self._dirty_leaders:
            leaders = dict(self._leaders_given)
            for location in self._dirty_leaders:
                since = self._leaders.get(location, {})
                newest = sorted((-revision, name) for name, revision in since.items())
                _replace(leaders, location, tuple(name for _, name in newest) or None)
            self._leaders_given = leaders
            self._dirty_leaders.clear()
        if self._dirty_aside:
            self._rejected = tuple(
                sorted((note for notes in self._aside.values() for note in notes), key=lambda n: (n.key, n.reason))
            )
            self._dirty_aside = False

    def _observed(self, name: str, nodes: Mapping[str, Node]) -> Iterable[ObservedEndpoint]:
        """The observed endpoints of a node or peer by observers that count."""
        return (observed for observed in self._observers.get(name, {}).values() if observed.counts(nodes))

    def _join_node(self, name: str, nodes: Mapping[str, Node]) -> Node | None:
        owner: KeyOwner = ("node", name)
        registered = self._registered.get(name)
        if registered is None:
            self._note(owner, ())
            return None
        annotated, wrong = registered.annotated(self._annotations.get(name, {}))
        notes = [RejectedRecord(self._keys.annotation(name, annotation), text) for annotation, text in wrong.items()]
        keeper = self._key_index.keeper("node", owner)
        if keeper != name:
            text = (
                f"its public key is that of node {keeper}, whose record is older: {keeper} keeps it; give this host a "
                f"key of its own (stop the agent, remove its key file, start it), or, if {keeper} should not be in the "
                f"mesh, stop its agent and run kgctl node forget {keeper}"
            )
            notes.append(RejectedRecord(self._keys.node(name), text, name))
        notes += (RejectedRecord(self._keys.node(name), text, name) for text in self._addresses.wrong_statements(name))
        self._note(owner, notes)
        addresses = self._addresses.of(name, self._subnets_in_force)
        if keeper != name or not addresses:
            return None
        return join(
            name,
            registered,
            annotated,
            label=self._labels.get(name),
            addresses=addresses,
            observed_endpoints=self._observed(name, nodes),
        )

    def _join_peer(self, name: str, nodes: Mapping[str, Node]) -> Peer | None:
        owner: KeyOwner = ("peer", name)
        node, keeper = self._key_index.keeper("node", owner), self._key_index.keeper("peer", owner)
        text = ""
        if node is not None and node in nodes:
            text = f"its public key is that of node {node}, which keeps it; give the peer a key of its own"
        elif keeper not in (None, name):
            text = (
                f"its public key is that of peer {keeper}, whose record is older: {keeper} keeps it; give this peer "
                f"a key of its own, or remove the older record with kgctl peer remove {keeper}"
            )
        self._note(owner, [RejectedRecord(self._keys.peer(name), text)] if text else ())
        peer = None if text else self._peer_records.get(name)
        return None if peer is None else join_peer(peer, self._observed(name, nodes))

    # --- one key at a time -------------------------------------------------------------------------------------

    def _put(self, kv: KeyValue) -> KeyValue:
        """What is kept of it: of a value that is not in force no more than the reason, and none where none counts."""
        reason = self._read(kv.key, kv)
        if reason is not None:
            kv = evolve(kv, value=rejected(kv.value, reason))
        elif kv.value and isinstance(self._keys.parse(kv.key), _WITHOUT_VALUE):
            kv = evolve(kv, value=b"")
        self._kvs.put(kv)
        return kv

    def _delete(self, key: bytes) -> None:
        if self._kvs.remove(key):
            self._read(key, None)

    def _note(self, source: object, notes: Iterable[RejectedRecord]) -> None:
        rejected = tuple(notes)
        if self._aside.get(source, ()) != rejected:
            self._dirty_aside = True
            if rejected:
                self._aside[source] = rejected
            else:
                del self._aside[source]

    def _read(self, key: bytes, kv: KeyValue | None) -> str | None:
        """Take in what stands at a key now; why none of it is in force, or None."""
        parsed = self._keys.parse(key)
        notes: Sequence[str] = ()
        reason: str | None = None
        if parsed is None:
            if kv is not None:
                reason = self._keys.hint(key)
                notes = (reason,)
        else:
            if isinstance(parsed, k.NodeKey):
                # Whether it can be read or not.
                created = None if kv is None else kv.create_revision
                self._note_kept(parsed.node, self._addresses.register(parsed.node, created))
            try:
                self._check_lease(parsed, kv, key)
                notes = self._decode_into_table(parsed, kv)
            except RecordError as error:
                self._decode_into_table(parsed, None)
                reason = str(error)
                notes = (reason,)
        if notes or key in self._aside:
            author = k.written_by(parsed) or ""
            self._note(key, (RejectedRecord(_shown(key), note, author) for note in notes))
            if (node := k.ends_with(parsed)) is not None:
                self._note_faulty(node, key, faulty=bool(notes))
        return reason

    def _note_faulty(self, node: str, key: bytes, *, faulty: bool) -> None:
        # Changed in place: of one node there may be thousands.
        keys = self._faulty.setdefault(node, set())
        if faulty:
            keys.add(key)
        else:
            keys.discard(key)
        if not keys:
            del self._faulty[node]

    def _check_lease(self, parsed: k.ParsedKey, kv: KeyValue | None, key: bytes) -> None:
        """RecordError for a value that would outlive its host: it would count until an operator deletes it."""
        author = k.ends_with(parsed)
        if author is not None and kv is not None and not kv.lease:
            raise RecordError(
                f"it is under no lease, so no agent keeps it; the agent of {author} writes it under a lease, and "
                f"restores or deletes it if it runs; else delete it: etcdctl del {_shown(key)}"
            )

    def _decode_into_table(self, parsed: k.ParsedKey, kv: KeyValue | None) -> Sequence[str]:
        """One key's value into its table (None: out of it). RecordError before anything has changed."""
        value = None if kv is None else kv.value
        match parsed:
            case k.NodeKey(node):
                return self._take_node(node, kv)
            case k.PeerKey(name):
                return self._take_peer(name, kv)
            case k.LocationKey(node):
                _replace(self._labels, node, None if value is None else decode_label(value))
                self._dirty.add(("node", node))
            case k.AnnotationKey(node, name):
                return self._take_annotation(node, name, value)
            case k.AddressKey(node, address):
                self._take_claim(address, ("node", node), kv)
            case k.ReservationKey(node):
                reserved = kv.create_revision if kv is not None and kv.lease else None
                self._note_kept(node, self._addresses.reserve(node, reserved))
            case k.PeerAddressKey(peer, address):
                self._take_claim(address, ("peer", peer), kv)
            case k.ElectionKey(location, node):
                return self._take_candidate(location, node, kv)
            case k.LeaderKey(location, node):
                led = dict(self._leaders.get(location, {}))
                _replace(led, node, None if kv is None else kv.mod_revision)
                _replace(self._leaders, location, led or None)
                self._dirty_leaders.add(location)
            case k.EndpointKey(name, observer):
                return self._take_observed_endpoint(name, observer, kv)
            case k.ProbeReportKey(location, prober):
                return self._take_probe_report(location, prober, kv)
            case k.AdoptedKey():
                # Read by whoever holds on to another etcd (`store.mirror`).
                if value is not None:
                    decode_text(value, MAX_SMALL)
            case k.GranularityKey():
                return self._take_granularity(value)
            case k.SubnetsKey():
                return self._take_subnets(value)
            case k.InternalIPsKey():
                return self._take_internal_ips(kv)
        return ()

    def _take_node(self, node: str, kv: KeyValue | None) -> Sequence[str]:
        self._dirty.add(("node", node))
        if kv is None:
            if self._registered.pop(node, None) is not None:
                self._note_claims_of(node)
            self._encrypting.discard(node)
            self._take_statement(node, ())
            self._dirty |= self._key_index.claim(("node", node), None)
            return ()
        decoded = read(NodeRecord, kv.value)
        new = node not in self._registered
        self._registered[node] = Registered(decoded.record, kv.create_revision)
        if new:
            self._note_claims_of(node)
        if decoded.record.encryption in ACCEPTING:
            self._encrypting.add(node)
        else:
            self._encrypting.discard(node)
        self._take_statement(node, decoded.record.mesh_addresses)
        self._dirty |= self._key_index.claim(("node", node), decoded.record.public_key, kv.create_revision)
        return _unknown(decoded)

    def _take_peer(self, name: str, kv: KeyValue | None) -> Sequence[str]:
        decoded = None if kv is None else read_peer(kv.value)
        record = None if decoded is None else decoded.record
        created = 0 if kv is None else kv.create_revision
        _replace(
            self._peer_records,
            name,
            None
            if record is None
            else Peer(
                name=name,
                public_key=record.public_key,
                allowed_ips=record.allowed_ips,
                endpoint=record.endpoint,
                persistent_keepalive=record.persistent_keepalive,
                preshared_key=record.preshared_key,
                registered_revision=created,
                leased=kv is not None and bool(kv.lease),
            ),
        )
        self._dirty.add(("peer", name))
        self._dirty |= self._key_index.claim(("peer", name), record.public_key if record else None, created)
        return _unknown(decoded, f"; a peer has {', '.join(PEER_FIELDS)}")

    def _take_annotation(self, node: str, name: str, value: bytes | None) -> Sequence[str]:
        if name not in ANNOTATIONS:
            if value is not None:
                raise RecordError(f"no such annotation is known; there are {', '.join(sorted(ANNOTATIONS))}")
            return ()
        text = None if value is None else decode_text(value, MAX_ANNOTATION)
        annotations = dict(self._annotations.get(node, {}))
        _replace(annotations, name, text)
        _replace(self._annotations, node, annotations or None)
        self._dirty.add(("node", node))
        return ()

    def _take_claim(self, address: IPAddress, claimant: Claimant, kv: KeyValue | None) -> None:
        created = None if kv is None else kv.create_revision
        self._dirty |= {("node", name) for name in self._addresses.claim(address, claimant, created)}
        self._note_claims(address)

    def _note_kept(self, node: str, concerned: Collection[str]) -> None:
        if concerned:
            self._dirty |= {("node", name) for name in concerned}
            self._note_claims_of(node)

    def _take_statement(self, node: str, interfaces: tuple[IPInterface, ...]) -> None:
        """The record of `node` states these mesh addresses."""
        if interfaces or node not in self._registered:
            self._silent.discard(node)
        else:
            self._silent.add(node)
        addresses = self._addresses.state(node, interfaces)
        if addresses:
            self._dirty |= {("node", name) for name in self._addresses.settle(addresses)}
            if self._addresses.networks_changed:
                self._addresses.networks_changed = False
                self._count_subnets()

    def _note_claims_of(self, node: str) -> None:
        for address in self._addresses.claimed_by(("node", node)):
            self._note_claims(address)

    def _note_claims(self, address: IPAddress) -> None:
        """Say which claims of an address are not in force. A host that joins may claim one that another host claimed a
        moment before, and gives it up at once: that is nothing to report."""
        notes, subnets = [], self._subnets_in_force
        outside = bool(subnets) and not any(address in subnet for subnet in subnets)
        for claimant in self._addresses.claims(address):
            kind, name = claimant
            if outside:
                text = f"the address is not within the mesh's subnets ({', '.join(map(str, subnets))})"
            elif kind == "node" and name not in self._registered:
                continue
            else:
                text = self._addresses.wrong_claim(address, claimant) or ""
            if text and kind == "node":
                notes.append(RejectedRecord(self._keys.address(name, address), text, name))
            elif text:
                notes.append(RejectedRecord(self._keys.peer_address(name, address), text))
        source = place(address)
        if notes or source in self._aside:
            self._note(source, notes)

    def _take_candidate(self, location: str, node: str, kv: KeyValue | None) -> Sequence[str]:
        decoded = None if kv is None else read(CandidateRecord, kv.value, MAX_SMALL)
        candidates = dict(self._elections.get(location, {}))
        if decoded is None or kv is None:
            candidates.pop(node, None)
        else:
            candidates[node] = Candidate(
                node=node, rank=decoded.record.rank, create_revision=kv.create_revision, since=decoded.record.since
            )
        _replace(self._elections, location, candidates or None)
        self._dirty_elections.add(location)
        return _unknown(decoded)

    def _take_observed_endpoint(self, name: str, observer: str, kv: KeyValue | None) -> Sequence[str]:
        decoded = None if kv is None else read(ObservedEndpointRecord, kv.value, MAX_SMALL)
        observers = dict(self._observers.get(name, {}))
        if decoded is None or kv is None:
            observers.pop(observer, None)
        else:
            record = decoded.record
            observers[observer] = ObservedEndpoint(
                observer=observer, public_key=record.public_key, endpoint=record.endpoint, revision=kv.mod_revision
            )
        _replace(self._observers, name, observers or None)
        subjects = self._subjects.setdefault(observer, set())
        (subjects.add if observer in observers else subjects.discard)(name)
        if not subjects:
            del self._subjects[observer]
        self._dirty_observed_endpoints.add(name)
        if name in self._registered:
            self._dirty.add(("node", name))
        if name in self._peer_records:
            self._dirty.add(("peer", name))
        return _unknown(decoded)

    def _take_probe_report(self, location: str, prober: str, kv: KeyValue | None) -> Sequence[str]:
        decoded = None if kv is None else read(ProbeReportRecord, kv.value, MAX_PROBE_REPORT)
        probers = dict(self._probers.get(location, {}))
        if decoded is None:
            probers.pop(prober, None)
        else:
            record = decoded.record
            probers[prober] = ProbeReport(
                prober=prober,
                leader=record.leader,
                candidacy=record.candidacy,
                targets=record.targets,
                leader_reachable=record.leader_reachable,
                members_reachable=record.members_reachable,
                can_take_over=record.can_take_over,
                unconfirmed=record.unconfirmed,
            )
        _replace(self._probers, location, probers or None)
        self._dirty_probe_reports.add(location)
        return _unknown(decoded)

    def _take_granularity(self, value: bytes | None) -> Sequence[str]:
        if value is None:
            return [] if self.granularity is None else [f"the value is missing; {self.granularity} stays in force"]
        self.granularity = decode_granularity(value)
        return ()

    def _take_subnets(self, value: bytes | None) -> Sequence[str]:
        stated = () if value is None else decode_subnets(value)
        self.subnets, self._subnets_stated = stated or self.subnets, stated
        self._count_subnets()
        return ()

    def _take_internal_ips(self, kv: KeyValue | None) -> Sequence[str]:
        # A function of this revision alone: what was known before may be of another etcd.
        self._internal_ips_since = 0
        if kv is not None:
            self.internal_ips = decode_internal_ips(kv.value)
            self._internal_ips_since = kv.mod_revision
        return ()

    @property
    def _internal_ips_in_force(self) -> InternalIPs:
        """What is known of the setting, else what the node records of this revision say. The latter is not kept: it is
        no knowledge of the setting, and who starts later has to find the same."""
        return self.internal_ips or (InternalIPs.ENCRYPTED if self._encrypting else InternalIPs.OFF)

    def _note_internal_ips(self) -> None:
        """Say that etcd's value is not what is in force, and the remedy."""
        key, in_force = self._keys.internal_ips, self._internal_ips_in_force
        text = ""
        if (kv := self._kvs.get(key.encode())) is not None:
            try:
                decode_internal_ips(kv.value)
            except RecordError as error:
                text = f"{error} (kgctl mesh set internal-ips {in_force}); {in_force} stays in force until then"
        elif self.internal_ips is not None or self._encrypting:
            text = f"the value is missing; {in_force} stays in force"
        self._note(key.encode(), (RejectedRecord(key, text),) if text else ())

    def _set_subnets(self, subnets: tuple[IPNetwork, ...]) -> None:
        if subnets != self.subnets:
            self.subnets = subnets
            self._count_subnets()

    def _count_subnets(self) -> None:
        """Which subnets are in force, after something has changed that they depend on."""
        configured = self.subnets or ()
        subnets = self._addresses.subnets(configured, self._silent)
        if subnets != self._subnets_in_force:
            self._subnets_in_force = subnets
            self._dirty |= {("node", name) for name in self._registered}
            for address in self._addresses.all_claimed():
                self._note_claims(address)

    def _note_subnets(self) -> None:
        """Say that the subnets in force are not etcd's value, and the remedy.

        What this host knew before is not part of it: all that see this revision say the same. Of a value that is not
        valid its own reason says enough.
        """
        stated, subnets = self._subnets_stated, self._subnets_in_force
        source, key = ("subnets", "in force"), self._keys.subnets
        if subnets == stated or (not stated and key.encode() in self._kvs):
            self._note(source, ())
            return
        in_force = ", ".join(map(str, subnets))
        text = f"restore it with etcdctl put {key} {in_force.replace(' ', '')}"
        if not stated:
            text = f"the value is missing; {in_force} stays in force: {text}"
        else:
            text = (
                f"the value is {', '.join(map(str, stated))}, but the nodes' addresses are in {in_force}, which stays "
                f"in force: {text}, or, to renumber the nodes, start each agent once with --renumber"
            )
        self._note(source, (RejectedRecord(key, text),))


def _public(node: Node | None) -> tuple[bool, bool]:
    return (node.public_in(4), node.public_in(6)) if node is not None else (False, False)


def _renewed(
    previous: Mapping[str, tuple[V, ...]], tables: Mapping[str, Mapping[str, V]], dirty: set[str]
) -> Mapping[str, tuple[V, ...]]:
    """What was given out, with the entries of `dirty` made anew from `tables`; `dirty` is empty afterwards."""
    if not dirty:
        return previous
    result = copied(previous)
    for name in dirty:
        table = tables.get(name)
        _replace(result, name, tuple(table[key] for key in sorted(table)) if table else None)
    dirty.clear()
    return result


def _replace(table: dict[str, V], name: str, value: V | None) -> bool:
    """Set, or take out on None; whether that changed anything. An equal value keeps the object that is there."""
    if value is None:
        return table.pop(name, None) is not None
    if name in table and table[name] == value:
        return False
    table[name] = value
    return True


def _unknown(decoded: Read[R] | None, known: str = "") -> Sequence[str]:
    """What to report of unknown fields; `known` says which there are."""
    if decoded is None or not (decoded.unknown or decoded.unreadable):
        return ()
    notes = [f"{shown_name(name)}: no such field is known{known}; {REST_IN_FORCE}" for name in decoded.unknown]
    notes += (f"{text}; {REST_IN_FORCE}" for text in decoded.unreadable)
    if decoded.more_unknown:
        notes.append(f"{decoded.more_unknown} more fields are not known; {REST_IN_FORCE}")
    return notes


def _shown(key: bytes) -> str:
    text = k.key_text(key[: 4 * _MOST_SHOWN])
    return text if len(text) <= _MOST_SHOWN else text[:_MOST_SHOWN] + "…"
