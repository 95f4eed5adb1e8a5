"""Rules of policy routing as values, and the changes that make them; `kernel.wayout` says which there shall be."""

from __future__ import annotations

from attrs import frozen

from kilo_etcd.kernel.formats import RT_TABLE_MAIN
from kilo_etcd.model import IPAddress


@frozen(kw_only=True)
class RoutingRule:
    """A rule of policy routing (ip-rule(8))."""

    version: int
    priority: int
    table: int
    not_mark: int = 0
    """Packets with this mark are left out; 0: none are."""
    source: IPAddress | None = None
    """Only packets from this address; None: from any."""
    suppress: int | None = None
    """Routes of the table whose prefixes are at most this long do not count, so with 0 the default route does not."""

    @property
    def order(self) -> tuple[int, int, str]:
        """By family, then as the kernel asks them."""
        return self.version, self.priority, str(self)

    def __str__(self) -> str:
        words = [f"priority {self.priority}"]
        if self.source is not None:
            words.append(f"from {self.source}")
        if self.not_mark:
            words.append(f"not fwmark {self.not_mark}")
        words.append(f"lookup {self.table}" if self.table != RT_TABLE_MAIN else "lookup main")
        if self.suppress is not None:
            words.append(f"suppress_prefixlength {self.suppress}")
        return " ".join(words)


@frozen
class AddRule:
    rule: RoutingRule

    def __str__(self) -> str:
        return f"ip -{self.rule.version} rule add {self.rule}"


@frozen
class DeleteRule:
    rule: RoutingRule

    def __str__(self) -> str:
        return f"ip -{self.rule.version} rule del {self.rule}"
