"""In which flags an agent differs from the mesh's settings. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from kilo_etcd.model import Granularity, InternalIPs, IPNetwork, Snapshot

_NOT_IN_FORCE = " is not in force: the mesh's "


def about_flag(error: str) -> bool:
    """Whether what an agent reports is only that one of its flags differs from the mesh's setting: such a flag counts
    for whoever makes the mesh."""
    return error.startswith("--") and _NOT_IN_FORCE in error


def disagreements(
    snapshot: Snapshot,
    *,
    granularity: Granularity | None,
    subnets: Iterable[IPNetwork],
    internal_ips: InternalIPs | None = None,
) -> tuple[str, ...]:
    """In which of its settings the agent differs from the mesh that it has joined; the mesh wins."""
    result = []
    if granularity is not None and granularity != snapshot.granularity:
        result.append(
            f"--mesh-granularity={granularity}{_NOT_IN_FORCE}granularity is "
            f"{snapshot.granularity} (etcd's mesh/granularity decides)"
        )
    if internal_ips is not None and internal_ips != snapshot.internal_ips:
        result.append(
            f"--internal-ips={internal_ips}{_NOT_IN_FORCE}setting is {snapshot.internal_ips} "
            "(etcd's mesh/internal-ips decides; kgctl mesh set internal-ips changes it)"
        )
    flagged = {str(subnet) for subnet in subnets}
    actual = {str(subnet) for subnet in snapshot.subnets}
    if flagged and flagged != actual:
        result.append(
            f"--subnet={','.join(sorted(flagged))}{_NOT_IN_FORCE}subnets are "
            f"{','.join(sorted(actual))} (etcd's mesh/subnets, fixed when the mesh was made)"
        )
    return tuple(result)
