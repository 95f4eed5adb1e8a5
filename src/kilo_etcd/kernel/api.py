"""What the kernel layer offers: the seam at which `kilo_etcd.testing.fake_kernel` takes its place."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol

from kilo_etcd.kernel.echo import EchoRequests
from kilo_etcd.kernel.firewall.chains import Obstacle, Refusal
from kilo_etcd.kernel.routing.rules import ForeignRule
from kilo_etcd.kernel.state import ApplyReport, Backend, Change, Observed, PeerActivity, Route
from kilo_etcd.model import IPAddress
from kilo_etcd.model.hostplan import HostPlan


class Kernel(Protocol):
    """One host's kernel. Calls may come from several tasks; they are made one after the other."""

    @property
    def backend(self) -> Backend:
        """Where WireGuard runs."""

    @property
    def writes(self) -> int:
        """How many messages that change something `apply` has sent so far (netlink, UAPI, iptables, sysctl). That this
        host may ping is no part of a plan: what `ping` changes for that does not count."""

    async def check(self) -> None:
        """KernelError if no plan could be brought about as things are: no permission, no WireGuard, the interface's
        name taken. Nothing is changed."""

    async def apply(self, plan: HostPlan, *, fresh: bool = False, reset: Collection[str] = ()) -> ApplyReport:
        """Bring the host to `plan`. The same plan again writes nothing; `fresh` reads the host anew first.

        `reset` are public keys of peers of `plan` whose sessions are forgotten: WireGuard gets the peer removed and
        added in one change, so that an error leaves it either as it was or as it is planned.

        KernelError if nothing can be programmed at all; what fails by itself is in the report.
        """

    async def preview(self, plan: HostPlan, *, failed: bool = True) -> tuple[Change, ...]:
        """What `apply` would do, without doing it.

        Without `failed`: not what failed when the last plan was applied, nor what needs that.
        """

    async def observe(self) -> Observed:
        """What is there now, read anew."""

    async def obstacles(self) -> tuple[Obstacle, ...]:
        """What of the host's own settings drops mesh traffic that it forwards, or may do so. Cheap as long as nothing
        has changed, unless there are chains of the older xtables, for which programs are run."""

    async def refusals(self) -> tuple[Refusal, ...]:
        """What of other programs drops all of TCP or UDP that the host itself sends to the mesh or gets from it, for
        certain. Always read anew."""

    async def bypasses(self) -> tuple[str, ...]:
        """Policy rules of others by which packets leave in clear that the plan in force has encrypted, as sentences."""

    async def listening(self) -> frozenset[int]:
        """The TCP ports at which something listens here for others, at whatever address that is no loopback's."""

    async def peer_activity(self) -> PeerActivity:
        """The state of the WireGuard device's peers now: much less to read than all that `observe` does."""

    async def count_echoes(self, addresses: Collection[IPAddress], requests: EchoRequests) -> Mapping[IPAddress, int]:
        """How many of the echo requests to each address are answered, for those that answer any; see
        `kernel.echo.count`. Errors as for `ping`."""

    async def ping(self, addresses: Collection[IPAddress], requests: EchoRequests) -> Mapping[IPAddress, float]:
        """Which of `addresses` answer an echo request, and after how many seconds; see `kernel.echo.ping`.

        It waits for no other call. KernelError, with the remedy, if this host may not ping.
        """

    async def passes(self, address: IPAddress, size: int, patience: float) -> bool | None:
        """Whether a packet of `size` bytes with don't-fragment set arrives there; None: it is not known; see
        `kernel.echo.passes`. Errors as for `ping`."""

    async def foreign_rules(self) -> tuple[ForeignRule, ...]:
        """The policy rules of other programs, and the kernel's own."""

    async def routes_taken(
        self, sources: Mapping[IPAddress, IPAddress | None], *, by_wireguard: bool = False
    ) -> Mapping[IPAddress, Route | str]:
        """The route that the kernel chooses for a packet to each address from the source address with it, with every
        rule and table of the host considered; or the kernel's own error if it refuses such a packet. None: the kernel
        chooses the source address too. `by_wireguard`: for packets that WireGuard sends."""

    async def resolved(self, addresses: Collection[IPAddress]) -> frozenset[IPAddress]:
        """Which of `addresses` have answered on a link of this host: their link-layer addresses are known (ARP, ND)."""

    async def wait_drift(self) -> str:
        """Return, with a short text on what happened, when somebody else has changed something of ours.

        The caller then calls `apply` again. One task at a time may wait.
        """

    async def wait_moved(self) -> None:
        """Return when an address of the host or a default route has come or gone: it may be reached otherwise now.

        It learns of that while a task waits in `wait_drift`. One task at a time may wait.
        """
