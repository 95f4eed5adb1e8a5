"""Decides which node has which mesh address, by the claims in etcd and by what nodes' records state.

A claim is written once, when there is none, and never changed. A node's record states the address that the node has
claimed, so that a contradiction shows. An address belongs to the node that the claim names if the claim stands as it
was first written, and no other node's record stated the address before the claim was made and before the claimant's
record did. Otherwise it belongs to the one node whose record states it; if several do, to nobody. So one write takes no
address away: neither a changed or deleted claim nor a record that states another's address (decision 0024).

The mesh's subnets are decided likewise: those that most nodes are in stay in force when `mesh/subnets` changes. Nodes
whose records state nothing, as those of older agents, count too: a single record must not decide for them.

Pure, one change at a time, and independent of the order of the changes, like `store.duplicate_keys`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TypeAlias

from attrs import frozen

from kilo_etcd.model import IPAddress, IPInterface, IPNetwork


@frozen
class Claim:
    """What stands at an address. The revisions are etcd's create and mod revision."""

    claimant: str
    """A node's name, or `peer/<name>`."""
    created: int
    written: int

    @property
    def intact(self) -> bool:
        """Whether it was never overwritten."""
        return self.created == self.written


@frozen
class _Statement:
    interfaces: tuple[IPInterface, ...]
    written: int


Place: TypeAlias = int
"""An address as a key: hashing an address is slow, and there are very many."""


def place(address: IPAddress) -> Place:
    """The key of an address; IPv6 is below zero."""
    return int(address) if address.version == 4 else ~int(address)


class AddressIndex:
    """Claims and statements, joined."""

    def __init__(self) -> None:
        self._claims: dict[Place, Claim] = {}
        self._statements: dict[str, _Statement] = {}
        self._stated_by: dict[Place, tuple[str, ...]] = {}
        self._holders: dict[Place, str] = {}
        self._held: dict[str, dict[Place, IPAddress]] = {}
        self._networks: dict[tuple[Place, int], tuple[IPNetwork, int]] = {}
        """What records state: the network, and how many do."""
        self.networks_changed = False
        """Whether `subnets` may be others since somebody last set this to False."""

    # --- taking in ---------------------------------------------------------------------------------------------

    def claim(self, address: IPAddress, claim: Claim | None) -> set[str]:
        """`claim` stands at `address` now. Returns the names of the nodes concerned."""
        key = place(address)
        before = self._claims.get(key)
        if claim is None:
            self._claims.pop(key, None)
        else:
            self._claims[key] = claim
        concerned = self._settle(address)
        # Which of two claims of its own a node goes by depends on their age.
        return concerned | {each.claimant for each in (before, claim) if each is not None}

    def state(self, node: str, interfaces: tuple[IPInterface, ...], written: int) -> tuple[IPAddress, ...]:
        """The record of `node`, written at revision `written`, states these addresses with their networks. Returns the
        addresses whose owner, or what is wrong with them, may be another now: to be settled."""
        before = self._statements.get(node)
        if before is None and not interfaces:
            return ()
        old = () if before is None else before.interfaces
        if interfaces:
            self._statements[node] = _Statement(interfaces, written)
        else:
            del self._statements[node]
        if old == interfaces:
            return tuple(interface.ip for interface in interfaces)
        for stated in old:
            self._count(stated.network, -1)
            rest = tuple(name for name in self._stated_by[place(stated.ip)] if name != node)
            if rest:
                self._stated_by[place(stated.ip)] = rest
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
            del self._held[before][key], self._holders[key]
            if not self._held[before]:
                del self._held[before]
            concerned.add(before)
        if holder is not None:
            self._holders[key] = holder
            self._held.setdefault(holder, {})[key] = address
            concerned.add(holder)
        return concerned

    def _evaluate(self, key: Place) -> str | None:
        claim, stating = self._claims.get(key), self._stated_by.get(key, ())
        if claim is not None and claim.intact and not self._stated_before(claim, stating):
            return claim.claimant
        return stating[0] if len(stating) == 1 else None

    def _stated_before(self, claim: Claim, stating: tuple[str, ...]) -> bool:
        """Whether another node's record stated the address before the claim was made, and before the claimant's own
        record did: a claim that was deleted and made anew is its owner's, or somebody else's."""
        if not stating or stating == (claim.claimant,):
            return False
        first = claim.written
        if claim.claimant in stating:
            first = min(first, self._statements[claim.claimant].written)
        return any(self._statements[node].written < first for node in stating if node != claim.claimant)

    # --- giving out --------------------------------------------------------------------------------------------

    def claimed(self, address: IPAddress) -> bool:
        """Whether a claim stands at it, valid or not."""
        return place(address) in self._claims

    def holder(self, address: IPAddress) -> str | None:
        """The holder of an address: a node's name, or `peer/<name>`."""
        return self._holders.get(place(address))

    def of(self, node: str, subnets: tuple[IPNetwork, ...]) -> tuple[IPAddress, ...]:
        """The addresses of a node within `subnets`, IPv4 first, one of a family: the one that its record states, else
        the one that was claimed first."""
        held = self._held.get(node)
        if not held:
            return ()
        if len(held) > 1:
            statement = self._statements.get(node)
            stated = () if statement is None else tuple(interface.ip for interface in statement.interfaces)
            order = sorted(
                held.values(),
                key=lambda address: (
                    address.version,
                    address not in stated,
                    claim.created if (claim := self._claims.get(place(address))) is not None else 0,
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

    def wrong_claim(self, address: IPAddress) -> str | None:
        """Why the claim of `address` is not in force, as a sentence; None: it is, or there is none."""
        key = place(address)
        claim, stating = self._claims.get(key), self._stated_by.get(key, ())
        holder = self._holders.get(key)
        if claim is not None and claim.intact and holder == claim.claimant:
            return None
        if claim is None:
            if len(stating) > 1:
                return f"the claim is gone and the records of {_listed(stating)} state the address: nobody has it"
            return None
        what = (
            f"the claim was made at revision {claim.written}"
            if claim.intact
            else f"the claim was overwritten at revision {claim.written}"
        )
        if holder == claim.claimant:
            return None  # Its record says so too.
        if holder is not None:
            return (
                f"{what} and names {claim.claimant}, but the record of node {holder} stated the address before: "
                f"{holder} keeps it, and its agent restores the claim; to have the address free, stop that agent and "
                f"run kgctl node forget {holder}"
            )
        if stating:
            return (
                f"{what} and names {claim.claimant}, and the records of {_listed(stating)} state the address: nobody "
                "has it until its owner's agent has restored the claim, or, if it stays so, until the node that should "
                "not have it is gone: stop its agent and run kgctl node forget NODE"
            )
        if claim.claimant.startswith("peer/"):
            return None  # A peer that connects again writes its claim again.
        return (
            f"{what}, and a claim is only valid as it was first written: nobody has the address; delete the key, then "
            "a node can claim it anew"
        )

    def wrong_statements(self, node: str) -> tuple[str, ...]:
        """Sentences on the addresses that the record of `node` states and that another has."""
        statement = self._statements.get(node)
        result = []
        for interface in () if statement is None else statement.interfaces:
            holder = self._holders.get(place(interface.ip))
            if holder is not None and holder != node:
                result.append(f"it states mesh address {interface.ip}, which is claimed by {holder}: {holder} keeps it")
        return tuple(result)


def _rank(network: IPNetwork, configured: tuple[IPNetwork, ...]) -> tuple[int, int]:
    versions = [subnet.version for subnet in configured]
    return (versions.index(network.version) if network.version in versions else len(versions), network.version)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
