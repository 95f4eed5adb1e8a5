"""The state directory of an agent that runs: full, read-only, removed, or without its key."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
from agent_world import PRIVATE, World, running

from helpers import eventually
from kilo_etcd.agent.cachefile import FILE
from kilo_etcd.agent.snapshot_cache import Disk
from kilo_etcd.agent.state_directory import PERIOD_SECONDS, StateFound, look
from kilo_etcd.runtime import key_file
from kilo_etcd.store.status_texts import STATE_TROUBLE

OTHER = key_file.generate()


@pytest.fixture
def state(tmp_path: Path) -> Path:
    directory = tmp_path / "state"
    key_file.load_or_create(directory, PRIVATE)
    return directory


def space(monkeypatch: pytest.MonkeyPatch, **values: int) -> None:
    """What the file system says of itself."""
    real = os.statvfs

    def statvfs(path: Any) -> Any:
        found = real(path)
        names = [name for name in dir(found) if name.startswith("f_")]
        return type("Statvfs", (), {**{name: getattr(found, name) for name in names}, **values})

    monkeypatch.setattr(os, "statvfs", statvfs)


def test_a_key_that_is_gone_is_written_again_and_so_is_the_directory(state: Path) -> None:
    assert look(state, PRIVATE) == StateFound()
    (state / "key").unlink()
    assert look(state, PRIVATE) == StateFound(restored=True)
    shutil.rmtree(state)
    assert look(state, PRIVATE) == StateFound(restored=True)
    assert key_file.peek(state) == PRIVATE
    assert state.stat().st_mode & 0o777 == 0o700
    assert (state / "key").stat().st_mode & 0o777 == 0o600


def test_a_key_that_is_there_is_never_overwritten(state: Path) -> None:
    (state / "key").write_text(f"{OTHER}\n")
    assert "is another one than the agent has" in (look(state, PRIVATE).trouble or "")
    (state / "key").write_text("no key\n")
    assert "holds no WireGuard private key" in (look(state, PRIVATE).trouble or "")
    assert (state / "key").read_text() == "no key\n"


def test_a_directory_that_cannot_be_had_is_named_with_what_a_start_would_do(state: Path) -> None:
    shutil.rmtree(state)
    state.write_text("a file")
    trouble = look(state, PRIVATE).trouble or ""
    assert trouble.startswith(f"the private key {state}/key cannot be read: Not a directory")
    assert "its private key is in memory only" in trouble
    assert OTHER not in trouble
    assert PRIVATE not in trouble


@pytest.mark.parametrize(
    ("values", "full_for"),
    [
        ({"f_bavail": 0, "f_bfree": 0}, {0, 1000}),
        ({"f_bavail": 0, "f_bfree": 5}, {1000}),
        ({"f_favail": 0, "f_ffree": 0, "f_files": 5}, {0, 1000}),
        ({"f_favail": 0, "f_ffree": 3, "f_files": 5}, {1000}),
        ({"f_favail": 0, "f_ffree": 0, "f_files": 0}, set()),
    ],
)
@pytest.mark.parametrize("user", [0, 1000])
def test_a_full_disk_is_named(
    state: Path, monkeypatch: pytest.MonkeyPatch, values: dict[str, int], full_for: set[int], user: int
) -> None:
    """What is reserved for root is free for root only."""
    space(monkeypatch, **values)
    monkeypatch.setattr(os, "geteuid", lambda: user)
    trouble = look(state, PRIVATE).trouble
    assert (trouble is not None) == (user in full_for)
    assert trouble is None or f"the state directory {state} cannot be written to: No space left on device" in trouble


def test_a_read_only_directory_is_named(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda *of: False)
    space(monkeypatch, f_flag=os.ST_RDONLY)
    assert "cannot be written to: Read-only file system" in (look(state, PRIVATE).trouble or "")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda key: key.write_text("no key\n"),
        lambda key: key.chmod(0o644),
        lambda key: key.write_text(f"{OTHER}\n"),
        lambda key: (key.unlink(), key.mkdir()),
        lambda key: (key.unlink(), key.symlink_to("nowhere")),
        lambda key: (key.unlink(), key.parent.rmdir(), key.parent.write_text("a file")),
    ],
)
def test_no_sentence_on_the_directory_is_taken_for_one_on_packets(state: Path, spoil: Callable[[Path], object]) -> None:
    spoil(state / "key")
    assert (look(state, PRIVATE).trouble or "").startswith(STATE_TROUBLE)


# --- an agent ---------------------------------------------------------------------------------------------------------


async def at_once(work: Callable[[], Any]) -> Any:
    await trio.lowlevel.checkpoint()
    return work()


def errors(world: World) -> list[str]:
    found: list[str] = json.loads(world.etcd.get("/kilo-status/by/h1/status") or b"{}").get("errors", [])
    return found


def usable(world: World) -> float | None:
    return world.metrics.registry.get_sample_value("kilo_state_directory_usable")


@pytest.mark.autojump
async def test_an_agent_restores_its_key_and_its_snapshot(world: World, state: Path) -> None:
    disk = Disk(state, at_once, private_key=PRIVATE)
    async with running(world, disk=disk):
        await eventually((state / FILE).exists, 30, every=0.1)
        await eventually(lambda: usable(world) == 1, 30, every=0.1)
        shutil.rmtree(state)
        await eventually((state / FILE).exists, 2 * PERIOD_SECONDS, every=0.1)
        assert key_file.peek(state) == PRIVATE
        assert world.logged("the private key was gone from the state directory") == 1
        assert errors(world) == []


@pytest.mark.autojump
async def test_a_state_directory_that_is_of_no_use_is_in_status_health_and_metrics(
    world: World, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = Disk(state, at_once, private_key=PRIVATE)
    async with running(world, disk=disk):
        await eventually(lambda: world.metrics.health() is None, 30, every=0.1)
        with monkeypatch.context() as full:
            space(full, f_bavail=0, f_bfree=0)
            await eventually(lambda: len(errors(world)) == 1, 2 * PERIOD_SECONDS, every=0.1)
            assert "cannot be written to: No space left on device" in errors(world)[0]
            assert world.metrics.health() == errors(world)[0]
            assert usable(world) == 0
            await trio.sleep(100)
            assert world.logged("cannot be written to: No space left on device") == 1
        await eventually(lambda: errors(world) == [], 2 * PERIOD_SECONDS, every=0.1)
        assert usable(world) == 1
        assert world.metrics.health() is None


@pytest.mark.autojump
async def test_a_snapshot_that_cannot_be_written_is_in_the_status_until_it_is(world: World, state: Path) -> None:
    disk = Disk(state, at_once, private_key=PRIVATE)
    aside = state / f".{FILE}.new"
    aside.mkdir()
    async with running(world, disk=disk):
        await eventually(lambda: len(errors(world)) == 1, 3 * PERIOD_SECONDS, every=0.1)
        assert errors(world)[0].startswith(f"the snapshot cannot be cached on disk for a boot without etcd: {state}")
        aside.rmdir()
        await eventually(lambda: errors(world) == [], 2 * PERIOD_SECONDS, every=0.1)
        assert (state / FILE).exists()


@pytest.mark.autojump
@pytest.mark.parametrize("spoil", [lambda key: key.chmod(0o644), lambda key: key.write_text("no key\n")])
async def test_a_key_that_others_may_have_read_does_not_come_back(
    world: World, state: Path, spoil: Callable[[Path], object]
) -> None:
    disk = Disk(state, at_once, private_key=PRIVATE)
    async with running(world, disk=disk):
        await eventually((state / FILE).exists, 30, every=0.1)
        spoil(state / "key")
        await eventually(lambda: len(errors(world)) == 1, 2 * PERIOD_SECONDS, every=0.1)
        (state / "key").unlink()
        await eventually(lambda: "is gone, and is not restored" in str(errors(world)), 2 * PERIOD_SECONDS, every=0.1)
        await trio.sleep(5 * PERIOD_SECONDS)
        assert not (state / "key").exists()
        # An operator's own is taken for what it is.
        key_file.load_or_create(state, PRIVATE)
        await eventually(lambda: errors(world) == [], 2 * PERIOD_SECONDS, every=0.1)
        await trio.sleep(2 * PERIOD_SECONDS)
        (state / "key").unlink()
        await eventually((state / "key").exists, 2 * PERIOD_SECONDS, every=0.1)
