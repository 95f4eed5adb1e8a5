"""The texts that operators write, in `kg` and in `kgctl`."""

from __future__ import annotations

import pytest

from kilo_etcd.runtime.parsing import parse_duration, parse_own_name


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("2s", 2), ("500ms", 0.5), ("1m", 60), ("1h30m", 5400), ("1.5s", 1.5), (".5s", 0.5), ("0", 0),
     ("7", 7), ("3us", 3e-6)]
)  # fmt: skip
def test_durations_are_written_as_in_go(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "-1s", "1 s", "1w", "1s2", "nan", "1e3s"])
def test_what_is_no_duration_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="no duration"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["localhost", "localhost.localdomain", "localhost6", "LOCALHOST", "(none)", ""])
def test_a_name_that_every_unnamed_system_has_is_none_for_a_node(text: str) -> None:
    with pytest.raises(ValueError, match="hostname"):
        parse_own_name(text)


@pytest.mark.parametrize("text", ["node-1", "my-localhost", "localhosting-db1", "Node-1.example.net", "n" * 63])
def test_a_hosts_own_name(text: str) -> None:
    assert parse_own_name(text) == text
