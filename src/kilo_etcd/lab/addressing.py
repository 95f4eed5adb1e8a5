"""From a `Spec` to addresses, wires, routes and firewalls: the lab's network as text, before any of it exists.

Pure. What is promised: hosts of a site share LANs with private addresses; a public host has a documentation
address besides, routed without NAT; everything else is masqueraded at its site's router, which lets nothing
through between sites but WireGuard and etcd (and ICMP errors, without which path MTU discovery fails), unless the
lab is open, and counts all of it. Uplinks are routed point-to-point wires, so no neighbour table grows with the lab.

The text is what `ip -batch -` and `nft -f -` read; the tests compare it and the world feeds it to them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_interface, ip_network

from attrs import frozen

from kilo_etcd.lab.spec import HostSpec, SiteSpec, Spec, SpecError
from kilo_etcd.model import IPAddress, IPInterface, IPNetwork

ETCD_PORT = 2379
ETCD_PEER_PORT = 2380
WIREGUARD_PORT = 51820
CUTS = ("etcd", "location", "others", "all", "forwarding", "port", "fifth")
"""From whom, or of what: `forwarding` is what goes through it, `port` WireGuard's, `fifth` one packet in five there."""
SITE_CUTS = ("etcd", "others", "all")

# Documentation networks (RFC 5737, RFC 3849) stand for the internet; `model.is_public` agrees.
_PUBLIC = {4: ip_network("198.51.100.0/24"), 6: ip_network("2001:db8:1::/64")}
_ROUTERS = {4: ip_network("203.0.113.0/24"), 6: ip_network("2001:db8:3::/64")}
_SERVERS = {4: ip_network("192.0.2.0/24"), 6: ip_network("2001:db8:2::/64")}
_GATEWAY = {4: ip_address("203.0.113.254"), 6: ip_address("2001:db8:3::fffe")}
_ERRORS4 = "destination-unreachable, time-exceeded, parameter-problem"
_ERRORS6 = "destination-unreachable, packet-too-big, time-exceeded, parameter-problem"


def router_of(site: str) -> str:
    """The machine name of a site's router."""
    return f"router:{site}"


def member_of(number: int) -> str:
    """The machine name of an etcd member, counted from 1."""
    return f"etcd:etcd{number}"


@frozen(kw_only=True)
class Wire:
    """A veth pair between two machines; the MAC is the first end's, the same after every power cycle."""

    machine: str
    interface: str
    mac: str
    other: str
    other_interface: str
    mtu: int = 1500
    """Bytes, at both ends."""


@frozen(kw_only=True)
class LabAddresses:
    """Where a host is found on the underlay."""

    name: str
    site: str
    bridge: str
    private: tuple[IPInterface, ...]
    public: tuple[IPAddress, ...]
    gateways: tuple[IPAddress, ...]
    wire: Wire

    @property
    def addresses(self) -> tuple[IPAddress, ...]:
        """All its underlay addresses."""
        return tuple(interface.ip for interface in self.private) + self.public


@frozen(kw_only=True)
class SiteAddresses:
    """A site's networks and its router's address on the internet."""

    name: str
    subnets: tuple[tuple[IPNetwork, ...], ...]
    """One tuple per LAN, with one network per family."""
    wan: tuple[IPAddress, ...]
    wire: Wire


