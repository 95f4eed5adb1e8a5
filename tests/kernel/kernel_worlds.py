"""Small worlds for the kernel's tests: keys, plans, and plans that hypothesis draws."""

from __future__ import annotations

import base64
from ipaddress import ip_address, ip_interface, ip_network

from attrs import evolve
from hypothesis import strategies as st

from kilo_etcd.kernel.diff import diff
from kilo_etcd.kernel.predict import apply_changes, network_order
from kilo_etcd.kernel.state import DeviceTarget, Memory, Observed
from kilo_etcd.model import Endpoint
from kilo_etcd.model.hostplan import Encryption, Exemption, HostPlan, PeerPlan, RoutePlan, Via

PRIVATE = base64.b64encode(bytes([9]) * 32).decode()


def key(number: int) -> str:
    return base64.b64encode(bytes([number]) * 32).decode()


def peer(
    number: int,
    *allowed: str,
    endpoint: str | None = None,
    keepalive: int = 0,
    psk: str | None = None,
    observed: bool = False,
) -> PeerPlan:
    return PeerPlan(
        public_key=key(number),
        name=f"node-{number}",
        endpoint=None if endpoint is None else Endpoint.parse(endpoint),
        observed=observed,
        allowed_ips=tuple(sorted((ip_network(a) for a in allowed), key=network_order)),
        persistent_keepalive=keepalive,
        preshared_key=psk,
    )


def tunnel(destination: str, source: str | None = None) -> RoutePlan:
    return RoutePlan(
        destination=ip_network(destination), via=Via.TUNNEL, source=None if source is None else ip_address(source)
    )


def via(destination: str, gateway: str, way: Via = Via.UNDERLAY, source: str | None = None) -> RoutePlan:
    return RoutePlan(
        destination=ip_network(destination),
        via=way,
        gateway=ip_address(gateway),
        source=None if source is None else ip_address(source),
    )


def plan(
    *parts: PeerPlan | RoutePlan,
    addresses: tuple[str, ...] = ("10.4.0.1/32",),
    unreachable_routes: tuple[str, ...] = (),
    forwarding: tuple[int, ...] = (),
    ipip: tuple[str, ...] = (),
    ipip_local: str | None = None,
    masquerade: tuple[str, ...] = (),
    masquerade_not: tuple[str, ...] = (),
    returns: tuple[RoutePlan, ...] = (),
    returns_refused: tuple[str, ...] = (),
    port: int = 51820,
    clamps: bool = False,
) -> HostPlan:
    return HostPlan(
        node="node-1",
        addresses=tuple(ip_interface(a) for a in addresses),
        listen_port=port,
        peers={p.public_key: p for p in parts if isinstance(p, PeerPlan)},
        routes={r.destination: r for r in parts if isinstance(r, RoutePlan)},
        unreachable_routes=tuple(ip_network(n) for n in unreachable_routes),
        forwarding=frozenset(forwarding),
        clamps=clamps,
        ipip_remotes=frozenset(ip_address(a) for a in ipip),
        ipip_local=None if ipip_local is None else ip_address(ipip_local),
        masquerade=tuple(ip_network(n) for n in masquerade),
        masquerade_not=frozenset(ip_address(a) for a in masquerade_not),
        returns={r.destination: r for r in returns},
        returns_refused={ip_network(text): "it does not answer" for text in returns_refused},
    )


TARGET = DeviceTarget(public_key=key(200), private_key=PRIVATE)


def host_with(wanted: HostPlan, target: DeviceTarget = TARGET) -> Observed:
    """A host on which `wanted` was applied."""
    return apply_changes(Observed(), diff(wanted, Observed(), Memory(), target), target.interface)


def lines(changes: object) -> list[str]:
    """The changes as text, with keys as their number."""
    assert isinstance(changes, tuple)
    said = [str(change) for change in changes]
    for number in range(1, 20):
        said = [line.replace(key(number), f"#{number}") for line in said]
    return said


NETWORKS = tuple(
    ip_network(text)
    for text in (
        "10.4.0.2/32", "10.4.0.3/32", "10.4.0.4/32", "10.5.0.0/24", "10.5.1.0/24", "10.6.0.0/16", "fd00:4::2/128",
        "fd00:5::/64",
    )
)  # fmt: skip
ENDPOINTS = ("203.0.113.1:51820", "203.0.113.2:51820", "198.51.100.7:4000", "node.example.org:51820")
GATEWAY4, GATEWAY6 = "192.168.9.77", "fd00:9::77"


