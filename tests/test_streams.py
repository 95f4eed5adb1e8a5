"""The streams of `make test` are in force: a test's id ends in its stream, by which pytest-xdist groups tests."""

from __future__ import annotations

import pytest


def test_a_test_carries_the_stream_that_xdist_groups_it_by(request: pytest.FixtureRequest) -> None:
    marker = request.node.get_closest_marker("xdist_group")
    assert marker is not None
    (stream,) = marker.args
    # Only a worker of `--dist loadgroup` has that.
    if getattr(request.config.option, "loadgroup", False):
        assert request.node.nodeid.endswith(f"@{stream}"), "this pytest-xdist knows no groups with this pytest"
