"""The names of nodes and peers as lines of a hosts file, in a block of our own. Pure.

Each is written as `NAME.DOMAIN`, where the domain is the prefix (`/kilo` gives `gcp-1.kilo`), and as bare `NAME` unless
another line of the file has that name already: what the operator or another mesh said first stays. Everything outside
the block is kept byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from kilo_etcd.model import IPAddress, is_dns_name
from kilo_etcd.topology import Topology


def domain(prefix: str) -> str:
    """`/kilo` is `kilo`, `/corp/emea` is `emea.corp`."""
    parts = (re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-")[:63].strip("-") for part in prefix.split("/"))
    return ".".join(reversed([part for part in parts if part])) or "mesh"


def known_names(topology: Topology) -> dict[str, tuple[IPAddress, ...]]:
    """Name -> addresses, of all nodes and all peers that have an address. A node's name is not given to a peer."""
    found: dict[str, tuple[IPAddress, ...]] = {}
    for name in sorted(topology.snapshot.nodes):
        found[name] = topology.snapshot.nodes[name].mesh_addresses
    for name in sorted(topology.peers):
        single = (n.network_address for n in topology.peers[name].allowed_ips if n.num_addresses == 1)
        found.setdefault(name, tuple(single))
    # A peer's name is any text.
    return {name: addresses for name, addresses in found.items() if addresses and is_dns_name(name)}


def with_block(
    text: bytes, interface: str, names: Mapping[str, tuple[IPAddress, ...]] | None, *, prefix: str, own: str = ""
) -> bytes:
    """The file with the block of `interface` saying `names`; None: without the block. `own` is never written bare."""
    # In its place, if it has one: of several blocks each may be written at any time.
    head, tail = _around(text, interface)
    if not names:
        return head + tail
    taken = {own.lower(), "localhost", *_names_in(head), *_names_in(tail)}
    suffix = domain(prefix)
    lines = [_begin(interface).decode() + f" (kgctl connect writes it for {prefix}, and removes it at its end)"]
    for name, addresses in names.items():
        bare = "" if name.lower() in taken else f" {name}"
        lines += [f"{address} {name}.{suffix}{bare}" for address in addresses]
    lines.append(_end(interface).decode())
    gap = b"" if not head or head.endswith(b"\n") else b"\n"
    return head + gap + "\n".join(lines).encode() + b"\n" + tail


def _begin(interface: str) -> bytes:
    return f"# kilo-etcd {interface}: begin".encode()


def _end(interface: str) -> bytes:
    return f"# kilo-etcd {interface}: end".encode()


def _around(text: bytes, interface: str) -> tuple[bytes, bytes]:
    """What stands before and after the block; all of it before, if there is none."""
    lines = text.splitlines(keepends=True)
    begin, end = _begin(interface), _end(interface)
    first = next((at for at, line in enumerate(lines) if line.rstrip() == begin or line.startswith(begin + b" ")), None)
    if first is None:
        return text, b""
    last = next((at for at in range(first, len(lines)) if lines[at].rstrip() == end), None)
    if last is None:
        # Somebody has cut the end off. Lines of ours are neither blank nor comments.
        rest = range(first + 1, len(lines))
        foreign = (at for at in rest if not lines[at].strip() or lines[at].lstrip().startswith(b"#"))
        last = next(foreign, len(lines)) - 1
    return b"".join(lines[:first]), b"".join(lines[last + 1 :])


def _names_in(text: bytes) -> Iterator[str]:
    for line in text.decode(errors="replace").splitlines():
        words: Iterable[str] = line.partition("#")[0].split()[1:]
        yield from (word.lower() for word in words)
