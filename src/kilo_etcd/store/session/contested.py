"""The sentence on leased keys that another writer changes again and again, and the agents that have to report it."""

from __future__ import annotations

from collections.abc import Sequence

CHANGED_AGAIN = "changed again and again by another writer"


def contested_sentence(keys: Sequence[str]) -> str | None:
    """What to say of `keys`, which another writer changes again and again; None: there are none."""
    if not keys:
        return None
    more = f" and {len(keys) - 1} more of this host's keys are" if len(keys) > 1 else " is"
    return (
        f"{keys[0]}{more} {CHANGED_AGAIN}, and restored at least once a minute; see who "
        "writes there; if a copy of this machine runs, give it a WireGuard key and a --hostname of its own"
    )


def about_status_key(error: str) -> bool:
    """Whether what an agent reports is only that its status is contested, which moves no packet."""
    key, _, rest = error.partition(" ")
    # The name of a location may end in -status too.
    watched = any(f"/{kind}/" in key for kind in ("elections", "endpoints", "probe-reports", "stages"))
    return "-status/" in key and not watched and rest.startswith(f"is {CHANGED_AGAIN}")
