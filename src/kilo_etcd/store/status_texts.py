"""Texts in agents' statuses that `kgctl` recognises, or uses too."""

from __future__ import annotations

CANNOT_PING = ("this process may not ping", "this host cannot ping")
"""How the sentences of an agent begin that cannot send echo requests (`kernel.errors`)."""
NO_WIREGUARD = "does not answer (is its process stopped?)"
"""What the sentence of an agent says whose userspace WireGuard is stopped (`kernel.userspace`)."""
NO_IPV6 = "IPv6 is switched off there"
"""What the sentence of an agent says that cannot put its IPv6 mesh address on the device (`kernel.errors`)."""
NO_BASELINE = "no host elsewhere has ever answered an echo request through the leader"
"""How the sentence on a leader without a baseline begins."""
WAS_DEMOTED = "this host was demoted as leader:"
"""How the sentence of an agent begins whose host does not lead because probers have reported it."""
FORWARDING_LOOK = (
    "what drops forwarded packets (nft list ruleset; ip xfrm policy; sysctl net.ipv4.ip_forward "
    r"net.ipv6.conf.all.forwarding; an rp_filter of 1: sysctl -ar '\.rp_filter') or leads them elsewhere (ip rule; "
    "ip route get MESH-ADDRESS)"
)
"""What to look for on a host that does not forward, with the commands that show it."""
STATE_TROUBLE = ("the state directory ", "the private key ", "the snapshot cannot be cached ")
"""How the sentences begin on files that an agent needs at its next start."""
CLOCK_WENT_BACK = "this host's clock went back by "
"""How the sentence on that begins."""
ETCD_INSIDE = "etcd's endpoint "
"""How the sentence on an endpoint of etcd begins that is a mesh address."""
