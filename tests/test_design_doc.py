"""docs/design.md: the sections that docstrings name, the names on the page, and the values of its constants."""

from __future__ import annotations

import re

import pytest

from helpers_docs import PACKAGE, ROOT, headings, names_in, resolve, sections_named
from kilo_etcd.agent.options import agent_flags
from kilo_etcd.runtime.parsing import parse_duration

PAGE = "docs/design.md"
NAMED = sorted(
    (str(path.relative_to(ROOT)), section)
    for path in PACKAGE.rglob("*.py")
    for section in sections_named(path.read_text(), PAGE)
)
CONSTANTS = re.findall(r"^\| `([^`]+)` \| ([0-9.]+) \|", (ROOT / PAGE).read_text(), flags=re.MULTILINE)


def value_of(name: str) -> object:
    """The value of a constant of ours, or the default of a flag of kg in seconds. LookupError."""
    if not name.startswith("--"):
        return resolve(name)
    defaults = {flag.name: flag.default for flag in agent_flags()}
    return parse_duration(defaults[name])


def test_docstrings_name_sections_and_the_page_names_constants() -> None:
    assert len(NAMED) >= 8
    assert len(CONSTANTS) > 20


@pytest.mark.parametrize(("file", "section"), NAMED)
def test_a_docstring_names_a_section_that_exists(file: str, section: str) -> None:
    assert section in headings(PAGE), file


def test_no_file_names_the_page_otherwise() -> None:
    files = {path: path.read_text() for path in PACKAGE.rglob("*.py")}
    assert not [path for path, text in files.items() if re.search(r"\bDESIGN\b", text)]
    named = sum(text.count(PAGE) for text in files.values())
    assert named == len(NAMED), "a docstring names docs/design.md without the title of a section"


@pytest.mark.parametrize("name", names_in(PAGE))
def test_a_name_is_that_of_something(name: str) -> None:
    resolve(name)


@pytest.mark.parametrize(("name", "value"), CONSTANTS)
def test_a_constant_has_the_value_that_the_page_states(name: str, value: str) -> None:
    assert value_of(name) == float(value)


def test_a_reference_may_go_over_lines() -> None:
    text = 'Where things are (docs/design.md, "Keys\n    and records"; docs/design.md,\n# "No such section").'
    assert sections_named(text, PAGE) == ["Keys and records", "No such section"]


@pytest.mark.parametrize("name", ["--lease", "agent.daemon.HANDOVER", "etcd.api.Config.pings"])
def test_a_constant_that_does_not_exist_is_found_out(name: str) -> None:
    with pytest.raises(LookupError):
        value_of(name)