@frozen(kw_only=True)
class Layout:
    """All addresses of a lab."""

    hosts: Mapping[str, LabAddresses]
    sites: Mapping[str, SiteAddresses]
    members: Mapping[str, tuple[IPAddress, ...]]
    operator: tuple[IPAddress, ...]
    spec: Spec

    @property
    def endpoints(self) -> tuple[str, ...]:
        """etcd's client URLs."""
        return tuple(f"http://{literal(addresses[0])}:{ETCD_PORT}" for addresses in self.members.values())

    def endpoints_for(self, machine: str) -> tuple[str, ...]:
        """etcd's client URLs in a family that the machine has, IPv4 where it has both."""
        host = self.hosts.get(machine)
        versions = {ip.version for ip in (host.addresses if host else self.operator)}
        return tuple(
            f"http://{literal(next(ip for ip in addresses if ip.version in versions))}:{ETCD_PORT}"
            for addresses in self.members.values()
        )

    @property
    def servers(self) -> tuple[IPAddress, ...]:
        """The addresses of etcd and of the operator."""
        return tuple(ip for addresses in self.members.values() for ip in addresses) + self.operator

    @property
    def machines(self) -> tuple[str, ...]:
        """Every machine, in the order in which they are best made."""
        return (
            "internet",
            "operator",
            *self.members,
            *(router_of(site) for site in self.sites),
            *self.hosts,
        )

    @property
    def wires(self) -> tuple[Wire, ...]:
        """All wires."""
        servers = {"operator": self.operator, **self.members}
        return (
            *(_server_wire(name, number) for number, name in enumerate(servers)),
            *(site.wire for site in self.sites.values()),
            *(host.wire for host in self.hosts.values()),
        )


def lay_out(spec: Spec) -> Layout:
    """Give every machine its addresses. SpecError when there is not enough room in a subnet."""
    versions = tuple(4 if family == "ipv4" else 6 for family in spec.families)
    hosts: dict[str, LabAddresses] = {}
    sites: dict[str, SiteAddresses] = {}
    for number, site in enumerate(spec.sites, 1):
        subnets = _subnets(site, number, versions)
        sites[site.name] = SiteAddresses(
            name=site.name,
            subnets=subnets,
            wan=tuple(_ROUTERS[v][number] for v in versions),
            wire=Wire(
                machine=router_of(site.name),
                interface="wan",
                mac=_mac(1, number),
                other="internet",
                other_interface=f"site{number}",
                mtu=site.mtu,
            ),
        )
        used = [0] * len(subnets)
        for host in site.hosts:
            hosts[host.name] = _host(
                host, site, subnets[host.subnet], used[host.subnet], len(hosts) + 1, versions, hosts
            )
            used[host.subnet] += 1
    return Layout(
        hosts=hosts,
        sites=sites,
        members={member_of(i): tuple(_SERVERS[v][i] for v in versions) for i in range(1, spec.etcd + 1)},
        operator=tuple(_SERVERS[v][100] for v in versions),
        spec=spec,
    )


def _subnets(site: SiteSpec, number: int, versions: tuple[int, ...]) -> tuple[tuple[IPNetwork, ...], ...]:
    own = site.subnets or (f"10.{100 + number}.0.0/24",)
    return tuple(
        tuple(
            IPv4Network(text) if v == 4 else IPv6Network(f"fd00:{100 + number}:{lan}::/64") for v in versions
        )
        for lan, text in enumerate(own)
    )  # fmt: skip


def _host(
    host: HostSpec,
    site: SiteSpec,
    networks: tuple[IPNetwork, ...],
    used: int,
    number: int,
    versions: tuple[int, ...],
    others: Mapping[str, LabAddresses],
) -> LabAddresses:
    # Addresses start at the eleventh where there is room, as DHCP servers do, so that they look like hosts'.
    first = 11 if all(network.num_addresses > 64 for network in networks) else 2
    if any(first + used >= network.num_addresses - 1 for network in networks):
        raise SpecError(f"site {site.name}: {networks[0]} has no address left for host {host.name}")
    own_versions = {4 if family == "ipv4" else 6 for family in host.families} or set(versions)
    public = 1 + sum(bool(other.public) for other in others.values())
    return LabAddresses(
        name=host.name,
        site=site.name,
        bridge=f"lan{host.subnet}",
        private=tuple(_interface(network, first + used) for network in networks if network.version in own_versions),
        public=tuple(_PUBLIC[v][public] for v in versions if v in own_versions) if host.public else (),
        gateways=tuple(network[1] for network in networks if network.version in own_versions),
        wire=Wire(
            machine=host.name,
            interface="eth0",
            mac=_mac(2, number),
            other=router_of(site.name),
            other_interface=f"port{number}",
            mtu=site.mtu,
        ),
    )


