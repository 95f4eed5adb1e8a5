"""docs/architecture.md names modules, functions and files: each must exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/kilo_etcd"
QUOTED = re.findall(r"`([^`\n]+)`", (ROOT / "docs/architecture.md").read_text())
ROOMS = {path.name for path in PACKAGE.iterdir() if path.is_dir()}

FILES = sorted({text for text in QUOTED if re.fullmatch(r"[\w/]+(/|\.py|\.toml)", text)})
NAMES = sorted({text for text in QUOTED if re.fullmatch(r"[a-z_]+(\.\w+)+", text) and text.split(".")[0] in ROOMS})


def resolve(name: str) -> object:
    """The module of ours that `name` is, or the function, class or method in one. LookupError."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        module = ".".join(["kilo_etcd", *parts[:length]])
        try:
            value: object = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not module.startswith(error.name):
                raise
            continue
        for each in parts[length:]:
            if not hasattr(value, each):
                raise LookupError(f"{name}: {value!r} has no {each}")
            value = getattr(value, each)
        return value
    raise LookupError(f"{name} is in no module")


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
