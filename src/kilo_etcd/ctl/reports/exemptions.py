"""Reads exemptions (`--clear`) as agents report them. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress

from kilo_etcd.model.hostplan import Exemption


def exemptions(texts: Iterable[str]) -> tuple[Exemption, ...]:
    """Those of the texts that are exemptions."""
    result = []
    for text in texts:
        with suppress(ValueError):
            result.append(Exemption.parse(text))
    return tuple(result)
