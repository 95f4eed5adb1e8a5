"""Small files appear whole or not at all, and what of them cannot be read harms nobody."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from kilo_etcd.base.namespaces import network_namespace
from kilo_etcd.base.wholefile import write_whole
from kilo_etcd.kernel import sysctl
from kilo_etcd.kernel.state import SetForwarding


def full(_: int) -> None:
    raise OSError(28, "No space left on device")


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_whole(path, b"one\n")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_whole(path, b"two\n")
    assert path.read_bytes() == b"one\n"
    assert os.listdir(tmp_path) == ["file"]


def test_a_link_in_its_place_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "victim").write_text("precious")
    (tmp_path / "file").symlink_to("victim")
    write_whole(tmp_path / "file", b"new")
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "file").is_symlink()


def test_the_record_of_sysctls_outlives_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = tmp_path / "run/kilo0.sysctl.json"
    now = {SetForwarding(4).path: "0", SetForwarding(6).path: "0"}
    monkeypatch.setattr(sysctl, "_read", now.get)
    monkeypatch.setattr(sysctl, "_write", now.__setitem__)
    sysctl.change_to(SetForwarding(4), record)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        sysctl.change_to(SetForwarding(6), record)
    # What was known is given back; what could not be noted is left as it is.
    assert [change.path for change in sysctl.to_restore(record)] == [SetForwarding(4).path]


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 50_000, "null", "[]", '{"namespace": 1}', "\ufffd"])
def test_a_record_of_sysctls_that_is_none_gives_nothing_back(tmp_path: Path, text: str) -> None:
    record = tmp_path / "record"
    record.write_text(text)
    assert sysctl.to_restore(record) == ()


def test_what_of_a_record_is_no_text_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = SetForwarding(4).path
    monkeypatch.setattr(sysctl, "_read", lambda _: "1")
    record = tmp_path / "record"
    record.write_text(json.dumps({"namespace": network_namespace(), "before": {path: ["0"], "net/../../etc/x": "0"}}))
    assert sysctl.to_restore(record) == ()
