"""The shape of the mesh as a picture, in Graphviz's DOT and the look that Kilo's users know.

One dashed, rounded cluster for each location or lone segment; nodes with name, mesh address, internal IP and
endpoint; leaders with a thick line, joined to their members and to each other; outside peers at the rim. `edges` is
the same shape as data. Whatever names are in etcd, the output is valid DOT; it is for `circo -Tsvg`, which places
clusters but draws no boxes (`dot` and `fdp` do): so nodes of one location have one colour, and name it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from enum import StrEnum
from html import escape
from itertools import combinations
from operator import attrgetter

from attrs import frozen

from kilo_etcd.model import Node, Peer
from kilo_etcd.topology.ring import ring
from kilo_etcd.topology.segments import Segment, Topology
from kilo_etcd.topology.stages import switch

_COLOURS = (
    "#cfe2f3", "#d9ead3", "#fff2cc", "#f4cccc", "#d9d2e9", "#fce5cd", "#d0e0e3", "#ead1dc", "#e6e6e6", "#e2f0b6",
)  # fmt: skip

_STATES = {
    True: ', color="#2e7d32", edgetooltip={0}',
    False: ', color="#c62828", penwidth=2, fontcolor="#c62828", label={0}, edgetooltip={0}',
    None: ", edgetooltip={0}",
}


_GONE = 'fillcolor="#f5f5f5", color="#9e9e9e", fontcolor="#757575", style="filled,dashed"'

_LARGE, _SMALL = 17, 10
"""Points: of names, and of the addresses below them."""

CROWDED_NODES, CROWDED_EDGES = 200, 200
"""With more nodes and peers, or more edges, the picture says itself where each stands: circo would take too long (22 s
for a full mesh of 40 nodes)."""

LEGEND = (
    "leaders have a thick line; a dotted line is inside a location, a dashed one leads to a peer",
    "green: the tunnel has a session; red: it has none; grey: the agent does not report",
)
"""What the picture's lines mean."""


class EdgeKind(StrEnum):
    """What joins two ends."""

    TUNNEL = "tunnel"
    LOCAL = "local"
    """A leader and a member of its segment, inside their location."""
    PEER = "peer"
    """A node and an outside peer."""


_SPARSE = ("\toutputorder=nodesfirst;", "\toverlap=false;", "\tmindist=2.5;", "\tedge [arrowsize=0.6];")
# Whatever program reads it, neato lays it out, by the places of the nodes; so many arrowheads would hide their borders.
_CROWD = ("\toutputorder=edgesfirst;", "\tlayout=neato;", "\tsplines=line;", "\tedge [arrowhead=none, arrowtail=none];")

_LOOKS = {
    EdgeKind.TUNNEL: "dir=both",
    # Members stand close to their leader, so that arrowheads would touch.
    EdgeKind.LOCAL: "dir=none, style=dotted",
    EdgeKind.PEER: "dir=both, style=dashed",
}


@frozen
class Edge:
    """`one` and `other` are names; two nodes' come in order, and with PEER `other` is the outside peer's."""

    one: str
    other: str
    kind: EdgeKind


@frozen
class EdgeState:
    """What the hosts themselves report of a tunnel. `up` None: there is no report."""

    up: bool | None
    text: str
    """For people, as `handshake 12 s ago`."""


@frozen
class Cluster:
    """Nodes that are drawn together; a segment, or with `cross` all segments of one location."""

    label: str
    nodes: tuple[Node, ...]
    leaders: frozenset[str]


def edges(topology: Topology) -> frozenset[Edge]:
    """All edges of the picture. In a full mesh and in `cross` there are as many as pairs of nodes."""
    segments = list(topology.segments.values())
    policy = topology.policy
    result = set()
    for one, other in combinations((segment.leader for segment in segments), 2):
        if policy.tunnel_between(one, other):
            result.add(_edge(one, other, EdgeKind.TUNNEL))
    for segment in segments:
        leader = segment.leader
        for member in segment.members:
            if member.name != leader.name:
                result.add(_edge(leader, member, EdgeKind.LOCAL))
        result.update(Edge(leader.name, peer, EdgeKind.PEER) for peer in topology.peers)
    return frozenset(result)


def ordered(unordered: Iterable[Edge]) -> list[Edge]:
    """Edges by the names of their ends."""
    return sorted(unordered, key=attrgetter("one", "other", "kind"))


def _edge(one: Node, other: Node, kind: EdgeKind) -> Edge:
    return Edge(min(one.name, other.name), max(one.name, other.name), kind)


def clusters(topology: Topology) -> tuple[Cluster, ...]:
    """The clusters of the picture, by label and names."""
    groups: dict[str, list[Segment]] = defaultdict(list)
    for segment in topology.segments.values():
        together = topology.policy.direct_within_location and segment.leader.internal_ips
        groups[f"location {segment.location}" if together else f"segment {segment.key}"].append(segment)
    result = []
    for group in groups.values():
        nodes = tuple(sorted((node for segment in group for node in segment.members), key=lambda node: node.name))
        result.append(Cluster(group[0].location, nodes, frozenset(segment.leader.name for segment in group)))
    return tuple(sorted(result, key=lambda cluster: (cluster.label, [node.name for node in cluster.nodes])))


def touches(edge: Edge, gone: Collection[str]) -> bool:
    """Whether an edge ends at one of these nodes."""
    return edge.one in gone or (edge.kind is not EdgeKind.PEER and edge.other in gone)


