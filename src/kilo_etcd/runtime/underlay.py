"""Finds the networks that this host reaches over its own links, for its record.

The mesh routes no internal IP in these networks to the host's segment (`topology`): a printer, a container, the gateway
or etcd has that address here. Pure but for `name_servers`, which reads resolv.conf.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, collapse_addresses
from pathlib import Path

from attrs import frozen

from kilo_etcd.base.fast_ip import ip_address
from kilo_etcd.model import IPAddress, IPNetwork

RESOLV_CONF = Path("/etc/resolv.conf")
BEHIND = tuple(
    map(
        Path,
        (
            "/run/systemd/resolve/resolv.conf",
            "/run/dnsmasq/resolv.conf",
            "/run/NetworkManager/no-stub-resolv.conf",
            "/run/unbound/resolvconf_resolvers.conf",
            "/var/cache/unbound/resolvconf_resolvers.conf",
        ),
    )
)
"""Where the name servers stand that a resolver on the host itself asks (systemd-resolved, dnsmasq, NetworkManager,
unbound), as resolvconf and these programs write them."""
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


def name_servers(path: Path = RESOLV_CONF, behind: Iterable[Path] = BEHIND) -> tuple[IPAddress, ...]:
    """The name servers in use; none where that cannot be read. Behind a resolver on the host itself, those in the files
    of `behind`; a resolver's own configuration is not read."""
    addresses = _name_servers(path)
    if any(server.is_loopback for server in addresses):
        addresses = (*addresses, *(server for file in behind for server in _name_servers(file)))
    return tuple(dict.fromkeys(server for server in addresses if not server.is_loopback))


def _name_servers(path: Path) -> tuple[IPAddress, ...]:
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES).decode(errors="replace")
    except OSError:
        return ()
    result = []
    for line in text.splitlines():
        match line.split():
            # One with a zone (fe80::1%eth0) is on a link of its own.
            case ["nameserver", word, *_] if "%" not in word:
                with suppress(ValueError):
                    result.append(ip_address(word))
            case ["forward-addr:", word, *_]:
                # unbound's form; a port may follow.
                with suppress(ValueError):
                    result.append(ip_address(word.partition("@")[0]))
    return tuple(result)


def _meaningless(network: IPNetwork) -> bool:
    address: IPv4Address | IPv6Address = network.network_address
    return address.is_loopback or address.is_link_local or (address.is_unspecified and network.prefixlen > 0)
