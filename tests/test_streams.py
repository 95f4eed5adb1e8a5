"""What `tests/conftest.py` does to a run is in force. In `make test` a test's id ends in its stream, by which
pytest-xdist groups tests; in `make test-fast` nothing runs that needs what an ordinary user may not have."""

from __future__ import annotations

import pytest


def test_a_test_carries_the_stream_that_xdist_groups_it_by(request: pytest.FixtureRequest) -> None:
    marker = request.node.get_closest_marker("xdist_group")
    assert marker is not None
    (stream,) = marker.args
    # Only a worker of `--dist loadgroup` has that.
    if getattr(request.config.option, "loadgroup", False):
        assert request.node.nodeid.endswith(f"@{stream}"), "this pytest-xdist knows no groups with this pytest"


def test_a_fast_run_has_no_test_with_needs(request: pytest.FixtureRequest) -> None:
    markers = {mark.name for item in request.session.items for mark in item.iter_markers()}
    needs = markers & {"etcd", "graphviz", "root", "lab", "guest"}
    assert not needs or not request.config.getoption("fast")
