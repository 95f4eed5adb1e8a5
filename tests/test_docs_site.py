"""docs/site/conf.py: which modules get a page, and how a docstring becomes Sphinx's markup. The site is not built."""

from __future__ import annotations

import runpy

import pytest

from helpers_docs import PACKAGE, ROOT

CONF = runpy.run_path(str(ROOT / "docs/site/conf.py"))


def test_each_module_has_a_page_that_its_package_names() -> None:
    pages: dict[str, str] = CONF["api_pages"](PACKAGE.parent)
    assert {"kilo_etcd", "kilo_etcd.topology", "kilo_etcd.topology.election"} <= pages.keys()
    assert "   election <kilo_etcd.topology.election>\n" in pages["kilo_etcd.topology"]
    assert not [name for name in pages if ".pb" in name or "__" in name]


@pytest.mark.parametrize(
    ("docstring", "markup"),
    [
        ("What `base.backoff` has.", r"What \ :py:obj:`base.backoff`\  has."),
        ("The `Change`s of `a - b`.", r"The \ :py:obj:`Change`\ s of \ ``a - b``\ ."),
        ("One `name\nhere`.", r"One \ ``name here``\ ."),
        ("All of *args, a_ and a|b.", r"All of \*args, a\_ and a\|b."),
        ("Two:\n\n* one\n* another", "Two:\n\n* one\n* another"),
        ("As in\n\n    run(`x`)\n\nhere.", "As in\n\n::\n\n    run(`x`)\n\nhere."),
    ],
)
def test_a_docstring_becomes_markup(docstring: str, markup: str) -> None:
    assert CONF["markup_of"](docstring) == markup
