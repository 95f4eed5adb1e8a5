"""The directories of running labs: whose they are, and that nothing but a lab's own is ever removed."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from kilo_etcd.lab import control, runtime
from kilo_etcd.lab.machine import set_sysctl
from kilo_etcd.lab.runtime import SUBDIRECTORY, VARIABLE, LabError, hold, running_labs, socket_path

HOLD = """
import sys
from kilo_etcd.lab.runtime import hold
with hold(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory full of somebody's work, which is named as the runtime directory."""
    for name in ("thesis/ch1.tex", "photos/2025/a.jpg", ".ssh/id", "file.txt", "project/lock", "kilo-labs/lock"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("precious")
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    return tmp_path


def everything(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def killed_lab(name: str) -> None:
    """What a lab leaves that was killed."""
    with subprocess.Popen([sys.executable, "-c", HOLD, name], stdout=subprocess.PIPE, stdin=subprocess.PIPE) as lab:
        assert lab.stdout is not None
        assert lab.stdout.readline() == b"held\n"
        lab.send_signal(signal.SIGKILL)


def test_a_directory_full_of_somebodys_work_is_left_as_it_was(home: Path) -> None:
    before = everything(home)
    with hold("a"):
        assert running_labs() == ["a"]
        assert set(everything(home)) - set(before) == {
            SUBDIRECTORY, f"{SUBDIRECTORY}/a", f"{SUBDIRECTORY}/a/control", f"{SUBDIRECTORY}/a/lock"
        }  # fmt: skip
    assert everything(home) == before


def test_in_our_own_subdirectory_too_only_what_a_lab_has_made_is_removed(home: Path) -> None:
    killed_lab("dead")
    base = home / SUBDIRECTORY
    assert running_labs() == []
    (base / "mixed").mkdir()
    for name in ("unmarked/lock", "locked/notes", "mixed/notes"):
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text("1234\n")
    (base / "mixed/lock").write_text("kilo-lab 1\n")
    (base / "empty").mkdir()
    (base / "link").symlink_to(home / "thesis")
    (base / "deep").mkdir()
    (base / "deep/lock").symlink_to(home / "file.txt")
    (home / "file.txt").write_text("kilo-lab 1\n")
    (base / "fifo").mkdir()
    os.mkfifo(base / "fifo/lock")
    with hold("a"):
        pass
    assert everything(base) == [
        "deep", "deep/lock", "empty", "fifo", "fifo/lock", "link", "locked", "locked/notes", "mixed", "mixed/notes",
        "unmarked", "unmarked/lock",
    ]  # fmt: skip
    assert (home / "thesis/ch1.tex").read_text() == "precious"
    for name in ("unmarked", "link", "deep", "mixed"):
        with (
            pytest.raises(LabError, match=f"{SUBDIRECTORY}/{name} is not the directory of a lab; move it away"),
            hold(name),
        ):
            pass
    with hold("empty"):  # as a run leaves it that was killed as it began
        assert running_labs() == ["empty"]


def test_a_link_in_the_place_of_the_subdirectory_is_not_followed(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (home / SUBDIRECTORY).symlink_to(home / "photos")
    with pytest.raises(LabError, match=f"{SUBDIRECTORY} is a symbolic link; set {VARIABLE}"), hold("a"):
        pass
    with pytest.raises(LabError, match="is a symbolic link"):
        running_labs()
    assert (home / "photos/2025/a.jpg").exists()
    monkeypatch.setenv(VARIABLE, "/proc/nowhere")
    with pytest.raises(LabError, match="/proc/nowhere/kilo-lab cannot be made: No such file"), hold("a"):
        pass
    monkeypatch.setenv(VARIABLE, str(home))
    (home / SUBDIRECTORY).unlink()
    (home / SUBDIRECTORY).symlink_to(home / "nowhere")
    with pytest.raises(LabError, match="cannot be made: File exists"), hold("a"):
        pass
    # A link that leads nowhere above it: an endless loop was here.
    (home / "link").symlink_to(home / "nowhere/else")
    monkeypatch.setenv(VARIABLE, str(home / "link"))
    with pytest.raises(LabError, match="cannot be made: File exists"), hold("a"):
        pass


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_the_directory_of_another_user_is_not_used(home: Path) -> None:
    base = home / SUBDIRECTORY
    base.mkdir()
    os.chown(base, 65534, 65534)
    with pytest.raises(LabError, match="belongs to another user"), hold("a"):
        pass
    os.chown(base, 0, 0)
    base.chmod(0o777)
    with pytest.raises(LabError, match="can be written to by others"), hold("a"):
        pass
    base.chmod(0o700)
    killed_lab("dead")
    os.chown(base / "dead/lock", 65534, 65534)
    with hold("a"):
        assert (base / "dead/control").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
async def test_no_descriptor_is_handed_to_another_users_socket(home: Path) -> None:
    place = socket_path("a").parent
    place.mkdir(parents=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(place / "control"))
        listener.listen()
        (await control.connect(socket_path("a"))).close()
        os.chown(place, 65534, 65534)
        with pytest.raises(LabError, match="no lab answers"):
            await control.connect(socket_path("a"))


def test_a_name_in_use_is_refused_and_a_killed_lab_gives_way(home: Path) -> None:
    with hold("a"), pytest.raises(LabError, match="'a' is running already"), hold("a"):
        pass
    killed_lab("a")
    assert everything(home / SUBDIRECTORY) == ["a", "a/control", "a/lock"]
    with hold("a"), hold("b"):
        assert running_labs() == ["a", "b"]
    assert not (home / SUBDIRECTORY).exists()


def test_without_the_variable_labs_are_in_a_directory_of_this_users_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert runtime.base_directory() == tmp_path / SUBDIRECTORY


async def test_many_at_once_start_and_end(home: Path) -> None:
    def some(number: int) -> None:
        for _ in range(20):
            with hold(f"lab-{number}"):
                assert f"lab-{number}" in running_labs()

    async with trio.open_nursery() as nursery:
        for number in range(4):
            nursery.start_soon(trio.to_thread.run_sync, some, number)
    assert not (home / SUBDIRECTORY).exists()


def test_a_setting_that_a_container_may_not_write_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="systemd-nspawn --capability=all") as caught:
        set_sysctl(tmp_path, "1")
    assert str(caught.value.strerror).startswith(f"{tmp_path} cannot be written (Is a directory): in a container")
