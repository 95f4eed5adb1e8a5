"""Files that have to be regular ones."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from kilo_etcd.base.regularfile import NotRegular, open_regular


@pytest.mark.parametrize("make", [os.mkfifo, Path.mkdir], ids=["pipe", "directory"])
def test_what_is_no_regular_file_is_refused_and_no_descriptor_stays(
    tmp_path: Path, make: Callable[[Path], object]
) -> None:
    make(tmp_path / "it")
    before = os.listdir("/proc/self/fd")
    with pytest.raises(NotRegular):
        open_regular(tmp_path / "it", follow=True)
    assert os.listdir("/proc/self/fd") == before


def test_a_symbolic_link_is_followed_only_if_asked_for(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"content")
    (tmp_path / "link").symlink_to("file")
    with open_regular(tmp_path / "link", follow=True) as file:
        assert file.read() == b"content"
    with pytest.raises(OSError, match="symbolic links"):
        open_regular(tmp_path / "link", follow=False)
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none", follow=True)
