"""The file that says which key an agent gave its device: of one network namespace, believed only if root wrote it."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from kilo_etcd.kernel import device_keys
from kilo_etcd.kernel.device_keys import DeviceKeys

KEY, OTHER = "A" * 43 + "=", "B" * 43 + "="


def only_file(directory: Path) -> Path:
    (file,) = directory.iterdir()
    return file


def test_network_namespaces_with_one_directory_and_one_name_do_not_meet(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def enter(namespace: int) -> None:
        monkeypatch.setattr(device_keys, "network_namespace", lambda: namespace)

    keys = DeviceKeys(str(tmp_path / "run"))
    for namespace, key in ((1, KEY), (2, OTHER)):
        enter(namespace)
        assert keys.read("kilo0") == ""
        keys.write("kilo0", key)
        assert keys.read("kilo0") == key
    keys.forget("kilo0")
    keys.forget("kilo0")
    assert keys.read("kilo0") == ""
    enter(1)
    assert keys.read("kilo0") == KEY


def test_nobody_else_may_read_the_file(tmp_path: Path) -> None:
    DeviceKeys(str(tmp_path)).write("kilo0", KEY)
    assert stat.S_IMODE(only_file(tmp_path).stat().st_mode) == 0o600


@pytest.mark.parametrize("others", ["write", "link", "large", "fifo", "owner"])
def test_a_file_that_others_may_have_written_is_not_believed_and_is_written_anew(tmp_path: Path, others: str) -> None:
    keys = DeviceKeys(str(tmp_path))
    keys.write("kilo0", KEY)
    file = only_file(tmp_path)
    if others == "write":
        file.chmod(0o622)
    elif others == "link":
        file.rename(tmp_path / "elsewhere")
        file.symlink_to("elsewhere")
    elif others == "large":
        file.write_text(KEY + " " * 4096)
    elif others == "fifo":
        file.unlink()
        os.mkfifo(file, 0o600)
    elif os.geteuid():
        pytest.skip("needs root")
    else:
        os.chown(file, 12345, -1)
    assert keys.read("kilo0") == ""
    keys.write("kilo0", KEY)
    assert keys.read("kilo0") == KEY
