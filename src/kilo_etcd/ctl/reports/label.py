"""What looks like a mistake in a location's name. Pure.

Any text that prints may be a label; a `#` in it is mostly a comment that stood behind a value: systemd's environment
files, and etcdctl, know none. So nothing is refused, and what looks odd is printed.
"""

from __future__ import annotations

from kilo_etcd.model import DEFAULT_LOCATION

_USUAL = frozenset("._-/:+@ ")
"""Besides letters and digits of any script."""


def oddity(label: str) -> str | None:
    """What is odd about a location's name, as the end of a sentence that begins with the name; None: nothing is."""
    odd = sorted({character for character in label if not (character.isalnum() or character in _USUAL)})
    if label == DEFAULT_LOCATION or not (odd or "  " in label or label != label.strip()):
        return None
    if "#" in odd:
        return 'has "#" in its name, and a comment behind a value is part of the value'
    if not odd:
        return "has spaces in its name that are easily overlooked"
    shown = " and ".join(f'"{c}"' if c.isprintable() else c.encode("unicode_escape").decode() for c in odd[:3])
    return f"has {shown}{' and more' if len(odd) > 3 else ''} in its name"
