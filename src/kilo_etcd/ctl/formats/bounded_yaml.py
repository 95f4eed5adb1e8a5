"""YAML and JSON that somebody else wrote, read within bounds.

A few lines of YAML can mean a list that holds itself, or billions of items, by aliases (`*name`); a few thousand
brackets are enough to exhaust a recursive reader. Here a text has a greatest depth and number of values, where what an
alias stands for counts as often as it is used. Ordinary anchors, aliases and merge keys work. The caller bounds the
text's size. No message quotes the text, which may hold preshared keys.
"""

from __future__ import annotations

from typing import Any

import yaml

MAX_DEPTH = 40
MAX_VALUES = 50_000
"""A peer has some 18, keys counted, and at most 128 are added at once. Each value takes some 20 microseconds to read,
so a text at the bound takes about a second."""
MAX_DIGITS = 100
"""Characters of a number: YAML 1.1 has numbers to the base of 60 (`1:30:00`), which take the square of that to read."""


class _Refused(Exception):
    """The text is beyond a bound; the message says which, in a clause that fits after the text's name."""


class _Loader(yaml.SafeLoader):  # type: ignore[misc]
    """yaml's safe loader, which counts while it composes."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._open: list[Any] = []
        """The nodes that are being composed, outermost first."""
        self._weights: dict[int, tuple[Any, int]] = {}
        """Identity of a node with an anchor -> the node (so that no other gets its identity), and how many values it
        stands for, with all within."""
        self._values = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        """As yaml's own. _Refused."""
        if len(self._open) > MAX_DEPTH:
            raise _Refused(f"is nested too deeply: more than {MAX_DEPTH} levels")
        before = self._values
        alias = self.check_event(yaml.AliasEvent)
        self._open.append(None if alias else self.peek_event().anchor)
        node = super().compose_node(parent, index)
        name = self._open.pop()
        if alias:
            # An anchor is known as soon as its node begins, and has a weight when it has ended.
            if id(node) not in self._weights:
                raise _Refused("has an alias that stands for something around it")
            self._values += self._weights[id(node)][1]
        else:
            self._values += 1
            if name is not None:
                self._weights[id(node)] = node, self._values - before
        if self._values > MAX_VALUES:
            raise _Refused(f"holds more than {MAX_VALUES} values, aliases written out: give fewer at once")
        return node


def _number(loader: _Loader, node: Any) -> Any:
    if len(node.value) > MAX_DIGITS:
        raise _Refused(f"has a number of more than {MAX_DIGITS} digits")
    kind = "int" if node.tag.endswith(":int") else "float"
    return getattr(loader, f"construct_yaml_{kind}")(node)


for _kind in ("int", "float"):
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _number)


def load_documents(text: str, source: str) -> list[Any]:
    """The documents of a text, empty ones left out. ValueError, in one clause that names `source`."""
    documents: list[Any] = []
    line = 0
    loader: _Loader | None = None
    try:
        # JSON is YAML, and YAML 1.1's `yes` and `0o17` do no harm in keys, networks and numbers that are checked.
        loader = _Loader(text)
        while loader.check_data():
            document = loader.get_data()
            if document is not None:
                documents.append(document)
    except _Refused as error:
        raise ValueError(f"{source} {error}") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark is not None else 0
    # A value that its tag or its looks promise, and that is none: 2026-13-45, !!int x.
    except Exception:
        line = loader.line + 1 if loader is not None else 0
    else:
        return documents
    finally:
        if loader is not None:
            loader.dispose()
    raise ValueError(f"{source}{f', line {line},' if line else ''} is neither YAML nor JSON")
