"""Texts in agents' statuses that `kgctl` recognises."""

from __future__ import annotations

NO_BASELINE = "no host elsewhere has ever answered an echo request through the leader"
"""How the sentence on a leader without a baseline begins."""