def _interface(network: IPNetwork, index: int) -> IPInterface:
    return ip_interface(f"{network[index]}/{network.prefixlen}")


def _server_wire(name: str, number: int) -> Wire:
    return Wire(
        machine=name, interface="eth0", mac=_mac(3, number), other="internet", other_interface=f"server{number}"
    )


def _mac(kind: int, number: int) -> str:
    return f"02:6b:{kind:02x}:00:{number >> 8:02x}:{number & 255:02x}"


def literal(ip: IPAddress) -> str:
    """An address as written in a URL."""
    return f"[{ip}]" if ip.version == 6 else str(ip)


def _single(ip: IPAddress) -> str:
    return f"{ip}/{ip.max_prefixlen}"


def _add(ip: str, interface: str) -> str:
    # Duplicate address detection would keep an IPv6 address unusable for a second.
    return f"addr add {ip} dev {interface}" + (" nodad" if ":" in ip else "")


def _any(version: int) -> str:
    return "0.0.0.0/0" if version == 4 else "::/0"


# --- what each machine is told -------------------------------------------------------------------------------


def sysctls(machine: str) -> dict[str, str]:
    """Settings below /proc/sys/net, made before the machine has any interface."""
    forwards = machine == "internet" or machine.startswith("router:")
    on = "1" if forwards else "0"
    # New namespaces take these from the machine outside, where anything may be set.
    return {
        "ipv4/conf/all/rp_filter": "0",
        "ipv4/conf/default/rp_filter": "0",
        "ipv4/ip_forward": on,
        "ipv6/conf/all/forwarding": on,
        # No second of waiting for duplicate addresses that cannot be.
        "ipv6/conf/all/accept_dad": "0",
        "ipv6/conf/default/accept_dad": "0",
    }


def wire_command(wire: Wire, pids: Mapping[str, int]) -> str:
    """`ip` command that makes the wire between two network namespaces named by a process in each."""
    mtu = f" mtu {wire.mtu}" if wire.mtu != 1500 else ""
    return (
        f"link add name {wire.interface} address {wire.mac}{mtu} netns {pids[wire.machine]} type veth "
        f"peer name {wire.other_interface}{mtu} netns {pids[wire.other]}"
    )


def interface_commands(layout: Layout, machine: str) -> list[str]:
    """`ip` commands inside a machine once its wires are there."""
    if machine == "internet":
        return _internet(layout)
    if machine.startswith("router:"):
        return _router(layout, layout.sites[machine.removeprefix("router:")])
    if machine in layout.hosts:
        return _host_commands(layout.hosts[machine])
    return _uplink("eth0", layout.operator if machine == "operator" else layout.members[machine])


def _uplink(interface: str, addresses: Iterable[IPAddress]) -> list[str]:
    lines = ["link set lo up"]
    lines += [_add(_single(ip), interface) for ip in addresses]
    lines.append(f"link set {interface} up")
    lines += [f"route add {_any(ip.version)} via {_GATEWAY[ip.version]} dev {interface} onlink" for ip in addresses]
    return lines


def _internet(layout: Layout) -> list[str]:
    lines = ["link set lo up"]
    servers = {"operator": layout.operator, **layout.members}
    ends: list[tuple[str, tuple[IPAddress, ...], list[IPAddress]]] = [
        (f"server{number}", addresses, []) for number, addresses in enumerate(servers.values())
    ]
    for site in layout.sites.values():
        behind = [ip for host in layout.hosts.values() if host.site == site.name for ip in host.public]
        ends.append((site.wire.other_interface, site.wan, behind))
    for interface, addresses, behind in ends:
        lines += [_add(_single(_GATEWAY[ip.version]), interface) for ip in addresses]
        lines.append(f"link set {interface} up")
        lines += [f"route add {_single(ip)} dev {interface}" for ip in addresses]
        via = {ip.version: ip for ip in addresses}
        lines += [f"route add {_single(ip)} via {via[ip.version]} dev {interface} onlink" for ip in behind]
    return lines


