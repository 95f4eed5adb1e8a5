"""The names of nodes and peers as lines of a hosts file, in a block of our own. Pure.

Each is written as `NAME.DOMAIN`, where the domain is the prefix (`/kilo` gives `gcp-1.kilo`), as `NAME.mesh`, and as
bare `NAME` if that is a single label that means nothing else: the author of a record must not decide where
`github.com` or `wpad` leads on this machine. Other lines of the file keep their names, another mesh's among them, and
no line leads to an address that this machine does not send into the mesh (decision 0026). Everything outside the block
is kept byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence

from attrs import frozen

from kilo_etcd.base.quoting import shown
from kilo_etcd.model import IPAddress, is_dns_name
from kilo_etcd.model.hostplan import HostPlan
from kilo_etcd.topology.segments import Topology

_SYSTEM = (
    "localhost localdomain loopback broadcasthost local internal onion arpa alt _gateway _outbound wpad isatap "
    "metadata instance-data"
)
"""What systems, browsers and clouds take for something of their own: RFC 6761 and 6762, nss-myhostname, the discovery
of proxies, clouds' instance data."""
_TOP_LEVEL = (
    "com net org edu gov mil int aero asia biz cat coop info jobs mobi museum name post pro tel travel xxx "
    "academy agency app art bank blog bot cam center chat click cloud club codes company dev digital directory email "
    "expert foo free fun fyi games global group guru help host hosting inc ink ing live llc love ltd market media "
    "mov network new news one online page party photos plus press rocks run services shop site social software "
    "solutions space store stream studio support systems team tech technology today tools top video vip watch "
    "website wiki win work world xyz zip zone"
)
"""The top-level domains of old and the larger ones of today. The whole list changes every month; what it lacks does
little harm, since a line answers for exactly its name, and nobody looks `dev` up."""
_TAKEN = frozenset(f"{_SYSTEM} {_TOP_LEVEL}".split())

ANY_MESH = "mesh"
"""The domain under which the names of any one mesh are found."""

NAMES_TROUBLE = "the names of the mesh cannot be "
"""How an agent's error about its hosts file begins."""

BY_CONNECT = "kgctl connect writes it for {}, and removes it at its end"
BY_AGENT = "kg writes it for {}, and kg cleanup removes it"


def domain(prefix: str) -> str:
    """`/kilo` is `kilo`, `/corp/emea` is `emea.corp`. Never within a top-level domain: `/dev` is `dev.mesh`."""
    parts = (re.sub(r"[^a-z0-9]+", "-", part.lower()).strip("-")[:63].strip("-") for part in prefix.split("/"))
    labels = [part for part in parts if part]
    if labels and _taken_elsewhere(labels[0]):
        labels.insert(0, ANY_MESH)
    return ".".join(reversed(labels)) or ANY_MESH


def _long(name: str, prefix: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys((f"{name}.{domain(prefix)}", f"{name}.{ANY_MESH}")))


def _taken_elsewhere(label: str) -> bool:
    # Two letters are, or may become, a country; ip6-localhost and the like are in hosts(5).
    return (len(label) == 2 and label.isalpha()) or label.startswith("ip6-") or label in _TAKEN


def may_be_bare(name: str) -> bool:
    """Whether a name may stand without the mesh's domain, as far as the name itself tells."""
    return "." not in name and not _taken_elsewhere(name.lower())


@frozen
class MeshNames:
    """The names to be written."""

    addresses: Mapping[str, tuple[IPAddress, ...]]
    left_out: tuple[str, ...]
    """What is not written, or not bare, and why; in clauses."""

    def left_out_in_short(self, most: int = 5) -> str:
        """The first of it, and how many more there are."""
        more = len(self.left_out) - most
        return "; ".join((*self.left_out[:most], *([f"and {more} more"] if more > 0 else [])))

    def described(self) -> Iterator[str]:
        """What a dry run says of it, line by line."""
        for name, addresses in self.addresses.items():
            yield f"/etc/hosts: {name} is {', '.join(map(str, addresses))}"
        if self.left_out:
            yield f"/etc/hosts: not all names are written: {self.left_out_in_short()}"


def known_names(topology: Topology, plan: HostPlan, prefix: str) -> MeshNames:
    """The names of all nodes and all peers, with those of their addresses that `plan`, this machine's, sends into the
    mesh. A node's name is not given to a peer."""
    names: dict[str, tuple[IPAddress, ...]] = {}
    left_out: list[str] = []
    taken: set[str] = set()
    reach = _Reach(plan)
    for name, addresses in _offered(topology):
        # Letters' case counts in etcd, and not in a name.
        if name.lower() in taken:
            continue
        taken.add(name.lower())
        if not addresses:
            continue
        # A peer's name is any text.
        if not is_dns_name(name) or name.endswith("."):
            left_out.append(f"{shown(name)} is not a host name")
            continue
        # The machine has no use for a family in which it has no address.
        addresses = tuple(address for address in addresses if address.version in reach.families)
        strange = [address for address in addresses if not reach.holds(address)]
        left_out += [f"{name} is not written as {address}, which is not routed here" for address in strange]
        if written := tuple(address for address in addresses if address not in strange):
            names[name] = written
            if not may_be_bare(name):
                left_out.append(f"{name} is written as {' and '.join(_long(name, prefix))} only")
    return MeshNames(names, tuple(left_out))


