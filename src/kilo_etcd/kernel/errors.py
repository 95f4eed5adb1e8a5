"""What can go wrong between us and the kernel, as sentences that say what to do.

`KernelError` is for what makes every plan impossible (no permission, no WireGuard, the interface's name taken);
what harms one route or one peer becomes a `FailedChange` in the report and the rest goes on.
"""

from __future__ import annotations

import errno
import os

from kilo_etcd.base import descriptors
from kilo_etcd.kernel.firewall import sizes
from kilo_etcd.kernel.firewall.openings import AddOpening, DeleteOpening
from kilo_etcd.kernel.firewall.table import ReplaceTable
from kilo_etcd.kernel.routing import encrypted
from kilo_etcd.kernel.routing.returns import is_returning
from kilo_etcd.kernel.routing.rules import AddRule, DeleteRule
from kilo_etcd.kernel.state import (
    MAIN_TABLE,
    UNREACHABLE_METRIC,
    AddAddress,
    AddRoute,
    AllowPings,
    Change,
    CreateLink,
    DeleteRoute,
    FailedChange,
    FilterChange,
    KeepAdvertisements,
    LoosenReversePath,
    ReplaceRoute,
    SetDevice,
    SetForwarding,
    SetUp,
)
from kilo_etcd.model import IPNetwork


class KernelError(Exception):
    """Nothing can be programmed at all; the message is one sentence for the operator."""


def why_not(error: OSError) -> str:
    """Why something could not be opened or done, as a clause: that descriptors are short, else the kernel's words."""
    # What netlink answers is about the kernel's own tables, not about descriptors of ours.
    short = None if isinstance(error, NetlinkError) else descriptors.shortage(error)
    return short or getattr(error, "detail", "") or error.strerror or str(error)


class NetlinkError(OSError):
    """The kernel's answer to one message; `detail` is its own explanation, if it gave any."""

    def __init__(self, code: int, detail: str = "") -> None:
        super().__init__(code, os.strerror(code))
        self.detail = detail


NO_PERMISSION = (
    "this process lacks the capability CAP_NET_ADMIN, without which no process may change the network: run it as root "
    "(sudo), or grant it (systemd unit: AmbientCapabilities=CAP_NET_ADMIN; container: --cap-add NET_ADMIN)"
)


_NO_NFTABLES = frozenset({errno.ENOENT, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.EAFNOSUPPORT, errno.EINVAL})
"""What a kernel says to a table of ours if it lacks nftables, a family, or an expression."""


def failure(change: Change, error: OSError) -> FailedChange:
    """Why `change` could not be made, with the step that helps where one is known."""
    destination = change.route.destination if isinstance(change, AddRoute | ReplaceRoute | DeleteRoute) else None
    aside = isinstance(change, FilterChange | LoosenReversePath)
    if isinstance(change, AddRoute | DeleteRoute) and change.route.unreachable:
        destination, aside = None, True
    if isinstance(change, AddRule | DeleteRule) or (
        isinstance(change, AddRoute | ReplaceRoute | DeleteRoute) and change.route.table != MAIN_TABLE
    ):
        # What an exit node or `encrypted` needs is nobody's way into the mesh.
        destination, aside = None, True
    if _is_by_unknown_gateway(change, error.errno or 0):
        # A member's way to its leader, or a leader's to a member. Into the mesh it would go by its own tunnels.
        aside = True
    version: int = change.address.version if isinstance(change, AddAddress) else 0
    if isinstance(change, SetForwarding) and not change.device:
        version = change.family
    return FailedChange(
        subject=str(change), text=_sentence(change, error), destination=destination, aside=aside, version=version
    )


def _is_by_unknown_gateway(change: Change, code: int) -> bool:
    """Whether a route could not be set because its gateway is on no network of this host."""
    if not isinstance(change, AddRoute | ReplaceRoute) or change.route.gateway is None:
        return False
    return code in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EINVAL)


