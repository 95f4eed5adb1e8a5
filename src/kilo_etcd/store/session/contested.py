"""The sentence on leased keys that another writer changes again and again, and the agents that have to report it."""

from __future__ import annotations

import re
from collections.abc import Sequence

# A location may be named `status` too, and a prefix may end in -status.
_IS_STATUS_KEY = re.compile(r".*-status/by/[^/]+/status").fullmatch

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
    return _IS_STATUS_KEY(key) is not None and rest.startswith(f"is {CHANGED_AGAIN}")