def _router(layout: Layout, site: SiteAddresses) -> list[str]:
    lines = []
    for lan, networks in enumerate(site.subnets):
        # Without an address of its own a bridge takes its ports' lowest, and would change it as hosts come and go.
        mac = f"02:6b:04:00:00:{lan:02x}"
        lines.append(f"link add name lan{lan} address {mac} type bridge forward_delay 0 mcast_snooping 0")
        lines += [_add(f"{network[1]}/{network.prefixlen}", f"lan{lan}") for network in networks]
        lines.append(f"link set lan{lan} up")
    lines += _uplink("wan", site.wan)
    for host in layout.hosts.values():
        if host.site == site.name:
            lines += [f"route add {_single(ip)} dev {host.bridge}" for ip in host.public]
            lines += port_commands(host)
    return lines


def port_commands(host: LabAddresses) -> list[str]:
    """`ip` commands in the router when a host is plugged in."""
    return [f"link set {host.wire.other_interface} master {host.bridge} addrgenmode none up"]


def _host_commands(host: LabAddresses) -> list[str]:
    lines = ["link set lo up"]
    lines += [_add(str(interface), "eth0") for interface in host.private]
    lines += [_add(_single(ip), "eth0") for ip in host.public]
    lines.append("link set eth0 up")
    public = {ip.version: ip for ip in host.public}
    for gateway in host.gateways:
        source = f" src {public[gateway.version]}" if gateway.version in public else ""
        lines.append(f"route add {_any(gateway.version)} via {gateway} dev eth0{source}")
    return lines


def hosts_file(layout: Layout, machine: str) -> str:
    """/etc/hosts: a host knows itself by its private address, as a person would write it, and the etcd members."""
    lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost"]
    if machine in layout.hosts:
        lines += [f"{interface.ip} {machine}" for interface in layout.hosts[machine].private]
    for name, addresses in layout.members.items():
        lines += [f"{ip} {name.removeprefix('etcd:')}" for ip in addresses]
    return "\n".join(lines) + "\n"


def router_firewall(layout: Layout, site: str, cuts: Iterable[str] = ()) -> str:
    """nftables script of a router: NAT, counters, what becomes of other packets, and the site's cuts."""
    verdict = "accept" if layout.spec.open else "drop"
    networks = [network for lan in layout.sites[site].subnets for network in lan]
    servers = [ip for addresses in layout.members.values() for ip in addresses]
    rules = []
    for ip in servers:
        family = "ip" if ip.version == 4 else "ip6"
        rules.append(f"{family} daddr {ip} tcp dport {ETCD_PORT} counter name etcd accept")
        rules.append(f"{family} saddr {ip} tcp sport {ETCD_PORT} counter name etcd accept")
    translate, answer = _nat(layout, site)
    masquerade = [f"oifname wan {'ip' if n.version == 4 else 'ip6'} saddr {n} masquerade" for n in networks]
    inside = ["iifname != wan oifname != wan accept"]
    if any(site_spec.name == site and site_spec.strict for site_spec in layout.spec.sites):
        inside = [*_between_hosts(layout, site), f"iifname != wan oifname != wan counter name stray {verdict}"]
    return f"""\
table inet lab {{
    counter wireguard {{ }}
    counter etcd {{ }}
    counter icmperrors {{ }}
    counter stray {{ }}
    counter other {{ }}
    chain cut {{
{_indent(_cut_rules(layout, cuts, site=site))}
    }}
    chain forward {{
        type filter hook forward priority 0; policy accept;
{_indent(inside)}
        jump cut
        udp dport {WIREGUARD_PORT} counter name wireguard accept
        udp sport {WIREGUARD_PORT} counter name wireguard accept
{_indent(rules)}
        icmp type {{ {_ERRORS4} }} counter name icmperrors accept
        icmpv6 type {{ {_ERRORS6} }} counter name icmperrors accept
        counter name other {verdict}
    }}
    chain nat {{
        type nat hook postrouting priority 100; policy accept;
{_indent(translate)}
{_indent(masquerade)}
    }}
{answer}}}
"""