def _offered(topology: Topology) -> Iterator[tuple[str, tuple[IPAddress, ...]]]:
    for name in sorted(topology.snapshot.nodes):
        yield name, topology.snapshot.nodes[name].mesh_addresses
    for name in sorted(topology.peers):
        yield name, tuple(n.network_address for n in topology.peers[name].allowed_ips if n.num_addresses == 1)


class _Reach:
    """What goes into the mesh by a plan."""

    def __init__(self, plan: HostPlan) -> None:
        self._own = {address.ip for address in plan.addresses}
        self.families = {address.version for address in self._own}
        self._networks: dict[int, dict[int, set[int]]] = {4: {}, 6: {}}
        """Family -> by how many bits a network's address is shifted -> the networks."""
        for network in plan.routes:
            shift = network.max_prefixlen - network.prefixlen
            self._networks[network.version].setdefault(shift, set()).add(int(network.network_address) >> shift)

    def holds(self, address: IPAddress) -> bool:
        """Whether packets to it go into the mesh, or it is the machine's own there."""
        number = int(address)
        shifts = self._networks[address.version].items()
        return address in self._own or any(number >> shift in networks for shift, networks in shifts)


def with_block(
    text: bytes,
    interface: str,
    names: Mapping[str, tuple[IPAddress, ...]] | None,
    *,
    prefix: str,
    own: Collection[str] = (),
    by: str = BY_CONNECT,
) -> bytes:
    """The file with the block of `interface` saying `names`; None: without the block. `own`, the machine's names, are
    never written bare. `by` says in the block who writes it; `{}` is the prefix."""
    # In its place, if it has one: of several blocks each may be written at any time.
    head, tail = _around(text, interface, prefix)
    if not names:
        return head + tail
    taken = {*map(str.lower, own), *_names_in(head), *_names_in(tail)}
    lines = [f"{_begin(interface).decode()} ({by.replace('{}', prefix)})"]
    for name, addresses in names.items():
        written = [*_long(name, prefix), *([name] if may_be_bare(name) else [])]
        if free := " ".join(written_name for written_name in written if written_name.lower() not in taken):
            lines += [f"{address} {free}" for address in addresses]
    lines.append(_end(interface).decode())
    gap = b"" if not head or head.endswith(b"\n") else b"\n"
    return head + gap + "\n".join(lines).encode() + b"\n" + tail


def _begin(interface: str) -> bytes:
    return f"# kilo-etcd {interface}: begin".encode()


def _end(interface: str) -> bytes:
    return f"# kilo-etcd {interface}: end".encode()


def _around(text: bytes, interface: str, prefix: str) -> tuple[bytes, bytes]:
    """The text before and after the block; all of it before, if there is none. A second block is taken out."""
    lines = text.splitlines(keepends=True)
    blocks: list[range] = []
    at = 0
    while at < len(lines):
        if _is_marker(lines[at], _begin(interface)):
            blocks.append(range(at, _last(lines, at, interface, prefix) + 1))
            at = blocks[-1].stop
        else:
            at += 1
    if not blocks:
        return text, b""
    inside = {at for block in blocks for at in block}
    after = (line for at, line in enumerate(lines) if at >= blocks[0].stop and at not in inside)
    return b"".join(lines[: blocks[0].start]), b"".join(after)


def _is_marker(line: bytes, marker: bytes) -> bool:
    return line.rstrip() == marker or line.startswith(marker + b" ")


def _last(lines: Sequence[bytes], first: int, interface: str, prefix: str) -> int:
    """The last line of the block that begins with line `first`."""
    for at in range(first + 1, len(lines)):
        if lines[at].rstrip() == _end(interface):
            return at
        if _MARKER.match(lines[at]):
            break
    # Somebody has cut the end off.
    at = first + 1
    while at < len(lines) and _ours(lines[at], prefix):
        at += 1
    return at - 1


_MARKER = re.compile(rb"# kilo-etcd \S+: (begin|end)\b")


def _ours(line: bytes, prefix: str) -> bool:
    """Whether a line outside a whole block has the form of ours: an address, and the forms of one name, a long
    one among them."""
    words = line.decode(errors="replace").split()[1:]
    suffixes = (f".{domain(prefix)}", f".{ANY_MESH}")
    names = {word.removesuffix(suffix) for word in words for suffix in suffixes if word.endswith(suffix)}
    return any({*words} <= {name, *_long(name, prefix)} for name in names)


def _names_in(text: bytes) -> Iterator[str]:
    for line in text.decode(errors="replace").splitlines():
        words: Iterable[str] = line.partition("#")[0].split()[1:]
        yield from (word.lower() for word in words)