def cannot_ping(error: OSError) -> str:
    """Why no echo request can be sent, with the step that helps where one is known."""
    if isinstance(error, PermissionError):
        change = AllowPings(os.getegid())
        name = _sysctl(change)
        return f"this process may not ping, since {name} leaves its group out: set it on the host with `{change}`"
    return f"this host cannot ping: {why_not(error)}"


_NOT_OURS_TO_SET = frozenset({errno.EROFS, errno.EACCES, errno.EPERM})

_Sysctl = AllowPings | KeepAdvertisements | LoosenReversePath | SetForwarding


def _sysctl(change: _Sysctl) -> str:
    """A sysctl's name, as `sysctl -w` takes it."""
    return str(change).removeprefix("sysctl -w ").partition("=")[0]


def _why_not_set(code: int) -> str:
    """Why a sysctl could not be set, as a clause in brackets."""
    if code == errno.EROFS:
        return " (/proc/sys is read-only)"
    return f" ({os.strerror(code)})"


def _set_by_hand(change: _Sysctl, code: int) -> str:
    """What to do about a sysctl that could not be set. In a container /proc/sys is mostly read-only, and if the
    container has a network of its own, the host's sysctl is another one."""
    on_host = f"set it on the host with `{change}`"
    if code != errno.EROFS:
        return on_host
    setting = str(change).removeprefix("sysctl -w ")
    # Of a device that comes later, a container manager can set nothing.
    of_device = isinstance(change, KeepAdvertisements | LoosenReversePath) or bool(getattr(change, "device", ""))
    managed = "" if of_device else f"have the container manager set it (docker run --sysctl {setting}), or "
    return f"{on_host}; in a container with a network of its own {managed}make /proc/sys writable there"


def unreadable(error: OSError) -> str:
    """Why neither the host's network state nor its WireGuard device can be read or changed at present."""
    return f"the kernel does not tell this host's network state: {why_not(error)}"


