"""Programs Linux: `plan - observed = changes` (docs/design.md, "The plan and the kernel").

The public names are these; modules are private.
"""

from kilo_etcd.kernel.api import Kernel
from kilo_etcd.kernel.diff import diff
from kilo_etcd.kernel.errors import KernelError
from kilo_etcd.kernel.linux import agent_has, cleanup, leftovers, list_addresses, open_kernel, other_agent, peers_of
from kilo_etcd.kernel.state import (
    PEER_PROTOCOL,
    ROUTE_PROTOCOL,
    AddressScope,
    ApplyReport,
    Change,
    DefaultRoute,
    DeviceTarget,
    FailedChange,
    HostAddress,
    HostAddresses,
    Link,
    Memory,
    Observed,
    ObservedPeer,
    Route,
    Setup,
)

__all__ = [
    "PEER_PROTOCOL",
    "ROUTE_PROTOCOL",
    "AddressScope",
    "ApplyReport",
    "Change",
    "DefaultRoute",
    "DeviceTarget",
    "FailedChange",
    "HostAddress",
    "HostAddresses",
    "Kernel",
    "KernelError",
    "Link",
    "Memory",
    "Observed",
    "ObservedPeer",
    "Route",
    "Setup",
    "agent_has",
    "cleanup",
    "diff",
    "leftovers",
    "list_addresses",
    "open_kernel",
    "other_agent",
    "peers_of",
]
