"""Decides which node or peer has which mesh address, by the claims in etcd and by what nodes' records state.

A claim is a key below its writer's prefix (`by/<node>/addresses/<ip>`), so several may claim one address. The oldest
claim has it: create revisions never go back, so a claim that was the oldest once stays it for as long as it stands, and
a host that has seen that its claim is the oldest may use the address (`store.claims`). An address that nobody claims is
that of the one node whose record states it: a host keeps its address while a claim that was deleted is on its way back.
So one write takes no address away (decisions 0024 and 0034).

The claims of a node with a reservation (`by/<node>/reservation`) are as old as that or its record, the older of the
two, if that is younger than they are. With a record alone they are as old as they are, and they come after all others
if it has neither. The reservation outlives the node's record, and ends by its lease. From then on another node may take
the address, and keeps it when the former owner comes back, whose reservation is younger then (decision 0040).

The mesh's subnets are decided by the records: those that most nodes are in stay in force when `mesh/subnets` changes.
Nodes whose records state nothing count too: a single record must not decide for them.

Pure, one change at a time, and independent of the order of the changes, like `store.duplicate_keys`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import TypeAlias

from kilo_etcd.model import IPAddress, IPInterface, IPNetwork

Claimant: TypeAlias = tuple[str, str]
"""`("node", name)` or `("peer", name)`."""

Place: TypeAlias = int
"""An address as a key: hashing an address is slow, and there are very many."""


def place(address: IPAddress) -> Place:
    """The key of an address; IPv6 is below zero."""
    return int(address) if address.version == 4 else ~int(address)


def named(claimant: Claimant) -> str:
    """A claimant in a sentence."""
    return " ".join(claimant)


class Reservations:
    """For which nodes claims are kept: those with a record or a reservation."""

    def __init__(self) -> None:
        self._reserved: dict[str, int] = {}
        """The nodes with a reservation under a lease: etcd's create revision of each. One under no lease counts for
        nothing, since it would never end."""
        self._registered: dict[str, int] = {}
        """The nodes with a record: the same."""

    def reserve(self, node: str, created: int | None) -> None:
        """The reservation of a node was created at this revision, or, with None, is gone."""
        if created is None:
            self._reserved.pop(node, None)
        else:
            self._reserved[node] = created

    def register(self, node: str, created: int | None) -> bool:
        """The record of a node was created at this revision, or, with None, is gone. Whether that is news."""
        if created == self._registered.get(node):
            return False
        if created is None:
            del self._registered[node]
        else:
            self._registered[node] = created
        return True

    def since(self, node: str) -> int | None:
        """Etcd's revision since which a node has a record or a reservation; None: it has no record."""
        registered = self._registered.get(node)
        return None if registered is None else min(registered, self._reserved.get(node, registered))

    def has_record(self, node: str) -> bool:
        """Whether a node has a record."""
        return node in self._registered

    def all_reserved(self) -> bool:
        """Whether all nodes with a record have a reservation: an agent of an older version has none."""
        return self._registered.keys() <= self._reserved.keys()

    def order(self, claimant: Claimant, created: int) -> tuple[bool, int, Claimant]:
        """The key by which claims are sorted that were created at these revisions: of a node without a reservation, and
        of a peer, by that alone. Names break a tie, which one transaction can make."""
        kind, name = claimant
        since = 0
        if kind == "node" and (reserved := self._reserved.get(name)) is not None:
            # A reservation that was lost, or is that of an agent's first start with one, makes no newcomer of a node
            # whose record has stood meanwhile.
            since = min(reserved, self._registered.get(name, reserved))
        return not self.is_kept(claimant), max(created, since), claimant

    def is_kept(self, claimant: Claimant) -> bool:
        """Whether its claims are kept for it. An outside peer's always are."""
        kind, name = claimant
        return kind == "peer" or name in self._reserved or name in self._registered


