"""Who has which mesh address, by the claims in etcd and by what nodes' records state.

A claim is written once, when there is none, and never changed. A node's record states the address that the node has
claimed, so that a contradiction shows. An address belongs to the node that the claim names if the claim stands as it
was first written, and no other node's record stated the address before claim and claimant did. Otherwise it belongs to the one node whose
record states it; if several do, to nobody. So one write takes no address away: neither a changed or deleted claim nor
a record that states another's address (decision 0024).

The mesh's subnets are judged likewise: those that most records state stay in force when `mesh/subnets` changes.

Pure, one change at a time, and independent of the order of the changes, like `store.joins`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

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


class AddressIndex:
    """Claims and statements, joined."""

    def __init__(self) -> None:
        self._claims: dict[IPAddress, Claim] = {}
        self._statements: dict[str, _Statement] = {}
        self._stated_by: dict[IPAddress, tuple[str, ...]] = {}
        self._holders: dict[IPAddress, str] = {}
        self._held: dict[str, set[IPAddress]] = {}
        self._networks: Counter[IPNetwork] = Counter()

    # --- taking in ---------------------------------------------------------------------------------------------

    def claim(self, address: IPAddress, claim: Claim | None) -> set[str]:
        """`claim` stands at `address` now. Returns the names of the nodes concerned."""
        before = self._claims.get(address)
        if claim is None:
            self._claims.pop(address, None)
        else:
            self._claims[address] = claim
        concerned = self._settle(address)
        # Which of two claims of its own a node goes by depends on their age.
        return concerned | {one.claimant for one in (before, claim) if one is not None}

    def state(self, node: str, interfaces: tuple[IPInterface, ...], written: int) -> set[IPAddress]:
        """The record of `node`, written at revision `written`, states these addresses with their networks. Returns the
        addresses whose owner, or what is wrong with them, may be another now."""
        before = self._statements.get(node)
        if before is None and not interfaces:
            return set()
        old = () if before is None else before.interfaces
        if interfaces:
            self._statements[node] = _Statement(interfaces, written)
        else:
            del self._statements[node]
        if old != interfaces:
            self._networks.subtract(one.network for one in old)
            self._networks.update(one.network for one in interfaces)
            for network in {one.network for one in old}:
                if not self._networks[network]:
                    del self._networks[network]
            for one in old:
                rest = tuple(name for name in self._stated_by[one.ip] if name != node)
                if rest:
                    self._stated_by[one.ip] = rest
                else:
                    del self._stated_by[one.ip]
            for one in interfaces:
                self._stated_by[one.ip] = (*self._stated_by.get(one.ip, ()), node)
        return {one.ip for one in (*old, *interfaces)}

    def settle(self, addresses: Iterable[IPAddress]) -> set[str]:
        """Judge `addresses` anew after `state`; the names of the nodes concerned."""
        return {name for address in addresses for name in self._settle(address)}

    def _settle(self, address: IPAddress) -> set[str]:
        before, holder = self._holders.get(address), self._judge(address)
        concerned = set(self._stated_by.get(address, ()))
        if before == holder:
            return concerned
        if before is not None:
            self._held[before].discard(address)
            if not self._held[before]:
                del self._held[before]
            del self._holders[address]
            concerned.add(before)
        if holder is not None:
            self._holders[address] = holder
            self._held.setdefault(holder, set()).add(address)
            concerned.add(holder)
        return concerned

    def _judge(self, address: IPAddress) -> str | None:
        claim, stating = self._claims.get(address), self._stated_by.get(address, ())
        if claim is not None and claim.intact and self._before(address, claim) is None:
            return claim.claimant
        return stating[0] if len(stating) == 1 else None

    def _before(self, address: IPAddress, claim: Claim) -> str | None:
        """Another node whose record stated the address before the claim was made, and before the claimant's own record
        did: a claim that was deleted and made anew is its owner's, or somebody else's."""
        stating = self._stated_by.get(address, ())
        first = self._statements[claim.claimant].written if claim.claimant in stating else claim.written
        for node in stating:
            if node != claim.claimant and self._statements[node].written < min(first, claim.written):
                return node
        return None

    # --- giving out --------------------------------------------------------------------------------------------

    def __contains__(self, address: object) -> bool:
        return address in self._claims

    def claimed(self) -> Iterable[IPAddress]:
        """The addresses at which a claim stands."""
        return self._claims

    def holder(self, address: IPAddress) -> str | None:
        """Whose an address is: a node's name, or `peer/<name>`."""
        return self._holders.get(address)

    def of(self, node: str, subnets: tuple[IPNetwork, ...]) -> tuple[IPAddress, ...]:
        """The addresses of a node within `subnets`, IPv4 first, one of a family: the one that its record states, else
        the one that was claimed first."""
        held = self._held.get(node)
        if not held:
            return ()
        if len(held) > 1:
            statement = self._statements.get(node)
            stated = () if statement is None else tuple(one.ip for one in statement.interfaces)
            order = sorted(
                held,
                key=lambda address: (
                    address.version,
                    address not in stated,
                    claim.created if (claim := self._claims.get(address)) is not None else 0,
                    int(address),
                ),
            )
        else:
            order = list(held)
        found: dict[int, IPAddress] = {}
        for address in order:
            if address.version not in found and any(address in subnet for subnet in subnets):
                found[address.version] = address
        return tuple(found.values())

    def subnets(self, configured: tuple[IPNetwork, ...]) -> tuple[IPNetwork, ...]:
        """The subnets in force: of each family the one that most records state (of equals the configured one, then the
        lowest), else the configured one."""
        if not self._networks or all(network in configured for network in self._networks):
            return configured
        best: dict[int, IPNetwork] = {network.version: network for network in configured}
        for version in (4, 6):
            counted = [(count, network) for network, count in self._networks.items() if network.version == version]
            if counted:
                most = max(count for count, _ in counted)
                equals = [network for count, network in counted if count == most]
                if best.get(version) not in equals:
                    best[version] = min(equals)
        # In the order of the configured ones, so that it is the same value if they are.
        return tuple(sorted(best.values(), key=lambda one: _place(one, configured)))

    # --- what is wrong -----------------------------------------------------------------------------------------

    def wrong_claim(self, address: IPAddress) -> str | None:
        """Why the claim of `address` is not in force, as a sentence; None: it is, or there is none."""
        claim, stating = self._claims.get(address), self._stated_by.get(address, ())
        holder = self._holders.get(address)
        if claim is None:
            if len(stating) > 1:
                return f"the claim is gone and the records of {_listed(stating)} state the address: nobody has it"
            return None
        if claim.intact and holder == claim.claimant:
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
                f"{what} and names {claim.claimant}, but the record of node {holder} stated the address before: {holder} "
                "keeps it, and its agent restores the claim; to have the address free, stop that agent and say "
                f"kgctl node forget {holder}"
            )
        if stating:
            return (
                f"{what} and names {claim.claimant}, and the records of {_listed(stating)} state the address: nobody "
                "has it until its owner's agent has restored the claim, or, if it stays so, until the node that should "
                "not have it is gone: stop its agent and say kgctl node forget NODE"
            )
        if claim.claimant.startswith("peer/"):
            return None  # A peer that connects again writes its claim again; who gets its networks is no claim's to say.
        return (
            f"{what}, and a claim is only valid as it was first written: nobody has the address; delete the key, then a "
            "node can claim it anew"
        )

    def wrong_statements(self, node: str) -> tuple[str, ...]:
        """Sentences on the addresses that the record of `node` states and that another has."""
        statement = self._statements.get(node)
        found = []
        for one in () if statement is None else statement.interfaces:
            holder = self._holders.get(one.ip)
            if holder is not None and holder != node:
                found.append(
                    f"it states mesh address {one.ip}, which is claimed by {holder}: {holder} keeps it"
                )
        return tuple(found)


def _place(network: IPNetwork, configured: tuple[IPNetwork, ...]) -> tuple[int, int]:
    versions = [one.version for one in configured]
    return (versions.index(network.version) if network.version in versions else len(versions), network.version)


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
