"""A host plan as text that a network engineer reads without a manual: one line per fact, as `ip` and `wg` say it.

It is for tests, logs and `kgctl explain`; the commands that change a kernel are `kernel`'s to print. Pre-shared
keys are named as present, never shown.
"""

from __future__ import annotations

from collections.abc import Iterator

from kilo_etcd.model.hostplan import Encryption, HostPlan, PeerPlan, RoutePlan, Via
from kilo_etcd.topology.prefix_allocation import network_key


def render(plan: HostPlan) -> str:
    """The plan in lines sorted alike on every host, without the revision."""
    lines = [f"addr {address}" for address in plan.addresses]
    lines += [_peer(peer) for peer in sorted(plan.peers.values(), key=lambda peer: (peer.name, peer.public_key))]
    lines += [_route(plan.routes[key]) for key in sorted(plan.routes, key=network_key)]
    lines += [f"out of the tunnel: {_route(plan.returns[key])}" for key in sorted(plan.returns, key=network_key)]
    lines += [f"out of the tunnel: unreachable {key}" for key in sorted(plan.returns_refused, key=network_key)]
    if plan.forwarding:
        lines.append("forward " + " ".join(f"ipv{version}" for version in sorted(plan.forwarding)))
    if plan.ipip_remotes:
        remotes = " ".join(str(ip) for ip in sorted(plan.ipip_remotes, key=lambda ip: (ip.version, int(ip))))
        lines.append(f"ipip local {plan.ipip_local} remote {remotes}")
    if plan.masquerade:
        text = "masquerade to " + ",".join(map(str, plan.masquerade))
        nodes = sorted(plan.masquerade_not, key=lambda ip: (ip.version, int(ip)))
        lines.append(text + (f" but not to {','.join(map(str, nodes))}" if nodes else ""))
    if plan.is_exit_node:
        lines.append("exit node but not to " + ",".join(map(str, plan.inside)))
    if plan.blocked:
        lines.append("blocked " + ",".join(map(str, plan.blocked)))
    if plan.exit_route is not None:
        families = " ".join(f"ipv{version}" for version in sorted(plan.exit_route.families))
        hops = "".join(f" via {route.gateway} {route.via}" for route in plan.exit_route.by) or " dev wg"
        bypass = ",".join(map(str, plan.exit_route.bypass)) or "nobody"
        lines.append(f"default{hops} {families or 'refused'} but not to {bypass}")
        if plan.exit_route.sources:
            lines.append(f"default but not from {','.join(map(str, plan.exit_route.sources))}")
    if plan.encryption is not None:
        lines += _encrypted(plan.encryption)
    lines += [f"problem {problem.subject}: {problem.text}" for problem in plan.problems]
    return "\n".join(lines) + "\n"


def _encrypted(encryption: Encryption) -> Iterator[str]:
    for network in sorted((*encryption.send, *encryption.hold), key=network_key):
        yield (
            f"encrypted {_route(encryption.send[network])}"
            if network in encryption.send
            else f"encrypted hold {network}"
        )
    refused = sorted(encryption.refuse, key=lambda ip: (ip.version, int(ip)))
    if refused:
        yield "encrypted refuse " + ",".join(map(str, refused))
    bypass = [f"{address} tcp/{port}" for address, port in encryption.etcd]
    bypass += [f"tcp/{port} here" for port in encryption.etcd_here]
    bypass += [f"udp/{port}" for port in encryption.talk]
    bypass += [f"from {address}" for address in encryption.clear_sources]
    bypass += map(str, encryption.clear)
    yield "encrypted but not " + (", ".join(bypass) or "anything")


def _peer(peer: PeerPlan) -> str:
    text = f"peer {peer.name}"
    if peer.endpoint is not None:
        text += f" endpoint {peer.endpoint}"
    text += " allowed " + (",".join(str(network) for network in peer.allowed_ips) or "nothing")
    if peer.persistent_keepalive:
        text += f" keepalive {peer.persistent_keepalive}"
    return text + (" psk" if peer.preshared_key else "")


def _route(route: RoutePlan) -> str:
    text = f"route {route.destination}"
    if route.gateway is not None:
        text += f" via {route.gateway}"
    text += {Via.TUNNEL: " dev wg", Via.UNDERLAY: "", Via.IPIP: " dev ipip"}[route.via]
    return text + (f" src {route.source}" if route.source is not None else "")