def graph(
    topology: Topology, states: Mapping[Edge, EdgeState] | None = None, gone: Collection[str] | None = None
) -> str:
    """The picture as DOT. A node's id is its name; an outside peer's is its name after `peer `.

    With `states` tunnels that are up are green, those that are not red; what no host reports stays black. `gone`: the
    nodes whose agents do not report, which are grey, as is all that ends at them; None: that is not known.
    """
    subnets = ", ".join(str(subnet) for subnet in topology.snapshot.subnets)
    names = {("node", name): name for name in topology.snapshot.nodes}
    for name in topology.peers:
        identity = f"peer {name}"
        while identity in topology.snapshot.nodes:
            identity = f"peer {identity}"
        names["peer", name] = identity
    far = switch(topology)
    mode = f"internal-ips {topology.internal_ips}" + (f" ({far})" if far is not None else "")
    legend = [] if gone is None else LEGEND
    drawn, grouped = ordered(edges(topology)), clusters(topology)
    crowded = len(names) > CROWDED_NODES or len(drawn) > CROWDED_EDGES
    places = _places(grouped, sorted(topology.peers)) if crowded else {}
    colours: dict[str, str] = {}
    lines = [
        "digraph kilo {",
        f"\tlabel={_text(subnets, mode, *legend)};",
        "\tlabelloc=t;",
        *(_CROWD if crowded else _SPARSE),
        '\tnode [shape=ellipse, style=filled, fillcolor=white, fontname="sans-serif"];',
    ]
    for number, cluster in enumerate(grouped):
        colour = colours.setdefault(cluster.label, _COLOURS[len(colours) % len(_COLOURS)])
        label = f"location: {cluster.label}" if cluster.label else "default location"
        # The boxes of sectors of a ring would overlap.
        frame = 'peripheries=0;\n\t\tlabel=""' if crowded else f'label={_text(label)};\n\t\tstyle="dashed,rounded"'
        lines += [f"\tsubgraph cluster_{number} {{", f"\t\t{frame};"]
        for node in cluster.nodes:
            leads = ", penwidth=3" if node.name in cluster.leaders else ""
            absent = node.name in (gone or ())
            look = _GONE if absent else f'fillcolor="{colour}"'
            at = places.get(("node", node.name), "")
            lines.append(f"\t\t{_id(node.name)} [label={_node_label(node, absent)}, {look}{leads}{at}];")
        lines.append("\t}")
    for name in sorted(topology.peers):
        label = _peer_label(topology.peers[name])
        lines.append(f"\t{_id(names['peer', name])} [label={label}, style=dashed{places.get(('peer', name), '')}];")
    ids = {end: _id(name) for end, name in names.items()}
    for edge in drawn:
        other = ids["peer" if edge.kind is EdgeKind.PEER else "node", edge.other]
        look = _LOOKS[edge.kind]
        if touches(edge, gone or ()):
            look = ("dir=none" if edge.kind is EdgeKind.LOCAL else "dir=both") + ', style=dashed, color="#9e9e9e"'
        elif states and (state := states.get(edge)) is not None:
            look += _STATES[state.up].format(_text(state.text))
        lines.append(f"\t{ids['node', edge.one]} -> {other} [{look}];")
    return "\n".join([*lines, "}"]) + "\n"


def _places(grouped: Iterable[Cluster], peers: Sequence[str]) -> dict[tuple[str, str], str]:
    """The attribute that holds each node and peer to its place."""
    sectors = [(tuple(node.name for node in cluster.nodes), cluster.leaders) for cluster in grouped]
    *inside, rim = ring(sectors, peers)
    ends = [[("node", name) for name in names] for names, _ in sectors] + [[("peer", name) for name in peers]]
    return {
        end: f', pos="{x:.2f},{y:.2f}!"'
        for some, positions in zip(ends, [*inside, rim], strict=True)
        for end, (x, y) in zip(some, positions, strict=True)
    }


def _node_label(node: Node, gone: bool) -> str:
    mesh = ", ".join(str(address) for address in node.mesh_addresses) or "no mesh address"
    internal = ", ".join(str(address) for address in node.internal_ips) or "no internal IP"
    endpoints = [str(endpoint) for endpoint in node.endpoints] or ["no endpoint"]
    at = [f"at {node.location}"] if node.location else []
    return _named(node.name, *(["gone"] if gone else []), mesh, internal, *endpoints, *at)


def _peer_label(peer: Peer) -> str:
    allowed = ", ".join(str(network) for network in peer.allowed_ips)
    return _named(peer.name, allowed, *([str(peer.endpoint)] if peer.endpoint else []))


def _clean(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text
    # SVG, being XML, has no way to write control characters at all.
    legible = (c if c >= " " and not "\x7f" <= c <= "\x9f" and c not in "\ufffe\uffff" else "\ufffd" for c in text)
    return "".join(legible).encode(errors="replace").decode()


def _id(text: str) -> str:
    return '"' + _clean(text).replace("\\", "\\\\").replace('"', '\\"') + '"'


def _text(*lines: str) -> str:
    """A label; in labels, Graphviz reads `&...;` as HTML does and `\\` as an escape."""
    escaped = (_clean(line).replace("&", "&amp;").replace("\\", "\\\\").replace('"', '\\"') for line in lines)
    return '"' + "\\n".join(escaped) + '"'


def _named(name: str, *lines: str) -> str:
    """A label in Graphviz's HTML: a name, and small lines about it. Nothing may be empty, and a backslash escapes."""
    large, *small = (escape(_clean(line)).replace("\\", "\\\\") or "&#160;" for line in (name, *lines))
    below = "".join(f"<br/>{line}" for line in small)
    return f'<<font point-size="{_LARGE}">{large}</font><font point-size="{_SMALL}">{below}</font>>'
