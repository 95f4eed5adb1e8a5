"""docs/decisions: numbers without holes, one form, an index, and no reference to a decision that does not exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DECISIONS = ROOT / "docs/decisions"
INDEX = DECISIONS / "README.md"
PAGES = sorted(DECISIONS.glob("[0-9]*.md"))
NUMBERS = {page.name[:4] for page in PAGES}
TITLE = re.compile(r"# (?P<number>\d{4}): (?P<title>[A-Z].*[^.])")
STATUS = re.compile(r"Status: (?P<status>(in force|superseded by (?P<successor>\d{4})) since \d{4}-\d\d-\d\d)\.")
ENTRY = re.compile(r"\| \[(?P<number>\d{4})\]\((?P<file>[^)]+)\) \| (?P<title>.+) \| (?P<status>.+) \|")
REFERENCE = re.compile(
    r"\b[Dd]ecisions?(?:/| |\s+\[?)(?P<named>\d{4})\b"  # decision 0004, [decision 0004], docs/decisions/0004
    r"|[(\[](?P<bracketed>0\d{3})[)\]]"  # (0004), [0004]
    r"|\b(?P<linked>0\d{3})-[a-z][a-z0-9-]*\.md\b"
)
TEXTS = sorted(
    path
    for path in (
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
        *(ROOT / "docs").rglob("*.md"),
        *(path for room in ("src", "tests", "bench", "scripts") for path in (ROOT / room).rglob("*.py")),
    )
    if path != Path(__file__)
)


def head(page: Path) -> tuple[str, str, str]:
    """Number, title and status of a decision. ValueError if its head has another form."""
    title, status = page.read_text().split("\n\n", 2)[:2]
    named, dated = TITLE.fullmatch(title), STATUS.fullmatch(status)
    if named is None or dated is None:
        raise ValueError(f"{page.name} does not begin with '# NNNN: Title' and 'Status: in force since YYYY-MM-DD.'")
    return named["number"], named["title"], dated["status"]


def references(text: str) -> set[str]:
    """The numbers of the decisions that a text names; line breaks and comment signs may be inside a reference."""
    text = re.sub(r"\n[ \t]*(#+ )?", " ", text)
    return {number for match in REFERENCE.finditer(text) for number in match.groups() if number}


def test_numbers_have_no_holes() -> None:
    assert [page.name[:4] for page in PAGES] == [f"{number:04}" for number in range(1, len(PAGES) + 1)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name[:4])
def test_a_decision_has_its_number_a_title_and_a_status(page: Path) -> None:
    number, _title, status = head(page)
    assert number == page.name[:4]
    superseded = STATUS.fullmatch(f"Status: {status}.")
    assert superseded is not None
    assert superseded["successor"] in {None, *NUMBERS - {number}}


def test_the_index_lists_each_decision_as_it_is() -> None:
    entries = [match.groups() for line in INDEX.read_text().splitlines() if (match := ENTRY.fullmatch(line))]
    assert entries == [(number, page.name, title, status) for page in PAGES for number, title, status in [head(page)]]


def test_each_reference_names_a_decision() -> None:
    unknown = {
        f"{path.relative_to(ROOT)}: {number}" for path in TEXTS for number in references(path.read_text()) - NUMBERS
    }
    assert not unknown


def test_a_link_leads_to_the_decision_that_it_names() -> None:
    files = {page.name for page in PAGES}
    linked = {
        (str(path.relative_to(ROOT)), name)
        for path in TEXTS
        for name in re.findall(r"\b0\d{3}-[a-z][a-z0-9-]*\.md\b", path.read_text())
    }
    assert {name for _path, name in linked} & files
    assert not {link for link in linked if link[1] not in files}


@pytest.mark.parametrize(
    ("text", "numbers"),
    [
        ("see decision 0004, and (0015)", {"0004", "0015"}),
        ("in use since [decision\n0099](decisions/0099-nothing.md)", {"0099"}),
        ("# as decision\n    # 0098 has it", {"0098"}),
        ("docs/decisions/0097", {"0097"}),
        ("GATHER = 0.0005; port 1107; (2010)", set()),
    ],
)
def test_a_reference_is_recognised(text: str, numbers: set[str]) -> None:
    assert references(text) == numbers


@pytest.mark.parametrize(
    "text",
    ["# 1. A title\n\nStatus: in force since 2026-11-22.\n\n", "# 0001: A title\n\nNovember 2026. In force.\n\n"],
)
def test_another_form_is_found_out(text: str, tmp_path: Path) -> None:
    page = tmp_path / "0001-a-title.md"
    page.write_text(text)
    with pytest.raises(ValueError, match="does not begin with"):
        head(page)
