"""The block of names in a hosts file, and the file it goes into."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
from collections.abc import Callable, Mapping
from contextlib import suppress
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path
from typing import Any

import pytest
import trio

from kilo_etcd.connect.command import interface_for
from kilo_etcd.model import IPAddress, Node, Peer, Snapshot
from kilo_etcd.model.hostplan import HostPlan, RoutePlan, Via
from kilo_etcd.runtime import hostsfile
from kilo_etcd.runtime.hostnames import domain, known_names, with_block
from kilo_etcd.runtime.hostsfile import HostsFileError, write_names
from kilo_etcd.topology.segments import build_topology

GCP, HOME = ip_address("10.4.0.1"), ip_address("10.4.0.2")
SIX = ip_address("fd00:4::2")
NAMES = {"gcp-1": (GCP,), "home-1": (HOME, SIX)}
FILE = b"127.0.0.1\tlocalhost\n# a comment\n192.0.2.7 printer\n"
BLOCK = (
    b"# kilo-etcd kilo-kilo: begin (kgctl connect writes it for /kilo, and removes it at its end)\n"
    b"10.4.0.1 gcp-1.kilo gcp-1.mesh gcp-1\n"
    b"10.4.0.2 home-1.kilo home-1.mesh home-1\nfd00:4::2 home-1.kilo home-1.mesh home-1\n"
    b"# kilo-etcd kilo-kilo: end\n"
)


def test_the_block_stands_at_the_end_and_goes_again() -> None:
    made = with_block(FILE, "kilo-kilo", NAMES, prefix="/kilo")
    assert made == FILE + BLOCK
    assert with_block(made, "kilo-kilo", NAMES, prefix="/kilo") == made
    assert with_block(made, "kilo-kilo", None, prefix="/kilo") == FILE


def test_a_block_is_replaced_where_it_stands_and_the_rest_is_kept_byte_for_byte() -> None:
    after = b"10.0.0.1 \xff\xfe odd\r\n\n"
    made = with_block(FILE + BLOCK + after, "kilo-kilo", {"gcp-1": (GCP,)}, prefix="/kilo")
    assert made.startswith(FILE)
    assert made.endswith(after)
    assert b"home-1" not in made


def test_a_file_without_a_last_newline_gets_one() -> None:
    assert with_block(b"127.0.0.1 localhost", "kilo-kilo", NAMES, prefix="/kilo") == b"127.0.0.1 localhost\n" + BLOCK


@pytest.mark.parametrize(
    "after",
    [
        b"", b"\n192.0.2.9 nas\n", b"# mine\n192.0.2.9 nas\n", b"192.0.2.9 nas\n", b"192.0.2.9 nas nas.mesh box\n",
        b"10.5.0.1 other.second\n# kilo-etcd kilo-second: end\n",
    ],
)  # fmt: skip
def test_a_block_that_was_cut_costs_nobody_elses_line(after: bytes) -> None:
    cut = FILE + BLOCK[: BLOCK.rindex(b"#")] + after
    assert with_block(cut, "kilo-kilo", None, prefix="/kilo") == FILE + after


def test_a_second_block_of_one_interface_is_taken_out() -> None:
    between, after = b"192.0.2.8 scanner\n", b"192.0.2.9 nas\n"
    cut = BLOCK[: BLOCK.rindex(b"#")]
    for first in (BLOCK, cut):
        twice = FILE + first + between + BLOCK + after + cut
        assert with_block(twice, "kilo-kilo", NAMES, prefix="/kilo") == FILE + BLOCK + between + after
        assert with_block(twice, "kilo-kilo", None, prefix="/kilo") == FILE + between + after
    # Another interface's block ends one that was cut.
    other = BLOCK.replace(b"kilo-kilo", b"kilo-second").replace(b".kilo", b".second")
    assert with_block(FILE + cut + other, "kilo-kilo", None, prefix="/kilo") == FILE + other


def test_what_the_file_says_already_is_not_said_again_in_short() -> None:
    made = with_block(b"127.0.1.1 GCP-1 gcp-1.example.org\n", "kilo-kilo", NAMES, prefix="/kilo", own=("home-1",))
    assert b"10.4.0.1 gcp-1.kilo gcp-1.mesh\n" in made
    assert b"10.4.0.2 home-1.kilo home-1.mesh\n" in made


def test_two_meshes_share_a_file_and_short_names_are_the_firsts() -> None:
    both = with_block(FILE + BLOCK, "kilo-second", {"gcp-1": (ip_address("10.5.0.1"),)}, prefix="/second")
    assert both.endswith(b"10.5.0.1 gcp-1.second\n# kilo-etcd kilo-second: end\n")
    # Whichever is written again, neither changes.
    assert with_block(both, "kilo-kilo", NAMES, prefix="/kilo") == both
    assert with_block(both, "kilo-kilo", None, prefix="/kilo").startswith(FILE + b"# kilo-etcd kilo-second: begin")


def test_domains_and_interfaces_of_prefixes() -> None:
    assert [domain(text) for text in ("/kilo", "/Corp/emea_1", "/é")] == ["kilo", "emea-1.corp", "mesh"]
    assert interface_for("/kilo") == "kilo-kilo"
    prefixes = ["/kilo", "/a/b", "/a-b", "/ab", "/kilo-second-mesh", "/kilo-second-home", "/ipip", "/é"]
    made = [interface_for(prefix) for prefix in prefixes]
    assert len(set(made)) == len(made)
    assert max(map(len, made)) <= 15
    assert not any(name.endswith("ipip") for name in made)


def test_whoever_writes_a_record_does_not_decide_where_other_names_lead() -> None:
    strange = ("github.com", "com", "dev", "de", "localhost", "ip6-localhost", "wpad", "WPAD", "metadata", "_gateway")
    made = with_block(FILE, "kilo-kilo", dict.fromkeys(strange, (GCP,)), prefix="/kilo")
    written = [word for line in made.decode().splitlines() if line.startswith("10.4.") for word in line.split()[1:]]
    assert written == [f"{name}.{domain}" for name in strange for domain in ("kilo", "mesh")]
    # Nor where one of the machine's own leads, or one that the file has, with the mesh's domain too.
    hosts = b"192.0.2.1 gcp-1.kilo Laptop.example.org\n"
    names = {"gcp-1": (GCP,), "home-1": (HOME,), "laptop": (HOME,)}
    made = with_block(hosts, "kilo-kilo", names, prefix="/kilo", own=("LAPTOP", "home-1.kilo", "home-1"))
    assert b"10.4.0.1 gcp-1.mesh gcp-1\n10.4.0.2 home-1.mesh\n10.4.0.2 laptop.kilo laptop.mesh\n#" in made


def test_no_domain_of_a_mesh_is_somebody_elses() -> None:
    prefixes = ("/com", "/de", "/dev", "/local", "/com/github", "/localhost", "/kilo/com", "/internal")
    assert [domain(prefix) for prefix in prefixes] == [
        "com.mesh", "de.mesh", "dev.mesh", "local.mesh", "github.com.mesh", "localhost.mesh", "com.kilo",
        "internal.mesh",
    ]  # fmt: skip


def plan_of(*networks: str, addresses: tuple[str, ...] = ("10.4.9.9/32",)) -> HostPlan:
    routes = {ip_network(text): RoutePlan(destination=ip_network(text), via=Via.TUNNEL) for text in networks}
    return HostPlan(node="laptop", revision=1, addresses=tuple(map(ip_interface, addresses)), routes=routes)


def test_a_node_has_its_name_before_a_peer_and_names_that_are_none_are_left_out() -> None:
    names = ("gcp-1", "Home-1", "under score!", "node.example.org")
    nodes = {name: Node(name=name, public_key=name, mesh_addresses=(GCP,)) for name in names}
    peers = {
        name: Peer(name=name, public_key=f"peer-{name}", allowed_ips=allowed)
        for name, allowed in {"gcp-1": (), "HOME-1": (ip_network("10.4.0.77"),), "router": (), "some phone": ()}.items()
    }
    topology = build_topology(Snapshot(revision=1, nodes=nodes, peers=peers))
    known = known_names(topology, plan_of("10.4.0.0/16"), "/kilo")
    assert known.addresses == {"Home-1": (GCP,), "gcp-1": (GCP,), "node.example.org": (GCP,)}
    assert known.left_out == (
        "node.example.org is written as node.example.org.kilo and node.example.org.mesh only",
        "'under score!' is not a host name",
    )


def test_only_addresses_that_go_into_the_mesh_are_written() -> None:
    nodes = {"gcp-1": Node(name="gcp-1", public_key="a", mesh_addresses=(GCP, SIX))}
    peers = {
        name: Peer(name=name, public_key=name, allowed_ips=tuple(map(ip_network, allowed)))
        for name, allowed in {
            "bank": ("203.0.113.66/32",),
            "localhost.": ("10.9.0.9/32",),
            "other": ("10.4.0.9/32",),
            "phone": ("10.9.0.2/32", "198.51.100.7/32"),
            "rival": ("203.0.113.66/32",),
        }.items()
    }
    topology = build_topology(Snapshot(revision=1, nodes=nodes, peers=peers, subnets=(ip_network("10.4.0.0/16"),)))
    known = known_names(topology, plan_of("10.4.0.0/16", "10.9.0.0/30"), "/kilo")
    assert known.addresses == {"gcp-1": (GCP,), "other": (ip_address("10.4.0.9"),), "phone": (ip_address("10.9.0.2"),)}
    assert known.left_out_in_short() == (
        "bank is not written as 203.0.113.66, which is not routed here; 'localhost.' is not a host name; "
        "phone is not written as 198.51.100.7, which is not routed here"
    )
    # A machine with an address in both families has the rest too; its own address is no route.
    six = plan_of("10.4.0.0/16", "fd00:4::/64", addresses=("10.4.9.9/32", "fd00:9::1/128"))
    assert known_names(topology, six, "/kilo").addresses["gcp-1"] == (GCP, SIX)
    many = {
        f"n{at}.example.org": Node(name=f"n{at}.example.org", public_key=f"{at}", mesh_addresses=(GCP,))
        for at in range(9)
    }
    crowd = known_names(build_topology(Snapshot(revision=1, nodes=many)), plan_of("10.4.0.0/16"), "/kilo")
    assert crowd.left_out_in_short(2).endswith("n1.example.org.mesh only; and 7 more")


# --- the file ---------------------------------------------------------------------------------------------------------


def write(path: Path, names: Mapping[str, tuple[IPAddress, ...]] | None = NAMES) -> bool:
    return write_names(names, "kilo-kilo", prefix="/kilo", path=path, lock_dir=path.parent / "run")


def test_the_file_is_replaced_with_its_mode_kept_and_only_where_it_differs(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(FILE)
    path.chmod(0o640)
    before = path.stat().st_ino
    assert write(path)
    assert path.read_bytes() == FILE + BLOCK
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert path.stat().st_ino != before
    assert not write(path)
    assert write(path, None)
    assert path.read_bytes() == FILE
    assert not write(path, None)
    assert sorted(one.name for one in tmp_path.iterdir()) == ["hosts", "run"]


def test_a_link_is_followed_and_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(FILE)
    path = tmp_path / "hosts"
    path.symlink_to("real")
    assert write(path)
    assert path.is_symlink()
    assert (tmp_path / "real").read_bytes() == FILE + BLOCK


def test_a_file_that_cannot_be_replaced_is_written_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def busy(*_: object) -> None:
        raise OSError(16, "Device or resource busy")

    path = tmp_path / "hosts"
    path.write_bytes(FILE)
    before = path.stat().st_ino
    monkeypatch.setattr(os, "rename", busy)
    assert write(path)
    assert (path.read_bytes(), path.stat().st_ino) == (FILE + BLOCK, before)
    assert write(path, None)
    assert path.read_bytes() == FILE
    assert sorted(one.name for one in tmp_path.iterdir()) == ["hosts", "run"]


OWN = b"".join(b"192.168.7.%d printer-%d # the operator's own\n" % (at, at) for at in range(60))
FEW = {f"node-{at}": (GCP,) for at in range(2)}
MANY = {f"node-{at}": (GCP,) for at in range(120)}


def no_room(*_: object) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def test_on_a_full_disk_the_file_stays_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(FILE)
    assert write(path, FEW)
    path.write_bytes(before := path.read_bytes() + OWN)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_room)
        for names in (MANY, None):
            with pytest.raises(HostsFileError, match=f"^{path} is left as it was: No space left on device$"):
                write(path, names)
    assert path.read_bytes() == before
    assert sorted(one.name for one in tmp_path.iterdir()) == ["hosts", "run"]


def test_on_a_full_disk_a_block_at_the_end_goes_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(FILE)
    assert write(path, FEW)
    real = os.open

    def full(name: str | Path, flags: int, *rest: int, **more: int) -> int:
        if flags & os.O_EXCL:
            no_room()
        return real(name, flags, *rest, **more)

    monkeypatch.setattr(os, "open", full)
    assert write(path, None)
    assert path.read_bytes() == FILE


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EXDEV, errno.EROFS, errno.EACCES, errno.EPERM])
def test_only_what_cannot_be_replaced_is_written_in_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def refused(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    path = tmp_path / "hosts"
    path.write_bytes(FILE)
    before = path.stat().st_ino
    monkeypatch.setattr(os, "rename", refused)
    assert write(path, MANY)
    assert path.stat().st_ino == before
    assert path.read_bytes() == with_block(FILE, "kilo-kilo", MANY, prefix="/kilo")
    monkeypatch.undo()
    number = errno.EIO
    monkeypatch.setattr(os, "rename", refused)
    with pytest.raises(HostsFileError, match="is left as it was: Input/output error"):
        write(path, FEW)
    assert path.read_bytes() == with_block(FILE, "kilo-kilo", MANY, prefix="/kilo")


@pytest.mark.parametrize("names", [MANY, FEW, {}, None])
@pytest.mark.parametrize("after", [b"", OWN])
def test_in_place_whatever_fails_at_whatever_step_the_file_is_as_it_was_or_as_it_shall_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, names: Mapping[str, tuple[IPAddress, ...]] | None, after: bytes
) -> None:
    path = tmp_path / "hosts"
    begun = with_block(FILE, "kilo-kilo", {f"node-{at}": (HOME,) for at in range(30)}, prefix="/kilo") + after
    wanted = with_block(begun, "kilo-kilo", names, prefix="/kilo")

    def busy(*_: object) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr(os, "rename", busy)
    real_pwrite, real_fsync = os.pwrite, os.fsync
    calls = 0

    def step(real: Callable[..., int | None], *arguments: Any) -> int | None:
        """One call of many; the one whose turn it is fails, a write after half of its bytes."""
        nonlocal calls
        calls += 1
        if calls == failing:
            if real is real_pwrite:
                handle, data, start = arguments
                real_pwrite(handle, data[: len(data) // 2], start)
            no_room()
        return real(*arguments)

    monkeypatch.setattr(os, "pwrite", lambda *arguments: step(real_pwrite, *arguments))
    monkeypatch.setattr(os, "fsync", lambda *arguments: step(real_fsync, *arguments))
    ended = set()
    for failing in range(2, 9):  # the first is that of the copy aside
        path.write_bytes(begun)
        calls = 0
        try:
            write(path, names)
            how, right = "written", wanted
        except HostsFileError:
            how, right = "left", begun
        ended.add(how)
        assert path.read_bytes() == right, failing
    assert ended == {"written", "left"}


def test_what_cannot_be_restored_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(with_block(FILE, "kilo-kilo", NAMES, prefix="/kilo") + OWN)
    monkeypatch.setattr(os, "rename", lambda *_: (_ for _ in ()).throw(OSError(errno.EBUSY, "busy")))
    monkeypatch.setattr(os, "pwrite", no_room)
    with pytest.raises(HostsFileError, match=r"hosts is damaged behind its first \d+ bytes, and could not be restored"):
        write(path, MANY)
    assert path.read_bytes().startswith(FILE)


def test_what_another_program_writes_meanwhile_is_not_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(FILE)
    real = with_block
    seen: list[bytes] = []

    def beside(text: bytes, *arguments: Any, **more: Any) -> bytes:
        if len(seen) < 2:
            path.write_bytes(text + b"192.0.2.%d late\n" % len(seen))
        seen.append(text)
        return real(text, *arguments, **more)

    monkeypatch.setattr(hostsfile, "with_block", beside)
    assert write(path)
    assert path.read_bytes() == FILE + b"192.0.2.0 late\n192.0.2.1 late\n" + BLOCK
    monkeypatch.setattr(hostsfile, "_read", lambda target: os.urandom(8))
    with pytest.raises(HostsFileError, match="another program writes it all the time"):
        write(path)


def test_owner_mode_and_attributes_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(FILE)
    path.chmod(0o664)
    if os.geteuid() == 0:
        os.chown(path, 12, 34)
    with suppress(OSError):  # not every file system has them
        os.setxattr(path, "user.label", b"kept")
    before, attributes = path.stat(), os.listxattr(path)
    assert write(path)
    after = path.stat()
    assert (after.st_uid, after.st_gid, after.st_mode) == (before.st_uid, before.st_gid, before.st_mode)
    assert os.listxattr(path) == attributes


async def test_many_meshes_at_once_lose_nothing(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.write_bytes(FILE)

    def one(mesh: str) -> None:
        for at in range(10):
            write_names({f"n{at}": (GCP,)}, f"kilo-{mesh}", prefix=f"/{mesh}", path=path, lock_dir=tmp_path / "run")

    async with trio.open_nursery() as nursery:
        for mesh in ("a1", "b1", "c1", "d1"):
            nursery.start_soon(trio.to_thread.run_sync, one, mesh)
    text = path.read_text()
    assert text.startswith(FILE.decode())
    assert all(f"10.4.0.1 n9.{mesh}" in text for mesh in ("a1", "b1", "c1", "d1"))
    assert text.count(": begin") == 4


def test_a_link_that_leads_nowhere_and_one_to_itself(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    path.symlink_to("etc/real")
    with pytest.raises(HostsFileError, match="is left as it was: No such file"):
        write(path)
    (tmp_path / "etc").mkdir()
    assert write(path)
    assert (tmp_path / "etc/real").read_bytes() == BLOCK
    path.unlink()
    path.symlink_to("hosts")
    with pytest.raises(HostsFileError, match="is left as it was: Too many levels"):
        write(path)


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
@pytest.mark.parametrize("mounted", [False, True])
def test_on_a_disk_that_is_really_full_the_operators_lines_stay(tmp_path: Path, mounted: bool) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16k", "full", disk], check=True)
    path = disk / "hosts"
    path.write_bytes(FILE)
    if mounted:  # as in a container: it cannot be replaced
        etc = tmp_path / "etc"
        etc.mkdir()
        (etc / "hosts").touch()
        subprocess.run(["mount", "--bind", path, etc / "hosts"], check=True)
        path = etc / "hosts"
    assert write(path, FEW)
    path.write_bytes(before := path.read_bytes() + OWN)
    with (disk / "fill").open("wb", buffering=0) as fill, suppress(OSError):
        while True:
            fill.write(b"x" * 4096)
    with pytest.raises(HostsFileError, match="is left as it was: No space left on device"):
        write(path, MANY)
    assert path.read_bytes() == before
    (disk / "fill").unlink()
    assert write(path, MANY)
    assert write(path, None)
    assert path.read_bytes() == FILE + OWN


def test_a_missing_file_is_made_for_names_only(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    assert not write(path, None)
    assert not path.exists()
    assert write(path)
    assert path.read_bytes() == BLOCK
    assert os.stat(path).st_mode & 0o777 == 0o644