@st.composite
def plans(draw: st.DrawFn, ipip: bool = True, v6_via_v4: bool = False) -> HostPlan:
    """Plans of a few peers and routes, of which any two have much in common."""
    owner = {network: draw(st.integers(0, 4)) for network in NETWORKS}
    peers = []
    for number in draw(st.sets(st.integers(1, 4))):
        mine = [str(network) for network, o in owner.items() if o == number]
        peers.append(
            peer(
                number,
                *mine,
                endpoint=draw(st.sampled_from((None, *ENDPOINTS))),
                keepalive=draw(st.sampled_from((0, 10, 25))),
                psk=draw(st.sampled_from((None, key(90), key(91)))),
                observed=draw(st.booleans()),
            )
        )
    addresses = draw(st.sampled_from((("10.4.0.1/32",), ("10.4.0.1/32", "fd00:4::1/128"), ("10.4.0.9/32",))))
    routes = []
    for network in draw(st.sets(st.sampled_from(NETWORKS))):
        source = next((a.split("/")[0] for a in addresses if (":" in a) == (network.version == 6)), None)
        ways = [Via.TUNNEL, Via.UNDERLAY] + ([Via.IPIP] if ipip and network.version == 4 else [])
        way = draw(st.sampled_from(ways))
        gateway = GATEWAY4 if network.version == 4 else GATEWAY6
        routes.append(tunnel(str(network), source) if way is Via.TUNNEL else via(str(network), gateway, way, source))
    back: tuple[RoutePlan, ...] = draw(st.sampled_from(((), (tunnel(f"{GATEWAY6}/128"),))))
    encapsulated_back = (via(f"{GATEWAY4}/32", GATEWAY4, Via.IPIP),) if ipip else ()
    back += draw(st.sampled_from(((), (tunnel(f"{GATEWAY4}/32"),), encapsulated_back)))
    encapsulated = any(route.via is Via.IPIP for route in (*routes, *back))
    drawn = plan(
        *peers,
        *routes,
        addresses=addresses,
        unreachable_routes=draw(st.sampled_from(((), ("10.4.0.0/16",), ("10.5.0.0/24", "fd00:4::/64")))),
        forwarding=draw(st.sampled_from(((), (4,), (4, 6)))),
        ipip=(GATEWAY4,) if encapsulated else (),
        ipip_local="192.168.9.1" if encapsulated else None,
        masquerade=draw(st.sampled_from(((), ("192.168.1.50/32", "fd00:7::/61")))),
        returns=back,
        returns_refused=draw(st.sampled_from(((), ("192.168.9.9/32",), ("192.168.9.9/32", "fd00:9::9/128")))),
        masquerade_not=draw(st.sampled_from(((), ("192.168.1.50",)))),
        port=draw(st.sampled_from((51820, 51821))),
    )
    return evolve(drawn, encryption=draw(st.none() | encryptions(encapsulated)))


OTHERS = tuple(map(ip_network, ("192.168.9.2/32", "192.168.9.3/32", "10.2.0.7/32", "fd00:9::2/128", "fd00:9::3/128")))
"""Addresses of other segments' nodes."""
OWN4, OWN6 = "192.168.9.1", "fd00:9::1"


@st.composite
def encryptions(draw: st.DrawFn, ipip: bool = False) -> Encryption:
    """`ipip`: whether the plan has the device."""
    where = {network: draw(st.sampled_from(("", "send", "hold"))) for network in OTHERS}
    send = {}
    for network in (network for network, stage in where.items() if stage == "send"):
        version = network.version
        way = draw(st.sampled_from((Via.TUNNEL, Via.UNDERLAY, *([Via.IPIP] if ipip and version == 4 else []))))
        own, gateway = (OWN4, GATEWAY4) if version == 4 else (OWN6, GATEWAY6)
        send[network] = tunnel(str(network), own) if way is Via.TUNNEL else via(str(network), gateway, way, own)
    nodes = [network.network_address for network in OTHERS]
    return Encryption(
        nodes=frozenset(draw(st.sets(st.sampled_from(nodes)))),
        send=send,
        hold=frozenset(network for network, stage in where.items() if stage == "hold"),
        refuse=frozenset(draw(st.sets(st.sampled_from(nodes)))),
        etcd=tuple((ip_address(a), 2379) for a in draw(st.sets(st.sampled_from(("192.168.9.2", "fd00:9::2"))))),
        etcd_here=draw(st.sampled_from(((), (2379, 2380)))),
        sources=(ip_address(OWN4), ip_address(OWN6)),
        talk=draw(st.sampled_from(((), (1107,)))),
        accepted_sources=draw(st.sampled_from(((), (ip_network("10.4.0.0/16"), ip_network("192.168.9.7/32"))))),
        clear=draw(st.sampled_from(((), (Exemption.parse("tcp/22@192.168.8.0/21"),)))),
    )
