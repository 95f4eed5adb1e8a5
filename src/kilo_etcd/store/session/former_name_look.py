"""What etcd holds under a name that this host may have had before, and whether an agent lives there."""

from __future__ import annotations

import structlog
import trio

from kilo_etcd.etcd.api import Client, Get, RangeResult, prefix_end
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.session.former_names import FormerName

LONGEST_STATUS = 60.0
"""The longest that a starting agent waits for the end of a status that a former run may have left, in seconds."""


async def look_at(client: Client, keys: Keys, name: str) -> FormerName:
    """What stands under another name. EtcdError."""
    root, status_key = keys.by(name), keys.status(name)
    answer = await client.txn([], [Get(root, prefix_end(root)), Get(status_key)])
    below, status = (response.kvs for response in answer.responses if isinstance(response, RangeResult))
    return FormerName.of(keys, name, below, next(iter(status), None))


async def look_until_gone(client: Client, keys: Keys, name: str, lease_ttl: int, own: str) -> tuple[FormerName, bool]:
    """What stands under another name than the host's `own`, as soon as no agent lives there or nobody can have left its
    status; and whether that is so, since its lease would have ended. One that lasts longer is not waited for to its
    end. EtcdError."""
    deadline, ends = None, False
    while True:
        former = await look_at(client, keys, name)
        if not former.lives or former.status is None:
            return former, False
        if deadline is None:
            info = await client.lease_time_to_live(former.status.lease)
            ends = info.ttl <= LONGEST_STATUS
            deadline = trio.current_time() + min(max(info.ttl, lease_ttl), LONGEST_STATUS) + 1
            structlog.get_logger().info(
                "waiting for the end of a status under another name with this host's key", node=own, other=name
            )
        if (remaining := deadline - trio.current_time()) <= 0:
            return former, ends
        await trio.sleep(min(0.5, remaining))
