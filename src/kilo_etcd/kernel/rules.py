"""Rules of policy routing as values, and the changes that make them; `kernel.wayout` says which there shall be."""

from __future__ import annotations

from attrs import frozen


@frozen(kw_only=True, order=True)
class RoutingRule:
    """A rule of policy routing (ip-rule(8))."""

    version: int
    priority: int
    table: int
    not_mark: int = 0
    """Packets with this mark are left out; 0: none are."""
    suppress: bool = False
    """Whether a default route that the table has does not count."""

    def __str__(self) -> str:
        words = [f"priority {self.priority}"]
        if self.not_mark:
            words.append(f"not fwmark {self.not_mark}")
        words.append(f"lookup {self.table}" if self.table != 254 else "lookup main")
        if self.suppress:
            words.append("suppress_prefixlength 0")
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
