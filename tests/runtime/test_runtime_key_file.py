"""The private key on disk."""

from __future__ import annotations

import base64
import os
import stat
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kilo_etcd.runtime import key_file
from kilo_etcd.runtime.key_file import DanglingLink, KeyFileError, UnusableKey


def test_the_first_start_makes_a_key_and_the_second_finds_it(tmp_path: Path) -> None:
    state = tmp_path / "var" / "kilo"
    private = key_file.load_or_create(state)
    assert len(base64.b64decode(private)) == 32
    assert stat.S_IMODE((state / "key").stat().st_mode) == 0o600
    assert stat.S_IMODE(state.stat().st_mode) == 0o700
    assert (state / "key").read_text() == private + "\n"
    assert key_file.load_or_create(state) == private
    assert key_file.peek_public_key(state) == key_file.public_key(private)
    assert [path.name for path in state.iterdir()] == ["key"]


def test_the_public_key_is_what_wg_pubkey_prints() -> None:
    private = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8="
    assert key_file.public_key(private) == "j0DFrbaPJWJK5bIU6nZ6bslNgp09e14a0bpvPiE4KF8="


def test_no_key_is_none_and_makes_nothing(tmp_path: Path) -> None:
    assert key_file.peek(tmp_path / "state") is None
    assert key_file.peek_public_key(tmp_path / "state") is None
    assert not (tmp_path / "state").exists()


def test_agents_that_start_at_once_use_one_key(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(lambda _: key_file.load_or_create(tmp_path), range(32)))
    assert len(keys) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["key"]


def test_a_key_that_others_can_read_is_refused_with_the_command_that_mends_it(tmp_path: Path) -> None:
    key_file.load_or_create(tmp_path)
    path = tmp_path / "key"
    path.chmod(0o640)
    with pytest.raises(KeyFileError, match=rf"open to others \(mode 0640\); run chmod 600 {path}"):
        key_file.load_or_create(tmp_path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


@pytest.mark.parametrize("content", [b"", b"not a key\n", b"AAAA\n", b"\xff\xfe", b"x" * 5000])
def test_what_is_no_key_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(KeyFileError, match="holds no WireGuard private key"):
        key_file.load_or_create(tmp_path)
    assert path.read_bytes() == content


def test_a_symbolic_link_that_leads_nowhere_is_refused_with_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "key").symlink_to(tmp_path / "unmounted" / "key")
    with pytest.raises(
        DanglingLink, match="is a symbolic link, and there is no file where it leads; put the key there"
    ):
        key_file.load_or_create(tmp_path)
    assert (tmp_path / "key").is_symlink()


def test_a_key_that_is_to_be_replaced_is_removed_while_nothing_runs_with_it(tmp_path: Path) -> None:
    key_file.load_or_create(tmp_path)
    for change in (lambda: (tmp_path / "key").chmod(0o640), lambda: (tmp_path / "key").write_text("no key")):
        change()
        with pytest.raises(UnusableKey, match=r"\(systemctl stop kilo-etcd\), remove it, and start that again"):
            key_file.load_or_create(tmp_path)
        (tmp_path / "key").chmod(0o600)


def test_a_key_behind_a_symbolic_link_is_taken(tmp_path: Path) -> None:
    made = key_file.load_or_create(tmp_path / "secrets")
    (tmp_path / "state").mkdir()
    (tmp_path / "state" / "key").symlink_to(tmp_path / "secrets" / "key")
    assert key_file.load_or_create(tmp_path / "state") == made


@pytest.mark.parametrize("make", [lambda path: os.mkfifo(path, 0o600), Path.mkdir], ids=["pipe", "directory"])
def test_a_pipe_or_directory_in_the_keys_place_is_refused(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "key")
    with pytest.raises(KeyFileError, match="no regular file"):
        key_file.load_or_create(tmp_path)


def test_a_directory_that_cannot_be_had_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(KeyFileError) as refused:
        key_file.load_or_create(tmp_path / "file" / "state")
    assert "\n" not in str(refused.value)
    assert str(tmp_path / "file" / "state") in str(refused.value)


def test_a_directory_that_cannot_be_written_names_the_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "link", refuse)
    with pytest.raises(KeyFileError, match=r"cannot be written to .*: Permission denied; .*--state-dir"):
        key_file.load_or_create(tmp_path)
    assert list(tmp_path.iterdir()) == []
