"""What is said of changes that fail. Pure."""

from __future__ import annotations

import errno
import os

import pytest

from kilo_etcd.kernel.errors import failure
from kilo_etcd.kernel.state import AllowPings, Change, KeepAdvertisements, LoosenReversePath, SetForwarding


def sentence(change: Change, code: int) -> str:
    return failure(change, OSError(code, os.strerror(code))).text


@pytest.mark.parametrize(
    ("change", "setting"),
    [(SetForwarding(4), "net.ipv4.ip_forward=1"), (AllowPings(7), "net.ipv4.ping_group_range='7 7'")],
)
def test_a_sysctl_of_a_container_is_set_on_the_host_or_by_the_container_manager(change: Change, setting: str) -> None:
    said = sentence(change, errno.EROFS)
    assert "(/proc/sys is read-only)" in said
    assert said.endswith(
        f": set it on the host with `sysctl -w {setting}`; in a container with a network of its own have the "
        f"container manager set it (docker run --sysctl {setting}), or make /proc/sys writable there"
    )


@pytest.mark.parametrize("change", [SetForwarding(4, "kilo0"), LoosenReversePath("eth0"), KeepAdvertisements("eth0")])
def test_a_sysctl_of_a_device_is_nothing_that_a_container_manager_can_set(change: Change) -> None:
    said = sentence(change, errno.EROFS)
    assert said.endswith(f"`{change}`; in a container with a network of its own make /proc/sys writable there")


def test_a_sysctl_that_is_another_users_is_set_on_the_host() -> None:
    assert sentence(SetForwarding(6), errno.EACCES) == (
        "net.ipv6.conf.all.forwarding could not be set to 1 (Permission denied): "
        "set it on the host with `sysctl -w net.ipv6.conf.all.forwarding=1`"
    )
