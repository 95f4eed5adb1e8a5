"""How values and long lists are shown in a message: short, and a wrong value never if it may be a secret.

Messages go to logs, to `kgctl status`, into etcd, and into tickets. A value of a field that is marked secret is not
shown at all. Other values are: but a preshared key is as easily pasted into the wrong field, or written as part of the
field's name, so text that could be a key is described instead, and so are lists and objects, whatever they hold.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Final

SECRET: Final = "secret"
"""Key in the metadata of an attrs field whose value is never shown; there it says what the value is."""

_MAY_BE_A_KEY = re.compile(r"[A-Za-z0-9+/=]{32}").search
"""A key of 32 bytes has 44 digits in base64, 64 in hex; a mistyped one has fewer."""
_LONG_NAMES = re.compile(r"[A-Za-z0-9_-]{42,}").findall
_DIGITS_OF_ALL_KINDS = (re.compile("[a-z]").search, re.compile("[A-Z]").search, re.compile("[0-9]").search)
"""What a key has that is written in the base64 of URLs, and a long name of a host has not."""
_IS_A_PASTED_KEY = re.compile(r"[A-Za-z0-9+][A-Za-z0-9+/=]{38,46}").fullmatch
"""Where a path belongs, which rarely is of that length without any point, dash or slash at its beginning."""
_IS_A_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,30}").fullmatch


def first_of(names: Iterable[str], most: int, separator: str = ", ") -> str:
    """The first `most` of them, and how many more there are."""
    all_names = list(names)
    more = f" and {len(all_names) - most} more" if len(all_names) > most else ""
    return separator.join(all_names[:most]) + more


def either(*names: str) -> str:
    """`a, b or c`."""
    return f"{', '.join(names[:-1])} or {names[-1]}"


def command(words: str, *arguments: str) -> str:
    """A command to copy: `words`, and arguments as a shell takes them for one each, and the program for no options."""
    from shlex import join

    return f"{words} {'-- ' if any(argument.startswith('-') for argument in arguments) else ''}{join(arguments)}"


def sentence(clause: object) -> str:
    """A clause with a full stop, unless it ends as a sentence does."""
    text = str(clause)
    return text if text.endswith((".", "?", "!")) else f"{text}."


def shown(value: object) -> str:
    """The value as it may appear in a message, in at most 60 characters."""
    if value is not None and not isinstance(value, (str, int, float)):
        return described(value)
    if _may_be_a_key(str(value)):
        return described(value)
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _may_be_a_key(text: str) -> bool:
    # What was copied from a terminal may be broken over lines.
    words = text.split()
    joined = ("".join(words[at : at + 3]) for at in range(len(words)))
    return any(_MAY_BE_A_KEY(part) or any(map(_is_mixed, _LONG_NAMES(part))) for part in joined)


def _is_mixed(name: str) -> bool:
    return all(kind(name) for kind in _DIGITS_OF_ALL_KINDS)


def described(value: object) -> str:
    """What kind of value it is, without the value."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a truth value"
    if isinstance(value, (int, float)):
        return "a number"
    if isinstance(value, str):
        return "an empty text" if not value else f"a text of {len(value)} characters"
    if isinstance(value, (list, tuple)):
        return "a list"
    return "an object" if isinstance(value, dict) else f"a value of type {type(value).__name__}"


def shown_name(name: object) -> str:
    """The name of a field, if it can be one: where a separator is missing, the value is a part of the name."""
    return name if isinstance(name, str) and _IS_A_NAME(name) else f"{described(name)} in the place of a name"


def shown_path(path: str) -> str:
    """The name of a file, unless a key itself is in its place."""
    return described(path) if "\n" in path or _IS_A_PASTED_KEY(path) else path
