"""What several lab tests ask of a running lab."""

from __future__ import annotations

import json

from helpers import eventually
from kilo_etcd.lab.client import Lab


async def leads(lab: Lab, *names: str) -> str:
    """Which of these hosts of one location says of itself that it leads."""

    async def found() -> str | None:
        for name in names:
            text = (await lab.etcdctl("get", "--print-value-only", f"/kilo-status/{name}")).stdout
            if text and json.loads(text)["role"] == "leader":
                return name
        return None

    return str(await eventually(found, 30, every=0.1, what=f"one of {names} leads"))
