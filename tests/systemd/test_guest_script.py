"""`scripts/guest`: which kernel it takes, and what it says where it has none. The guest itself other tests use."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def guest(script: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    inherited = {name: value for name, value in os.environ.items() if name != "KILO_UML"}
    return subprocess.run(
        [sys.executable, str(script), *arguments],
        env={**inherited, **environment}, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


def checkout(directory: Path) -> Path:
    """The script and its configuration in a checkout with no ready kernel beside it."""
    scripts = directory / "kilo-etcd" / "scripts"
    scripts.mkdir(parents=True)
    for name in ("guest", "guest.config"):
        shutil.copy(ROOT / "scripts" / name, scripts)
    return scripts / "guest"


def test_a_named_kernel_that_is_none_is_refused(tmp_path: Path) -> None:
    script = checkout(tmp_path)
    (tmp_path / "image").write_text("no kernel")
    for named in (tmp_path / "image", tmp_path, tmp_path / "nothing"):
        done = guest(script, "kernel", KILO_UML=str(named))
        assert done.returncode == 2
        assert done.stderr.startswith(f"guest: KILO_UML names {named}, which is no executable file")


def test_no_kernel_is_taken_from_a_cache_that_others_can_write_to(tmp_path: Path) -> None:
    script = checkout(tmp_path)
    cache = tmp_path / "cache" / "kilo-etcd"
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    mark = hashlib.sha256(script.with_name("guest.config").read_bytes()).hexdigest()[:12]
    (cache / f"linux-6.12.1-um-{mark}").touch()
    done = guest(script, "kernel", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert done.returncode == 2
    assert done.stderr == f"guest: others can write to {cache}; set XDG_CACHE_HOME to a directory of your own\n"


def test_a_kernel_built_from_this_configuration_is_taken_and_no_other(tmp_path: Path) -> None:
    script = checkout(tmp_path)
    cache = tmp_path / "cache" / "kilo-etcd"
    cache.mkdir(parents=True)
    mark = hashlib.sha256(script.with_name("guest.config").read_bytes()).hexdigest()[:12]
    (cache / "linux-6.12.1-um-0123456789ab").touch()
    wanted = cache / f"linux-6.12.1-um-{mark}"
    wanted.touch()
    done = guest(script, "kernel", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert (done.returncode, done.stdout) == (0, f"{wanted}\n")
    assert guest(script, "ready", XDG_CACHE_HOME=str(tmp_path / "cache")).returncode == 0
    wanted.unlink()
    done = guest(script, "ready", XDG_CACHE_HOME=str(tmp_path / "cache"))
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "")


def test_without_a_kernel_and_without_a_compiler_it_says_what_to_install(tmp_path: Path) -> None:
    done = guest(checkout(tmp_path), "kernel", XDG_CACHE_HOME=str(tmp_path / "cache"), PATH=str(tmp_path))
    assert done.returncode == 2
    assert done.stderr == (
        "guest: to build the guest's kernel, install gcc make flex bison bc xz-utils; or name a User-mode Linux "
        "kernel in KILO_UML\n"
    )


def test_a_command_is_asked_for(tmp_path: Path) -> None:
    done = guest(checkout(tmp_path), "run", KILO_UML=sys.executable)
    assert done.returncode == 2
    assert done.stderr == "guest: no command: scripts/guest run -- COMMAND...\n"
