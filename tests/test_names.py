"""A class has a name of its own in the whole package, so that a name says which one is meant. A variable is called by
what it holds."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

from helpers_docs import PACKAGE

FILES = [file for file in PACKAGE.rglob("*.py") if file.parent.name != "pb"]


def test_no_two_classes_have_one_name() -> None:
    places = defaultdict(list)
    for file in FILES:
        for name in re.findall(r"^ *class (\w+)[(:\[]", file.read_text(), re.MULTILINE):
            places[name].append(str(file.relative_to(PACKAGE)))
    assert len(places) > 300
    assert {name: files for name, files in places.items() if len(files) > 1} == {}


def nameless(text: str) -> Iterator[tuple[int, str]]:
    """The variables that are called `found` or `said`, and those called `one` that are not one of two: line, name.

    Of two things of a kind it is `one` and `other`, side by side: in one target, as parameters or as fields.
    """
    tree = ast.parse(text)
    beside_another: set[ast.AST] = set()
    for group in ast.walk(tree):
        members: list[ast.AST] = []
        if isinstance(group, ast.Tuple):
            members = list(group.elts)
        elif isinstance(group, ast.arguments):
            members = [*group.posonlyargs, *group.args, *group.kwonlyargs]
        elif isinstance(group, ast.ClassDef):
            members = [item.target for item in group.body if isinstance(item, ast.AnnAssign)]
        elif isinstance(group, (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)):
            members = [item.target for item in group.generators]
            members += [name for item in members if isinstance(item, ast.Tuple) for name in item.elts]
        elif isinstance(group, ast.For):
            inner = [item.target for item in group.body if isinstance(item, ast.For)]
            members = [group.target, *(item.elts[-1] if isinstance(item, ast.Tuple) else item for item in inner)]
            members += group.target.elts if isinstance(group.target, ast.Tuple) else ()
        if {"other", "_other"} & {_name(member) for member in members}:
            beside_another.update(members)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) or (isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)):
            name = _name(node)
            if name in ("found", "said") or (name == "one" and node not in beside_another):
                yield node.lineno, name


def _name(node: ast.AST) -> str:
    return node.arg if isinstance(node, ast.arg) else node.id if isinstance(node, ast.Name) else ""


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("found = 1", ["found"]),
        ("for one in items: pass", ["one"]),
        ("one, several = pair", ["one"]),
        ("def f(one, number): pass", ["one"]),
        ("x = {one for one, _ in pairs}", ["one"]),
        ("one, other = pair", []),
        ("def f(one, other): pass", []),
        ("x = [1 for one in items for other in items]", []),
        ("class Pair:\n  one: str\n  other: str", []),
        ("for index, one in items:\n  for other in items: pass", []),
    ],
)
def test_the_check_of_names(text: str, names: list[str]) -> None:
    assert [name for _, name in nameless(text)] == names


def test_a_variable_is_called_by_what_it_holds() -> None:
    def places(file: Path) -> list[str]:
        return [f"{file.relative_to(PACKAGE)}:{line} {name}" for line, name in nameless(file.read_text())]

    assert [place for file in FILES for place in places(file)] == []