def _sentence(change: Change, error: OSError) -> str:
    code = error.errno or 0
    if descriptors.is_shortage(error) and not isinstance(error, NetlinkError):
        return f"`{change}` was not done: {why_not(error)}"
    if sizes.is_set_by(change):
        # It is tried without that chain.
        return (
            "TCP that this host forwards may be too large for the tunnel, since the kernel refuses the rules that "
            f"lower its segment size ({why_not(error)}): load the module nf_tables (before Linux 4.18 nft_exthdr and "
            "nft_rt too) and restart the agent, or give --no-clamp-mss"
        )
    if isinstance(change, KeepAdvertisements):
        return (
            f"{_sysctl(change)} could not be set to 2{_why_not_set(code)}: a host that forwards IPv6 loses what it has "
            f"from router advertisements on {change.name}, a default route for instance; {_set_by_hand(change, code)}"
        )
    if isinstance(change, AllowPings):
        return (
            f"this process may not ping, since {_sysctl(change)} could not be set{_why_not_set(code)}, so this host "
            f"does not notice a leader that does not forward: {_set_by_hand(change, code)}"
        )
    if isinstance(change, LoosenReversePath):
        return (
            f"{_sysctl(change)} could not be set to 2{_why_not_set(code)}: what nodes send to this host in clear, ARP "
            f"among it, is dropped on {change.name}; {_set_by_hand(change, code)}"
        )
    if isinstance(change, SetForwarding):
        name = _sysctl(change)
        if code in _NOT_OURS_TO_SET:
            return f"{name} could not be set to 1{_why_not_set(code)}: {_set_by_hand(change, code)}"
        if code == errno.ENOENT:
            if change.device:
                return f"{name} does not exist, since {change.device} is gone"
            return f"{name} does not exist: this kernel runs without IPv{change.family}"
    way = change.route if isinstance(change, AddRoute | ReplaceRoute) else None
    returning = isinstance(change, AddRule | AddRoute | ReplaceRoute) and is_returning(change)
    exit_route = way if way is not None and way.table != MAIN_TABLE and not returning else None
    if exit_route is not None and code == errno.EACCES and exit_route.destination.version == 6 and exit_route.device:
        name = exit_route.device
        if encrypted.is_table(exit_route.table):
            return (
                f"`{change}` failed, since IPv6 is switched off on {name}: what is for {exit_route.destination} is "
                f"dropped; set net.ipv6.conf.{name}.disable_ipv6=0"
            )
        return (
            f"`{change}` failed, since IPv6 is switched off on {name}: nothing leaves by the exit node in IPv6, and "
            f"connections to this host's own IPv6 addresses get no answer; set net.ipv6.conf.{name}.disable_ipv6=0"
        )
    if isinstance(change, AddOpening | DeleteOpening) and code == errno.EPERM:
        return (
            f"`{change}` was refused: the table belongs to the program that made it (nftables' flag owner), so "
            f"--forward-rules can do nothing there: {change.opening.remedy}"
        )
    if code == errno.EACCES and way is not None and way.destination.version == 6 and way.device:
        return (
            f"`{change}` failed, since IPv6 is switched off on {way.device}: set "
            f"net.ipv6.conf.{way.device}.disable_ipv6=0"
            + (", or use an IPv4 mesh subnet" if way.destination.prefixlen < 128 else "")
        )
    if code in (errno.EPERM, errno.EACCES) and not isinstance(change, AddAddress):
        return f"`{change}` was refused: {NO_PERMISSION}"
    if isinstance(change, AddAddress) and code in (errno.EACCES, errno.EPERM, errno.EOPNOTSUPP):
        if change.address.version == 6:
            return (
                f"{change.address} could not be put on {change.name}: IPv6 is switched off there, so the host sends "
                f"and receives no IPv6 by the mesh; set net.ipv6.conf.{change.name}.disable_ipv6=0, or use an IPv4 "
                "mesh subnet; if IPv6 was switched off on all devices (sysctl net.ipv6.conf.all.disable_ipv6), the "
                "kernel has taken the IPv6 addresses of the others away too: switch it on for all, and have their "
                "addresses set again"
            )
        return f"`{change}` was refused: {NO_PERMISSION}"
    if isinstance(change, ReplaceTable) and code in _NO_NFTABLES:
        lost = {
            "input": "IPIP is taken from anybody",
            "postrouting": "hosts without an agent do not answer the mesh",
            "output": "connections to this host's own IPv6 addresses get no answer as long as it has an exit node",
            "encrypted": "what comes in clear from other nodes is taken",
        }
        chains = [chain.name for chain in change.table.chains]
        lacking = " and ".join(lost[name] for name in chains if name in lost)
        modules = ["nf_tables", *(["nft_ct", "nft_reject_inet"] if "output" in chains else [])]
        modules += ["nft_nat", "nft_masq"] if any(chain.kind == "nat" for chain in change.table.chains) else []
        modules += ["nft_fib_inet", "nft_fib_ipv4", "nft_fib_ipv6"] if "encrypted" in chains else []
        *first, last = modules
        listed = f"modules {', '.join(first)} and {last}" if first else f"module {last}"
        return f"this kernel lacks nftables or a part of it, so {lacking}: load the {listed}"
    if isinstance(change, CreateLink) and change.kind == "ipip" and code in (errno.EOPNOTSUPP, errno.ENODEV):
        return (
            "this kernel has no IPIP (module ipip): load it, or use --encapsulate wireguard on this host, or "
            "--encapsulate never on all hosts of the location"
        )
    if isinstance(change, CreateLink) and change.kind == "ipip" and code == errno.EEXIST:
        return f"another IPIP device uses the local address {change.local or 'any'} already: remove it, then {change}"
    if isinstance(change, AddRoute | ReplaceRoute):
        route = change.route
        if code == errno.EEXIST:
            return collision(route.destination)
        if _is_by_unknown_gateway(change, code):
            return (
                f"the route to {route.destination} could not be set: its gateway {route.gateway} is not on a network "
                f"of this host; check the node's internal IP (--internal-cidr) or use --encapsulate always"
            )
    if isinstance(change, SetDevice) and code == errno.EADDRINUSE and change.listen_port is not None:
        port = change.listen_port
        return (
            f"UDP port {port} is taken by another program (see `ss -lunp sport = :{port}`): "
            "end that, or choose another port with --port"
        )
    if isinstance(change, SetUp) and code == errno.EADDRINUSE:
        return f"{change.name} cannot come up: its UDP port is taken by another program; choose another with --port"
    detail = getattr(error, "detail", "") or os.strerror(code)
    if exit_route is not None and encrypted.is_table(exit_route.table):
        if exit_route.metric != UNREACHABLE_METRIC:
            return f"`{change}` failed ({detail}): what is for {exit_route.destination} is dropped"
        return (
            f"`{change}` failed ({detail}): what is for {exit_route.destination} may leave in clear as long as "
            "its route into the tunnel is missing"
        )
    if isinstance(change, AddRule) and encrypted.is_ours(change.rule.priority):
        return (
            f"`{change}` failed ({detail}): what this host sends to other nodes in IPv{change.rule.version} leaves in "
            "clear; does this kernel have policy routing with ports (Linux 4.17, CONFIG_IP_MULTIPLE_TABLES, "
            "CONFIG_IPV6_MULTIPLE_TABLES)?"
        )
    if returning:
        where = "members that encapsulate" if way is None else way.destination
        return (
            f"`{change}` failed ({detail}): what comes out of the tunnel for {where} is sent on in plain, and a strict "
            "rp_filter there drops it; does this kernel have policy routing (CONFIG_IP_MULTIPLE_TABLES)?"
        )
    if exit_route is not None and exit_route.metric != UNREACHABLE_METRIC:
        return f"`{change}` failed ({detail}): what is for {exit_route.destination} is refused or ends in the tunnel"
    if isinstance(change, AddRule) or exit_route is not None:
        return (
            f"`{change}` failed ({detail}): packets for the internet may bypass the exit node that was asked for; "
            "does this kernel have policy routing (CONFIG_IP_MULTIPLE_TABLES, CONFIG_IPV6_MULTIPLE_TABLES)?"
        )
    if isinstance(change, AddRoute) and change.route.unreachable:
        return (
            f"`{change}` failed ({detail}): where the mesh's own route is missing, packets for "
            f"{change.route.destination} may leave in clear by this host's default route"
        )
    return f"`{change}` failed: {detail}"


def collision(destination: IPNetwork) -> str:
    """The sentence for a route of another program that stands where one of the mesh's would: what was left alone, and
    what to do."""
    return (
        f"the host already has a route to {destination} that is not ours; it was left alone and the mesh's was not "
        f"set: remove one of the two (see `ip route show {destination}`)"
    )


def shadow(destination: IPNetwork, subnet: IPNetwork) -> str:
    """The sentence for a route of another program within a mesh subnet, which takes packets for mesh addresses
    elsewhere."""
    return (
        f"the host's own route to {destination} lies within the mesh's subnet {subnet}; it was left alone, and mesh "
        f"addresses in it are not reached from here: remove it (see `ip route show {destination}`)"
    )


def taken(name: str, kind: str, public_key: str) -> str:
    """The sentence for an interface name that another program's device has. `kind` is the device's, empty for hardware;
    `public_key` is given if it is a WireGuard device."""
    holder = (
        f"a WireGuard device of another program, with public key {public_key}" if public_key else kind or "hardware"
    )
    return (
        f"the interface name {name} is taken by a device that is not ours ({holder}): "
        f"choose another name with --interface, or remove it with `ip link del {name}`"
    )
