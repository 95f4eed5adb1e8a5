"""Finds the networks that this host reaches over its own links, for its record.

The mesh routes no internal IP in these networks to the host's segment (`topology`): a printer, a container, the gateway
or etcd has that address here. Pure but for `name_servers`, which reads resolv.conf.
"""

from __future__ import annotations

from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, collapse_addresses
from pathlib import Path

from attrs import frozen

from kilo_etcd.model import IPAddress, IPNetwork
from kilo_etcd.quickip import ip_address

RESOLV_CONF = Path("/etc/resolv.conf")
RESOLVED_CONF = Path("/run/systemd/resolve/resolv.conf")
"""What systemd-resolved asks, where resolv.conf names its stub."""
RESOLVED_STUBS = frozenset(map(IPv4Address, ("127.0.0.53", "127.0.0.54")))
MOST_NETWORKS = 500
"""Of one family in a record. A host with more states the whole family, so that nothing is routed to its segment."""
_MOST_BYTES = 2**16


@frozen
class Reached:
    """The networks that a host reaches over its own links."""

    lasting: tuple[IPNetwork, ...] = ()
    """Its own networks, gateways and name servers."""
    passing: tuple[IPNetwork, ...] = ()
    """What comes and goes by itself: networks of containers and tunnels, addresses behind etcd's DNS names."""

    def registered(
        self, before: Reached, record: tuple[IPNetwork, ...] | None
    ) -> tuple[tuple[IPNetwork, ...], Reached]:
        """What to state, and the networks that were counted for it, given those counted `before` for `record`.

        A passing network that is gone stays stated until something else changes: each record that is written wakes
        the whole mesh.
        """
        together = Reached((*self.lasting, *self.passing, *before.passing))
        if record is not None and together.stated() == record:
            return record, before
        return self.stated(), self

    def stated(self) -> tuple[IPNetwork, ...]:
        """All of it, with nothing said twice, in order."""
        every = [network for network in (*self.lasting, *self.passing) if not _meaningless(network)]
        four = tuple(collapse_addresses(network for network in every if isinstance(network, IPv4Network)))
        six = tuple(collapse_addresses(network for network in every if isinstance(network, IPv6Network)))
        return (
            *(four if len(four) <= MOST_NETWORKS else (IPv4Network("0.0.0.0/0"),)),
            *(six if len(six) <= MOST_NETWORKS else (IPv6Network("::/0"),)),
        )


def name_servers(path: Path = RESOLV_CONF, behind: Path = RESOLVED_CONF) -> tuple[IPAddress, ...]:
    """The name servers in use; none where that cannot be read. Those of systemd-resolved are looked up `behind` it."""
    found = _name_servers(path)
    return _name_servers(behind) if RESOLVED_STUBS.intersection(found) else found


def _name_servers(path: Path) -> tuple[IPAddress, ...]:
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES).decode(errors="replace")
    except OSError:
        return ()
    found = []
    for line in text.splitlines():
        match line.split():
            # One with a zone (fe80::1%eth0) is on a link of its own.
            case ["nameserver", word, *_] if "%" not in word:
                with suppress(ValueError):
                    found.append(ip_address(word))
    return tuple(found)


def _meaningless(network: IPNetwork) -> bool:
    address: IPv4Address | IPv6Address = network.network_address
    return address.is_loopback or address.is_link_local or (address.is_unspecified and network.prefixlen > 0)