def _nat(layout: Layout, site: str) -> tuple[list[str], str]:
    """What a site's kind of NAT adds to its router: rules before the masquerading, and chains.

    Each host's WireGuard has an outer port of its own, 40000 and the host's number, which a cone NAT shows to all (the
    kernel by itself takes the inner port where it is free towards that partner) and a symmetric one to nobody.
    """
    kind = next(site_spec.nat for site_spec in layout.spec.sites if site_spec.name == site)
    if not kind:
        return [], ""
    out, back = [], []
    for port, host in enumerate(layout.hosts.values(), 40001):
        for ip in (interface.ip for interface in host.private if host.site == site):
            family = "ip" if ip.version == 4 else "ip6"
            way = "to :20000-39999 fully-random" if kind == "symmetric" else f"to :{port}"
            out.append(f"oifname wan {family} saddr {ip} udp sport {WIREGUARD_PORT} masquerade {way}")
            if kind == "full-cone":
                inner = f"{literal(ip)}:{WIREGUARD_PORT}"
                # To the router's own address only: public hosts are behind it too.
                to = ", ".join(str(wan) for wan in layout.sites[site].wan if wan.version == ip.version)
                back.append(f"iifname wan {family} daddr {to} udp dport {port} dnat {family} to {inner}")
    # An answer of the router's own, "port unreachable", would hold the port that a host's packets need a moment later.
    answer = """\
    chain input {
        type filter hook input priority 0; policy accept;
        iifname wan meta l4proto udp drop
    }
"""
    if back:
        answer += f"""\
    chain back {{
        type nat hook prerouting priority -100; policy accept;
{_indent(back)}
    }}
"""
    return out, answer


def _between_hosts(layout: Layout, site: str) -> list[str]:
    """Rules that let pass what goes between the site's hosts by their own addresses, or stays on one subnet."""
    # A bridge may show its own traffic to these rules as well (net.bridge.bridge-nf-call-iptables).
    rules = [f"iifname lan{lan} oifname lan{lan} accept" for lan in range(len(layout.sites[site].subnets))]
    for version, family in ((4, "ip"), (6, "ip6")):
        names = ", ".join(
            str(ip)
            for host in layout.hosts.values()
            if host.site == site
            for ip in (*(interface.ip for interface in host.private), *host.public)
            if ip.version == version
        )
        if names:
            way = "iifname != wan oifname != wan"
            rules.append(f"{way} {family} saddr {{ {names} }} {family} daddr {{ {names} }} accept")
    return rules


def site_cut_script(layout: Layout, site: str, cuts: Iterable[str]) -> str:
    """nftables script that replaces a router's cuts."""
    lines = [f"add rule inet lab cut {rule}" for rule in _cut_rules(layout, cuts, site=site)]
    return "\n".join(["flush chain inet lab cut", *lines]) + "\n"


def host_cut_script(layout: Layout, host: str, cuts: Iterable[str]) -> str:
    """nftables script that replaces a host's cuts: silent drops at its underlay interface, before anything else."""
    cuts = set(cuts)
    rules = _cut_rules(layout, cuts - {"forwarding"}, host=host)
    table = "table inet lab-cut\ndelete table inet lab-cut\n"
    if not cuts:
        return table
    forward = "drop" if "forwarding" in cuts else "accept"
    return (
        table
        + f"""\
table inet lab-cut {{
    chain cut {{
{_indent(rules)}
    }}
    chain in {{
        type filter hook prerouting priority -400; policy accept;
        iifname eth0 jump cut
    }}
    chain out {{
        type filter hook postrouting priority 400; policy accept;
        oifname eth0 jump cut
    }}
    chain through {{
        type filter hook forward priority -400; policy {forward};
    }}
}}
"""
    )


