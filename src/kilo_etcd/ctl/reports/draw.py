"""The mesh's picture in other hands: Mermaid for wikis, JSON for programs, SVG and PNG by graphviz.

What is drawn is `topology.graph`'s; its DOT is there too.
"""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Collection, Mapping

from kilo_etcd.topology.graph import Edge, EdgeKind, EdgeState, clusters, edges, ordered, touches
from kilo_etcd.topology.segments import Topology
from kilo_etcd.topology.stages import switch


class CannotDraw(Exception):
    """The picture could not be made; the message is one sentence."""


def picture(dot: str, kind: str) -> bytes:
    """DOT as `svg` or `png`, drawn by graphviz. CannotDraw."""
    try:
        completed = subprocess.run(["circo", f"-T{kind}"], input=dot.encode(), capture_output=True, check=False)
    except FileNotFoundError:
        raise CannotDraw(
            "circo is not installed, which draws the picture: install graphviz, or take -o dot, mermaid or json"
        ) from None
    if completed.returncode or not completed.stdout:
        raise CannotDraw(f"circo could not draw the picture: {completed.stderr.decode(errors='replace').strip()}")
    return completed.stdout


def mermaid(topology: Topology, states: Mapping[Edge, EdgeState], gone: Collection[str] | None = None) -> str:
    """A Mermaid flowchart. Names are in labels only, escaped; ids are numbers."""
    far = switch(topology)
    title = f"{', '.join(map(str, topology.snapshot.subnets))}; internal-ips {topology.internal_ips}"
    title += f" ({far})" if far is not None else ""
    lines = ["---", f'title: "{title}"', "---", "flowchart LR"]
    ids: dict[tuple[str, str], str] = {}
    for number, cluster in enumerate(clusters(topology)):
        title = f"location: {cluster.label}" if cluster.label else "default location"
        lines.append(f"    subgraph s{number}[{_quoted(title)}]")
        for node in cluster.nodes:
            ids["node", node.name] = name = f"n{len(ids)}"
            addresses = ", ".join(map(str, node.mesh_addresses)) or "no mesh address"
            shape = "([{}])" if node.name in cluster.leaders else "({})"
            absent = ["gone"] if node.name in (gone or ()) else []
            lines.append(f"        {name}{shape.format(_quoted(node.name, *absent, addresses))}")
        lines.append("    end")
    for peer in sorted(topology.peers):
        ids["peer", peer] = name = f"p{len(ids)}"
        allowed = ", ".join(map(str, topology.peers[peer].allowed_ips))
        lines.append(f"    {name}[{_quoted(peer, allowed)}]")
    if grey := [ids["node", name] for name in sorted(gone or ()) if ("node", name) in ids]:
        lines.append("    classDef gone fill:#f5f5f5,stroke:#9e9e9e,color:#757575,stroke-dasharray:4 3")
        lines.append(f"    class {','.join(grey)} gone")
    good, bad, stale = [], [], []
    for number, edge in enumerate(ordered(edges(topology))):
        arrow = {EdgeKind.TUNNEL: "<-->", EdgeKind.LOCAL: "-.-", EdgeKind.PEER: "-.->"}[edge.kind]
        state = states.get(edge)
        if touches(edge, gone or ()):
            stale.append(str(number))
        elif state is not None and state.up is False:
            bad.append(str(number))
            arrow += f"|{_quoted(state.text)}|"
        elif state is not None and state.up:
            good.append(str(number))
        other = ids["peer" if edge.kind is EdgeKind.PEER else "node", edge.other]
        lines.append(f"    {ids['node', edge.one]} {arrow} {other}")
    for numbers, colour in ((good, "#2e7d32"), (bad, "#c62828"), (stale, "#9e9e9e")):
        if numbers:
            lines.append(f"    linkStyle {','.join(numbers)} stroke:{colour}")
    return "\n".join(lines) + "\n"


def _quoted(*lines: str) -> str:
    """A label: Mermaid has HTML's entities, written with `#` in place of `&`."""
    escaped = (re.sub(r"[^\w .,:/\[\]()@+-]", lambda match: f"#{ord(match[0])};", line) for line in lines)
    return '"' + "<br>".join(escaped) + '"'


def graph_json(topology: Topology, states: Mapping[Edge, EdgeState], gone: Collection[str] | None = None) -> str:
    """The picture as data; stable (docs/kgctl.md)."""
    leaders = {name for cluster in clusters(topology) for name in cluster.leaders}
    return json.dumps(
        {
            "subnets": list(map(str, topology.snapshot.subnets)),
            "granularity": topology.snapshot.granularity.value,
            "internalIps": topology.internal_ips.value,
            "switch": None if (far := switch(topology)) is None else str(far),
            "clusters": [
                {"location": cluster.label, "nodes": [node.name for node in cluster.nodes]}
                for cluster in clusters(topology)
            ],
            "nodes": [
                {
                    "name": node.name,
                    "location": node.location,
                    "leader": node.name in leaders,
                    "alive": None if gone is None else node.name not in gone,
                    "meshAddresses": list(map(str, node.mesh_addresses)),
                    "internalIps": list(map(str, node.internal_ips)),
                    "endpoints": list(map(str, node.endpoints)),
                }
                for _, node in sorted(topology.snapshot.nodes.items())
            ],
            "peers": [
                {
                    "name": name,
                    "allowedIPs": list(map(str, peer.allowed_ips)),
                    "endpoint": str(peer.endpoint) if peer.endpoint else None,
                }
                for name, peer in sorted(topology.peers.items())
            ],
            "edges": [
                {"one": edge.one, "other": edge.other, "kind": edge.kind.value, **_state(states.get(edge))}
                for edge in ordered(edges(topology))
            ],
        },
        indent=2,
        ensure_ascii=False,
    )


def _state(state: EdgeState | None) -> dict[str, object]:
    return {"up": state.up if state else None, "says": state.text if state else None}
