"""One `__repr__` for all of attrs' classes, instead of one that attrs writes and compiles for each.

Compiling them is a seventh of what a process spends until all its classes exist, and few of them are ever called. The
text is the same as attrs' own.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from reprlib import recursive_repr
from typing import Any

import attrs


@recursive_repr("...")
def _repr(self: attrs.AttrsInstance) -> str:
    kind = type(self)
    shown = (
        f"{attr.name}={(repr if attr.repr is True else attr.repr)(getattr(self, attr.name, attrs.NOTHING))}"
        for attr in attrs.fields(kind)
        if attr.repr
    )
    return f"{kind.__qualname__.rpartition('>.')[2]}({', '.join(shown)})"


def _sharing(make: Callable[..., Any]) -> Callable[..., Any]:
    def decorate(kind: type | None = None, /, **options: Any) -> Any:
        if kind is None:
            return partial(decorate, **options)
        if "__repr__" not in vars(kind) and options.get("repr") is None:
            kind.__repr__ = _repr  # type: ignore[method-assign, assignment]
        return make(kind, **options)

    return decorate


def share_repr() -> None:
    """Let every class that is made by `attrs.define` or `attrs.frozen` from now on use it, unless it has its own."""
    for name in ("define", "frozen", "mutable"):
        setattr(attrs, name, _sharing(getattr(attrs, name)))
