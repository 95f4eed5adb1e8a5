"""Nexthop objects (`ip nexthop`), which routes may name instead of a device and a gateway.

As a rule the kernel tells a route with all that its object says. Where `net.ipv4.nexthop_compat_mode` is 0 it tells the
object's number alone, and only then the objects are read. A change of an object is no event of a route: what follows
from it is seen when the host is looked at again.
"""

from __future__ import annotations

import errno
from collections.abc import Mapping
from typing import TypeAlias

from kilo_etcd.kernel import sysctl
from kilo_etcd.kernel.errors import NetlinkError
from kilo_etcd.kernel.netlink import sockets
from kilo_etcd.kernel.read.rtnl import FoundNexthop, FoundRoute, read_nexthop
from kilo_etcd.kernel.write.rtnl import get_nexthops
from kilo_etcd.model import IPAddress

Hops: TypeAlias = tuple[tuple[int, IPAddress | None], ...]
"""Device's index and gateway of each next hop."""


def read(sock: sockets.Socket) -> Mapping[int, Hops]:
    """The objects, if routes are told without what they say: number -> next hops."""
    if not sysctl.nexthops_by_number():
        return {}
    nexthops: list[FoundNexthop] = []
    try:
        sock.dump(get_nexthops(), lambda body: nexthops.append(read_nexthop(body)))
    except NetlinkError as error:
        if error.errno != errno.EOPNOTSUPP:
            raise
    return resolve(nexthops)


def resolve(nexthops: list[FoundNexthop]) -> Mapping[int, Hops]:
    """The next hops of each object. A group's are those of its members, which are no groups."""
    single = {nexthop.number: ((nexthop.index, nexthop.gateway),) for nexthop in nexthops if not nexthop.members}
    groups = {
        nexthop.number: tuple(hop for member in nexthop.members for hop in single.get(member, ()))
        for nexthop in nexthops
    }
    return {**groups, **single}


def hops(route: FoundRoute, objects: Mapping[int, Hops]) -> Hops:
    """The next hops of a route, which may name an object."""
    return objects.get(route.object, route.next_hops) if route.object else route.next_hops
