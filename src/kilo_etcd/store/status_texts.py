"""Texts in agents' statuses that `kgctl` recognises."""

from __future__ import annotations

CANNOT_PING = ("this process may not ping", "this host cannot ping")
"""How the sentences of an agent begin that cannot send echo requests (`kernel.errors`)."""
NO_WIREGUARD = "does not answer (is its process stopped?)"
"""What the sentence of an agent says whose userspace WireGuard is stopped (`kernel.userspace`)."""
NO_BASELINE = "no host elsewhere has ever answered an echo request through the leader"
"""How the sentence on a leader without a baseline begins."""