def member_cut_script(*, cut: bool) -> str:
    """nftables script that drops silently what an etcd member and the others say to each other, or heals that."""
    table = "table inet lab-cut\ndelete table inet lab-cut\n"
    if not cut:
        return table
    return (
        table
        + f"""\
table inet lab-cut {{
    chain in {{
        type filter hook input priority -400; policy accept;
        tcp sport {ETCD_PEER_PORT} drop
        tcp dport {ETCD_PEER_PORT} drop
    }}
    chain out {{
        type filter hook output priority -400; policy accept;
        tcp sport {ETCD_PEER_PORT} drop
        tcp dport {ETCD_PEER_PORT} drop
    }}
}}
"""
    )


def _cut_rules(layout: Layout, cuts: Iterable[str], *, host: str = "", site: str = "") -> list[str]:
    rules: list[str] = []
    servers = [ip for addresses in layout.members.values() for ip in addresses]
    for cut in sorted(set(cuts)):
        if cut == "all":
            rules.append("drop")
        elif cut == "port":
            rules += [f"udp {way} {WIREGUARD_PORT} drop" for way in ("sport", "dport")]
        elif cut == "fifth":
            rules.append(f"udp sport {WIREGUARD_PORT} numgen random mod 5 == 0 drop")
        elif cut == "etcd":
            rules += _between(servers)
        elif cut == "location":
            own_site = layout.hosts[host].site
            rules += _between(
                ip
                for other in layout.hosts.values()
                if other.site == own_site and other.name != host
                for ip in other.addresses
            )
            rules += _passing_through(layout.hosts[host].addresses)
        else:
            rules += _between(_others(layout, host=host, site=site))
            rules += _passing_through(layout.hosts[host].addresses) if host else []
    return rules


def _passing_through(own: Iterable[IPAddress]) -> list[str]:
    """What is neither from nor to a host's own address is the mesh's, in clear, and so from or to its location."""
    rules = []
    for version, family in ((4, "ip"), (6, "ip6")):
        if texts := [str(ip) for ip in own if ip.version == version]:
            group = ", ".join(texts)
            rules.append(f"{family} saddr != {{ {group} }} {family} daddr != {{ {group} }} drop")
    return rules


def _others(layout: Layout, *, host: str, site: str) -> Iterable[IPAddress]:
    """Every address at which other hosts (or for a site: other sites' hosts) can appear."""
    own_site = site or layout.hosts[host].site
    for other in layout.hosts.values():
        if other.name != host and other.site != site:
            yield from other.public
            if other.site == own_site:
                yield from (interface.ip for interface in other.private)
    for name, addresses in layout.sites.items():
        if name != own_site:
            yield from addresses.wan


def _between(addresses: Iterable[IPAddress]) -> list[str]:
    rules = []
    by_family: dict[int, list[str]] = {}
    for ip in addresses:
        by_family.setdefault(ip.version, []).append(str(ip))
    for version, texts in by_family.items():
        family = "ip" if version == 4 else "ip6"
        group = ", ".join(texts)
        rules += [f"{family} saddr {{ {group} }} drop", f"{family} daddr {{ {group} }} drop"]
    return rules


def _indent(lines: Iterable[str]) -> str:
    return "\n".join(f"        {line}" for line in lines)


def netem_commands(layout: Layout) -> dict[str, list[str]]:
    """`tc` commands per machine for the latency and loss that the spec asks for; empty when it asks for none."""
    commands: dict[str, list[str]] = {}
    for site in layout.spec.sites:
        if not site.latency_ms and not site.loss_percent:
            continue
        wire = layout.sites[site.name].wire
        netem = f"netem limit 100000 delay {site.latency_ms}ms loss {site.loss_percent}%"
        for machine, interface in ((wire.machine, wire.interface), (wire.other, wire.other_interface)):
            commands.setdefault(machine, []).append(f"qdisc add dev {interface} root {netem}")
    return commands
