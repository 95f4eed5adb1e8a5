"""What several lab tests ask of a running lab."""

from __future__ import annotations

import json
from typing import Any

from helpers import eventually
from kilo_etcd.lab.client import Lab
from kilo_etcd.store.keys import ElectionKey, Keys, NodeKey, StatusKey

KEYS = Keys()


async def statuses(lab: Lab) -> dict[str, dict[str, Any]]:
    """Node -> its status."""
    found = ((KEYS.parse(kv.key), kv.value) for kv in await lab.key_values(KEYS.status_by_root))
    return {key.node: json.loads(value) for key, value in found if isinstance(key, StatusKey)}


async def records(lab: Lab) -> dict[str, dict[str, Any]]:
    """Node -> its record."""
    found = ((KEYS.parse(kv.key), kv.value) for kv in await lab.key_values(KEYS.by_root))
    return {key.node: json.loads(value) for key, value in found if isinstance(key, NodeKey)}


async def candidacies(lab: Lab, location: str) -> dict[str, int]:
    """The candidates of a location -> the create revision of each one's candidacy, the oldest first."""
    parsed = ((KEYS.parse(kv.key), kv.create_revision) for kv in await lab.key_values(KEYS.by_root))
    found = [(key.node, since) for key, since in parsed if isinstance(key, ElectionKey) and key.location == location]
    return dict(sorted(found, key=lambda one: one[1]))


async def leads(lab: Lab, *names: str) -> str:
    """Which of these hosts of one location says of itself that it leads."""

    async def found() -> str | None:
        for name in names:
            text = (await lab.etcdctl("get", "--print-value-only", f"/kilo-status/by/{name}/status")).stdout
            if text and json.loads(text)["role"] == "leader":
                return name
        return None

    return str(await eventually(found, 30, every=0.1, what=f"one of {names} leads"))
