"""The links between the Markdown pages: each file and each heading that one names exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers_docs import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
LINK = re.compile(r"\]\(<?([^()\s>]*)>?(?:\s+\"[^\"]*\")?\)")


def prose(text: str) -> str:
    """A page without what stands in code, where brackets are no links."""
    text = re.sub(r"^( *)(```+|~~~+).*?^\1\2 *$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(`+)(?!`).+?(?<!`)\1(?!`)", "", text)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to the headings of a page; of equal ones, the later are numbered."""
    text = re.sub(r"^( *)(```+|~~~+).*?^\1\2 *$", "", text, flags=re.MULTILINE | re.DOTALL)
    found: set[str] = set()
    for title in re.findall(r"^#{1,6} +(.+?)[ #]*$", text, flags=re.MULTILINE):
        title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)
        anchor = base = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        number = 0
        while anchor in found:
            number += 1
            anchor = f"{base}-{number}"
        found.add(anchor)
    return found


def broken(page: Path, root: Path) -> list[str]:
    """The links of a page that lead nowhere: no such file below `root`, or no such heading in it."""
    wrong = []
    for link in LINK.findall(prose(page.read_text())):
        if re.match(r"[a-z][a-z+.-]*:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (page.parent / file).resolve() if file else page
        there = target.is_relative_to(root) and target.exists()
        if there and anchor:
            there = target.suffix == ".md" and anchor in anchors(target.read_text())
        if not there:
            wrong.append(link)
    return wrong


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_each_link_of_a_page_leads_somewhere(page: Path) -> None:
    assert broken(page, ROOT) == []


def test_the_pages_have_links() -> None:
    assert sum(len(LINK.findall(prose(page.read_text()))) for page in PAGES) > 100


def test_each_page_has_its_place_in_the_site() -> None:
    places = set(
        re.findall(r"^   (?:[\w ,]+ <)?([\w/]+)>?$", (ROOT / "docs/site/index.rst").read_text(), flags=re.MULTILINE)
    )
    pages = {str(page.relative_to(ROOT).with_suffix("")) for page in PAGES if page.parent.name != "decisions"}
    assert places == pages | {"docs/decisions/README", "api/kilo_etcd"}


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("[a](other.md) and [b](other.md#what-it-does)", []),
        ("# A `title`, twice\n\n# A `title`, twice\n\n[a](#a-title-twice-1)", []),
        ("[a](https://example.org/nothing.md)", []),
        ("`[a](nothing.md)`\n\n```sh\n[b](nothing.md)\n```\n", []),
        ("[a](nothing.md)", ["nothing.md"]),
        ("![a](nothing.svg)", ["nothing.svg"]),
        ("[a](other.md#nothing)", ["other.md#nothing"]),
        ("[a](#nothing)", ["#nothing"]),
        ("[a](../outside.md)", ["../outside.md"]),
    ],
)
def test_a_link_that_leads_nowhere_is_found(text: str, wrong: list[str], tmp_path: Path) -> None:
    root = tmp_path / "root"
    root.mkdir()
    (tmp_path / "outside.md").write_text("# Outside\n")
    (root / "other.md").write_text("# Other\n\n## What it does\n")
    page = root / "page.md"
    page.write_text(text)
    assert broken(page, root) == wrong
