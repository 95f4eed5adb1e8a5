"""A class has a name of its own in the whole package, so that a name says which one is meant."""

from __future__ import annotations

import re
from collections import defaultdict

from helpers_docs import PACKAGE


def test_no_two_classes_have_one_name() -> None:
    places = defaultdict(list)
    for file in PACKAGE.rglob("*.py"):
        if file.parent.name != "pb":
            for name in re.findall(r"^ *class (\w+)[(:\[]", file.read_text(), re.MULTILINE):
                places[name].append(str(file.relative_to(PACKAGE)))
    assert len(places) > 300
    assert {name: files for name, files in places.items() if len(files) > 1} == {}
