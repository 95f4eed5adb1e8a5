"""Nothing is raised within `except*`: up to Python 3.11.3 it gets out in a group, as which neither Python nor click
takes an exit, and `except trio.Cancelled` no cancellation."""

from __future__ import annotations

import ast
from collections.abc import Iterator

import pytest

from helpers_docs import PACKAGE


def raising(text: str) -> Iterator[int]:
    """The lines of each `except*` within which another exception is raised, an exit or a cancellation."""
    for star in ast.walk(ast.parse(text)):
        for handler in star.handlers if isinstance(star, ast.TryStar) else ():
            for node in ast.walk(handler):
                raises = isinstance(node, ast.Raise) and node.exc is not None
                exits = isinstance(node, ast.Call) and ast.unparse(node.func).endswith("exit")
                if raises or exits or isinstance(node, (ast.Await, ast.AsyncWith, ast.AsyncFor)):
                    yield handler.lineno


@pytest.mark.parametrize(
    ("line", "refused"),
    [
        ("raise", False),
        ("raise E", True),
        ("raise E from None", True),
        ("sys.exit(1)", True),
        ("await trio.sleep(1)", True),
        ("status = 1", False),
    ],
)
def test_the_check_of_except_star(line: str, refused: bool) -> None:
    assert bool(list(raising(f"async def f():\n try: g()\n except* E:\n  {line}"))) == refused
    assert not list(raising(f"async def f():\n try: g()\n except E:\n  {line}"))


def test_nothing_is_raised_within_except_star() -> None:
    sources = {file.relative_to(PACKAGE): file.read_text() for file in PACKAGE.rglob("*.py")}
    assert sum("except*" in text for text in sources.values()) >= 4
    assert [f"{file}:{line}" for file, text in sources.items() for line in raising(text)] == []
