"""The name servers that this host asks in the end, from resolv.conf and the files of a resolver on the host itself."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from kilo_etcd.base.fast_ip import ip_address
from kilo_etcd.model import IPAddress

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
_MOST_BYTES = 2**16


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
