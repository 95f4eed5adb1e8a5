"""Whether the agents follow the etcd that `kgctl` looks at: one that was restored or replaced they do not, until it is
adopted. Only they can tell, so they are asked, by way of that very etcd.

They are asked only where most nodes that are registered there report no status, or none is registered: agents keep no
lease in an etcd that they do not follow, so that their statuses end with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import TYPE_CHECKING

from kilo_etcd.base.quoting import first_of
from kilo_etcd.etcd.api import Client, EtcdError

if TYPE_CHECKING:
    from kilo_etcd.store.keys import Keys

SHOWN = 3
"""How many agents are named."""


async def distrust(client: Client, keys: Keys, registered: Collection[str], living: Collection[str]) -> str | None:
    """A sentence on agents that do not follow this etcd, with what to do; None: none says so. `registered` nodes have a
    record in it, `living` ones a status."""
    if registered and 2 * len(set(registered).intersection(living)) >= len(registered):
        return None
    from kilo_etcd.store.diagnostics import ask_why_untrusted

    try:
        reasons = await ask_why_untrusted(client, keys)
    except EtcdError:
        # Who may only read cannot ask.
        return None
    if not reasons:
        return None
    # The agents' own sentence goes on with what they do meanwhile.
    causes = Counter(reason.partition(";")[0] for reason in reasons.values())
    (cause, _), *_ = causes.most_common(1)
    return (
        f"agents do not follow this etcd ({first_of(sorted(reasons), SHOWN)}: {cause}), so what is written here has no "
        "effect on them: kgctl mesh adopt, if it is to be the mesh's; else give them their etcd back"
    )


async def distrust_by_look(client: Client, keys: Keys, registered: Collection[str]) -> str | None:
    """The same, with a look at which nodes report a status."""
    from kilo_etcd.store import operator

    return await distrust(client, keys, registered, await operator.living(client, keys))
