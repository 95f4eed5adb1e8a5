"""What documents name: modules, functions, files, headings and constants of ours, and whether they exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import attrs

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src/kilo_etcd"
ROOMS = {path.name for path in PACKAGE.iterdir() if path.is_dir()}


def quoted(page: str) -> list[str]:
    """All that stands between backticks in a page, line by line."""
    return re.findall(r"`([^`\n]+)`", (ROOT / page).read_text())


def names_in(page: str) -> list[str]:
    """The names of modules, and of what is in them, that a page names."""
    return sorted({text for text in quoted(page) if _is_name(text)})


def files_in(page: str) -> list[str]:
    """The files and directories of ours that a page names."""
    return sorted({text for text in quoted(page) if re.fullmatch(r"[\w/]+(/|\.py|\.toml)", text)})


def _is_name(text: str) -> bool:
    return re.fullmatch(r"[a-z_]+(\.\w+)+", text) is not None and text.split(".")[0] in ROOMS


def headings(page: str) -> set[str]:
    """The titles of a page's sections."""
    return set(re.findall(r"^#+ (.+)$", (ROOT / page).read_text(), flags=re.MULTILINE))


def sections_named(text: str, page: str) -> list[str]:
    """The sections of `page` that a source text names, as `page, "Title"`; a title may go over lines."""
    text = re.sub(r"\s*\n[ \t]*(#:? )?", " ", text)
    return re.findall(re.escape(page) + r', "([^"]+)"', text)


def resolve(name: str) -> object:
    """The module of ours that `name` is, or the function, class, constant or method in one. The field of an attrs class
    gives its default. LookupError."""
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
            if isinstance(value, type) and attrs.has(value) and each in attrs.fields_dict(value):
                value = attrs.fields_dict(value)[each].default
                continue
            if not hasattr(value, each):
                raise LookupError(f"{name}: {value!r} has no {each}")
            value = getattr(value, each)
        return value
    raise LookupError(f"{name} is in no module")