class AddressIndex:
    """Claims and statements, joined."""

    def __init__(self) -> None:
        self._claims: dict[Place, dict[Claimant, int]] = {}
        """The claims of each address: etcd's create revision of each."""
        self._claimed_by: dict[Claimant, dict[Place, IPAddress]] = {}
        self.reservations = Reservations()
        self._statements: dict[str, tuple[IPInterface, ...]] = {}
        self._stated_by: dict[Place, tuple[str, ...]] = {}
        self._holders: dict[Place, Claimant] = {}
        self._held: dict[str, dict[Place, IPAddress]] = {}
        """Of the nodes that hold addresses."""
        self._networks: dict[tuple[Place, int], tuple[IPNetwork, int]] = {}
        """What records state: the network, and how many do."""
        self.networks_changed = False
        """Whether `subnets` may be others since somebody last set this to False."""

    # --- taking in ---------------------------------------------------------------------------------------------

    def claim(self, address: IPAddress, claimant: Claimant, created: int | None) -> set[str]:
        """The claim of `claimant` was created at this revision, or, with None, is gone. Returns the names of the nodes
        concerned."""
        key = place(address)
        claims = self._claims.setdefault(key, {})
        claimed = self._claimed_by.setdefault(claimant, {})
        if created is None:
            claims.pop(claimant, None)
            claimed.pop(key, None)
            if not claims:
                del self._claims[key]
            if not claimed:
                del self._claimed_by[claimant]
        else:
            claims[claimant], claimed[key] = created, address
        concerned = self._settle(address)
        # Which of two claims of its own a node goes by depends on their age.
        return concerned | ({claimant[1]} if claimant[0] == "node" else set())

    def reserve(self, node: str, created: int | None) -> set[str]:
        """The reservation of a node was created at this revision, or, with None, is gone. Returns the names of the
        nodes concerned."""
        self.reservations.reserve(node, created)
        return self._settle_claims_of(node)

    def register(self, node: str, created: int | None) -> set[str]:
        """The record of a node was created at this revision, or, with None, is gone. Returns the names of the nodes
        concerned."""
        return self._settle_claims_of(node) if self.reservations.register(node, created) else set()

    def _settle_claims_of(self, node: str) -> set[str]:
        """Evaluate anew which claims of a node come first, if there are others of the same address."""
        own = self._claimed_by.get(("node", node), {})
        contested = [address for key, address in own.items() if len(self._claims[key]) > 1]
        return {name for address in contested for name in self._settle(address)}

    def state(self, node: str, interfaces: tuple[IPInterface, ...]) -> tuple[IPAddress, ...]:
        """The record of `node` states these addresses with their networks. Returns the addresses whose holder, or what
        is wrong with them, may be another now: to be settled."""
        old = self._statements.get(node, ())
        if old == interfaces:
            return ()
        if interfaces:
            self._statements[node] = interfaces
        else:
            del self._statements[node]
        for stated in old:
            self._count(stated.network, -1)
            others = tuple(name for name in self._stated_by[place(stated.ip)] if name != node)
            if others:
                self._stated_by[place(stated.ip)] = others
            else:
                del self._stated_by[place(stated.ip)]
        for stated in interfaces:
            self._count(stated.network, 1)
            self._stated_by[place(stated.ip)] = (*self._stated_by.get(place(stated.ip), ()), node)
        return tuple(interface.ip for interface in (*old, *interfaces))

    def _count(self, network: IPNetwork, more: int) -> None:
        key = (place(network.network_address), network.prefixlen)
        _, before = self._networks.get(key, (network, 0))
        if before + more:
            self._networks[key] = (network, before + more)
        else:
            del self._networks[key]
        if not before or not before + more or len(self._networks) > 1:
            self.networks_changed = True

    def settle(self, addresses: Iterable[IPAddress]) -> set[str]:
        """Evaluate `addresses` anew after `state`; the names of the nodes concerned."""
        return {name for address in addresses for name in self._settle(address)}

    def _settle(self, address: IPAddress) -> set[str]:
        key = place(address)
        before, holder = self._holders.get(key), self._evaluate(key)
        concerned = set(self._stated_by.get(key, ()))
        if before == holder:
            return concerned
        if before is not None:
            del self._holders[key]
            kind, name = before
            if kind == "node":
                del self._held[name][key]
                if not self._held[name]:
                    del self._held[name]
                concerned.add(name)
        if holder is not None:
            self._holders[key] = holder
            kind, name = holder
            if kind == "node":
                self._held.setdefault(name, {})[key] = address
                concerned.add(name)
        return concerned

    def _evaluate(self, key: Place) -> Claimant | None:
        if claims := self._claims.get(key):
            return self._oldest(claims)
        stating = self._stated_by.get(key, ())
        return ("node", stating[0]) if len(stating) == 1 else None

    # --- giving out --------------------------------------------------------------------------------------------

    def claims(self, address: IPAddress) -> Mapping[Claimant, int]:
        """All who claim an address, each with the create revision of its claim."""
        return self._claims.get(place(address), {})

    def claimed_by(self, claimant: Claimant) -> tuple[IPAddress, ...]:
        """The addresses that somebody claims, whether it has them or not."""
        return tuple(self._claimed_by.get(claimant, {}).values())

    def oldest(self, address: IPAddress) -> Claimant | None:
        """Whose claim of an address comes first; None: nobody claims it."""
        claims = self._claims.get(place(address))
        return None if claims is None else self._oldest(claims)

    def earliest(self, address: IPAddress) -> Claimant | None:
        """Who claimed an address first of those who claim it now, whether that is kept for it or not: what decides of
        those that claim a free one at once, since one of them may be an agent that puts no reservation."""
        claims = self._claims.get(place(address))
        return None if claims is None else min(claims, key=lambda each: (claims[each], each))

    def _oldest(self, claims: Mapping[Claimant, int]) -> Claimant:
        return (
            next(iter(claims))
            if len(claims) == 1
            else min(claims, key=lambda each: self.reservations.order(each, claims[each]))
        )

    def lapsed(self) -> list[IPAddress]:
        """The addresses whose claims are kept for nobody, the one that was claimed first before the others."""
        lapsed = {
            key: min(claims.values())
            for key, claims in self._claims.items()
            if not any(map(self.reservations.is_kept, claims))
        }
        addresses = {key: address for own in self._claimed_by.values() for key, address in own.items() if key in lapsed}
        unstated = lapsed.keys() - self._stated_by.keys()
        return [addresses[key] for key in sorted(unstated, key=lambda key: (lapsed[key], key))]

    def all_claimed(self) -> tuple[IPAddress, ...]:
        """All addresses with a claim; one that several claim is given as often."""
        return tuple(
            {place(address): address for own in self._claimed_by.values() for address in own.values()}.values()
        )

    def free(self, address: IPAddress) -> bool:
        """Whether nobody claims an address, and no record states it."""
        return place(address) not in self._claims and place(address) not in self._stated_by

    def holder(self, address: IPAddress) -> Claimant | None:
        """Who has an address; None: nobody."""
        return self._holders.get(place(address))

    def of(self, node: str, subnets: tuple[IPNetwork, ...]) -> tuple[IPAddress, ...]:
        """The addresses of a node within `subnets`, IPv4 first, one of a family: the one that its record states, else
        the one that was claimed first."""
        held = self._held.get(node)
        if not held:
            return ()
        if len(held) > 1:
            stated = tuple(interface.ip for interface in self._statements.get(node, ()))
            order = sorted(
                held.values(),
                key=lambda address: (
                    address.version,
                    address not in stated,
                    self.claims(address).get(("node", node), 0),
                    int(address),
                ),
            )
        else:
            order = list(held.values())
        addresses: dict[int, IPAddress] = {}
        for address in order:
            if address.version not in addresses and any(address in subnet for subnet in subnets):
                addresses[address.version] = address
        return tuple(addresses.values())

    def disputed(self, configured: tuple[IPNetwork, ...]) -> bool:
        """Whether any record states a network that is not a configured one."""
        return any(network not in configured for network, _ in self._networks.values())

    def subnets(self, configured: tuple[IPNetwork, ...], silent: Collection[str]) -> tuple[IPNetwork, ...]:
        """The subnets in force: of each family the one that most nodes are in (of equals the configured one, then the
        one that most state). A node is in the one that its record states; one of the `silent`, whose records state
        none, in the configured one or else a stated one that its address is in. A family that none is configured of
        takes more than half of all that state or have an address."""
        if not self.disputed(configured):
            return configured
        networks: list[IPNetwork] = []
        all_of_them = len(self._statements) + sum(name in self._held for name in silent)
        for version in (4, 6):
            stated = {network: count for network, count in self._networks.values() if network.version == version}
            own = next((network for network in configured if network.version == version), None)
            if own is None:
                networks += [network for network, count in stated.items() if 2 * count > all_of_them]
                continue
            counts = {own: 0} | stated
            order = sorted(
                counts,
                key=lambda subnet: (subnet != own, -counts[subnet], -subnet.prefixlen, place(subnet.network_address)),
            )
            for name in silent:
                held = self._held.get(name, {}).values()
                its = next((subnet for subnet in order if any(address in subnet for address in held)), None)
                if its is not None:
                    counts[its] += 1
            networks.append(max(order, key=lambda subnet: counts[subnet]))
        # In the order of the configured ones, so that it is the same value if they are.
        return tuple(sorted(networks, key=lambda subnet: _rank(subnet, configured)))

    # --- what is wrong -----------------------------------------------------------------------------------------

    def wrong_claim(self, address: IPAddress, claimant: Claimant) -> str | None:
        """Why a claim is not in force, as a sentence; None: it is."""
        holder = self.holder(address)
        if holder is None or holder == claimant:
            return None
        if self.claims(address)[holder] > self.claims(address)[claimant]:
            return (
                f"{named(holder)} took the address at revision {self.claims(address)[holder]}, when it was kept for "
                f"{named(claimant)} no more: {named(holder)} keeps it"
            )
        return (
            f"{named(holder)} claimed the address before, at revision {self.claims(address)[holder]}: "
            f"{named(holder)} keeps it"
        )

    def wrong_statements(self, node: str) -> tuple[str, ...]:
        """Sentences on the addresses that the record of `node` states and that it does not have."""
        result = []
        for interface in self._statements.get(node, ()):
            holder = self.holder(interface.ip)
            if holder is None:
                others = ", ".join(sorted(name for name in self._stated_by[place(interface.ip)] if name != node))
                result.append(
                    f"it states mesh address {interface.ip}, which nobody claims and which the records of {others} "
                    "state too: nobody has it until an agent has restored its claim"
                )
            elif holder != ("node", node):
                result.append(
                    f"it states mesh address {interface.ip}, which is claimed by {named(holder)}: {named(holder)} "
                    "keeps it"
                )
        return tuple(result)


def _rank(network: IPNetwork, configured: tuple[IPNetwork, ...]) -> tuple[int, int]:
    versions = [subnet.version for subnet in configured]
    return (versions.index(network.version) if network.version in versions else len(versions), network.version)
