"""Without a free descriptor nothing can be opened, which says nothing of what was to be opened."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import trio

from kilo_etcd import kernel
from kilo_etcd.agent import cachefile, discover
from kilo_etcd.agent.config import ListenAddress
from kilo_etcd.agent.leader_hints.peer_query import UdpTransport
from kilo_etcd.agent.metrics import Metrics
from kilo_etcd.base import descriptors
from kilo_etcd.etcd.api import Tls
from kilo_etcd.etcd.endpoint import parse_endpoint
from kilo_etcd.etcd.grpc import TransportFailed
from kilo_etcd.etcd.tls import Lookups, connect, tls_context
from kilo_etcd.kernel import errors, sysctl, userspace
from kilo_etcd.kernel.firewall import iptables
from kilo_etcd.kernel.state import CreateLink, Setup
from kilo_etcd.runtime import key_file, lock_file, resolve

FULL = OSError(errno.EMFILE, os.strerror(errno.EMFILE))


@pytest.fixture
def nothing_left(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it, and nothing can be opened any more."""

    def refuse(*_args: object, **_options: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def begin() -> None:
        for place, name in ((os, "open"), (socket, "socket"), (Path, "read_text"), (os, "listdir")):
            monkeypatch.setattr(place, name, refuse)

    return begin


def about_descriptors(text: object) -> bool:
    return "file descriptor" in str(text) and "LimitNOFILE=" in str(text)


def test_the_two_errors_are_told_from_others() -> None:
    assert about_descriptors(descriptors.shortage(FULL))
    assert "fs.file-max" in str(descriptors.shortage(OSError(errno.ENFILE, "")))
    for other in (OSError(errno.ENOENT, ""), OSError("no number"), ValueError()):
        assert descriptors.shortage(other) is None
    assert descriptors.exhausted() is None
    assert descriptors.running_short() is None


def test_a_userspace_device_is_not_somebody_elses_for_want_of_a_descriptor(
    tmp_path: Path, nothing_left: Callable[[], None]
) -> None:
    device = userspace.UserspaceDevice(str(tmp_path), str(tmp_path))
    assert device.process("kilo0") is None
    with socket.socket(socket.AF_UNIX) as served:
        served.bind(str(tmp_path / "kilo0.sock"))
        served.listen()
    nothing_left()
    for look in (device.process, device._remove_stale):
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            look("kilo0")
    monkey = pytest.MonkeyPatch()
    with monkey.context() as patch:
        patch.setattr(shutil, "which", lambda _name: "/bin/wireguard-go")
        with pytest.raises(kernel.KernelError) as caught:
            device.check("kilo0", "wireguard-go")
    assert about_descriptors(caught.value)
    assert "modprobe" not in str(caught.value)


def test_the_descriptors_of_the_device_are_not_ours() -> None:
    with pytest.raises(OSError, match="the process of the userspace WireGuard has no file descriptor left") as caught:
        userspace.decode(f"errno={errno.EMFILE}\n\n")
    assert not descriptors.is_shortage(caught.value)


async def test_the_kernel_cannot_be_opened_and_the_sentence_names_descriptors(nothing_left: Callable[[], None]) -> None:
    nothing_left()
    with pytest.raises(kernel.KernelError) as caught:
        async with kernel.open_kernel(Setup(interface="kilo0", private_key=key_file.generate())):
            pass
    assert about_descriptors(caught.value)
    assert "ip link del" not in str(caught.value)
    with pytest.raises(kernel.KernelError) as caught:
        await kernel.list_addresses()
    assert about_descriptors(caught.value)


def test_what_cannot_be_changed_or_read_names_descriptors(nothing_left: Callable[[], None]) -> None:
    for change in (CreateLink("kilo0", "wireguard"), CreateLink("kilo0", "ipip")):
        assert about_descriptors(errors.failure(change, FULL).text)
    assert about_descriptors(errors.cannot_ping(FULL))
    # What netlink says is of the kernel's tables.
    assert not about_descriptors(errors.failure(CreateLink("kilo0", "ipip"), errors.NetlinkError(errno.EMFILE)).text)
    nothing_left()
    for read in (sysctl.nobody_may_ping, sysctl.forwarding):
        with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
            read()


def test_a_lock_that_cannot_be_looked_at_is_not_free(tmp_path: Path, nothing_left: Callable[[], None]) -> None:
    nothing_left()
    with pytest.raises(descriptors.OutOfDescriptors) as caught, lock_file.agent_lock(tmp_path):
        pass
    assert about_descriptors(caught.value)


def test_key_and_kept_mesh_are_not_broken(tmp_path: Path, nothing_left: Callable[[], None]) -> None:
    identity = cachefile.Identity(prefix="/kilo", node="h1", public_key="k")
    nothing_left()
    with pytest.raises(key_file.KeyFileError) as key:
        key_file.load_or_create(tmp_path)
    assert about_descriptors(key.value)
    assert not isinstance(key.value, key_file.UnusableKey)
    assert "mend or move" not in str(key.value)
    with pytest.raises(cachefile.Unusable) as kept:
        cachefile.read(tmp_path / cachefile.FILE, identity)
    assert about_descriptors(kept.value)


async def test_etcd_is_not_misconfigured_and_names_do_resolve(
    nothing_left: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    endpoint = parse_endpoint("http://etcd.example:2379", tls=False)

    def unresolved(*_args: object, **_options: object) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")

    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    with pytest.raises(TransportFailed, match="its name does not resolve"):
        await connect(endpoint, None, Lookups())
    nothing_left()
    with pytest.raises(TransportFailed) as caught:
        await connect(endpoint, None, Lookups())
    assert about_descriptors(caught.value)
    assert not caught.value.permanent
    assert about_descriptors(resolve._reason(socket.gaierror(socket.EAI_AGAIN, "Temporary failure")))


def test_certificates_that_cannot_be_opened_now_are_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr("ssl.create_default_context", refuse)
    with pytest.raises(TransportFailed) as caught:
        tls_context(Tls(ca="/etc/ca.pem"))
    assert about_descriptors(caught.value)
    assert not caught.value.permanent


def test_a_host_does_not_lose_its_location(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    assert discover.location_from_cloud_init(tmp_path / "none")[0] is None
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(descriptors.OutOfDescriptors) as caught:
        discover.location_from_cloud_init(tmp_path / "none")
    assert about_descriptors(caught.value)


async def test_the_listener_and_the_peer_query_port_say_so(nothing_left: Callable[[], None]) -> None:
    metrics = Metrics()
    nothing_left()
    async with metrics.serve(ListenAddress("", 1107)) as where:
        assert where is None
    assert about_descriptors(metrics.listen_trouble)
    assert "choose another address" not in str(metrics.listen_trouble)
    with pytest.raises(ExceptionGroup) as caught:
        async with trio.open_nursery() as nursery:
            await nursery.start(UdpTransport(1107).run)
    assert caught.group_contains(OSError, match=os.strerror(errno.EMFILE))


def test_health_says_that_descriptors_run_short(nothing_left: Callable[[], None]) -> None:
    metrics = Metrics()
    metrics.etcd_contact()
    metrics.reconciled(trouble=None)
    assert metrics.health() is None
    nothing_left()
    assert about_descriptors(metrics.health())


def test_rules_that_cannot_be_read_are_not_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: object, **_options: object) -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(shutil, "which", lambda *_args, **_options: "/sbin/iptables")
    monkeypatch.setattr(subprocess, "run", refuse)
    with pytest.raises(OSError, match=os.strerror(errno.EMFILE)):
        iptables.Iptables("kilo0", tmp_path / "record", lambda: None).read(True)
