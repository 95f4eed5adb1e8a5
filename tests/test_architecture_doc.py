"""docs/architecture.md names modules, functions and files: each must exist."""

from __future__ import annotations

import pytest

from helpers_docs import PACKAGE, ROOMS, ROOT, files_in, names_in, resolve

FILES = files_in("docs/architecture.md")
NAMES = names_in("docs/architecture.md")


def test_the_page_names_rooms_functions_and_files() -> None:
    assert {f"{room}/" for room in ROOMS - {"__pycache__"}} <= set(FILES)
    assert len(NAMES) > 30
    assert len(FILES) > 40


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_that_of_something(name: str) -> None:
    resolve(name)


@pytest.mark.parametrize("file", FILES)
def test_a_file_is_there(file: str) -> None:
    assert (PACKAGE / file).exists() or (ROOT / file).exists()


@pytest.mark.parametrize("name", ["topology.election.elected", "topology.elections.elect", "nowhere.at.all"])
def test_what_is_not_there_is_found_out(name: str) -> None:
    with pytest.raises(LookupError):
        resolve(name)
