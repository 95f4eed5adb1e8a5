"""The block of names in a hosts file, and the file it goes into."""

from __future__ import annotations

import os
import stat
from ipaddress import ip_address
from pathlib import Path

import pytest

from kilo_etcd.ctl.connect import hostsfile
from kilo_etcd.ctl.connect.command import interface_for
from kilo_etcd.ctl.connect.hostsfile import write_names
from kilo_etcd.ctl.connect.names import domain, known_names, with_block
from kilo_etcd.model import Node, Peer, Snapshot
from kilo_etcd.topology import build_topology

GCP, HOME = ip_address("10.4.0.1"), ip_address("10.4.0.2")
SIX = ip_address("fd00:4::2")
NAMES = {"gcp-1": (GCP,), "home-1": (HOME, SIX)}
FILE = b"127.0.0.1\tlocalhost\n# a comment\n192.0.2.7 printer\n"
BLOCK = (
    b"# kilo-etcd kilo-kilo: begin (kgctl connect writes it for /kilo, and removes it at its end)\n"
    b"10.4.0.1 gcp-1.kilo gcp-1\n10.4.0.2 home-1.kilo home-1\nfd00:4::2 home-1.kilo home-1\n"
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


@pytest.mark.parametrize("after", [b"", b"\n192.0.2.9 nas\n", b"# mine\n192.0.2.9 nas\n"])
def test_a_block_that_was_cut_costs_nobody_elses_line(after: bytes) -> None:
    cut = FILE + BLOCK[: BLOCK.rindex(b"#")] + after
    assert with_block(cut, "kilo-kilo", None, prefix="/kilo") == FILE + after


def test_what_the_file_says_already_is_not_said_again_in_short() -> None:
    made = with_block(b"127.0.1.1 GCP-1 gcp-1.example.org\n", "kilo-kilo", NAMES, prefix="/kilo", own="home-1")
    assert b"10.4.0.1 gcp-1.kilo\n" in made
    assert b"10.4.0.2 home-1.kilo\n" in made


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


def test_a_node_has_its_name_before_a_peer_and_names_that_are_none_are_left_out() -> None:
    nodes = {name: Node(name=name, public_key=name, mesh_addresses=(GCP,)) for name in ("gcp-1", "under score!")}
    peers = {
        name: Peer(name=name, public_key=f"peer-{name}", allowed_ips=allowed)
        for name, allowed in {"gcp-1": (), "router": (), "some phone": ()}.items()
    }
    found = known_names(build_topology(Snapshot(revision=1, nodes=nodes, peers=peers)))
    assert found == {"gcp-1": (GCP,)}


# --- the file ---------------------------------------------------------------------------------------------------------


def write(path: Path, names: dict[str, tuple[object, ...]] | None = NAMES) -> bool:  # type: ignore[assignment]
    return write_names(names, "kilo-kilo", prefix="/kilo", path=path, lock_dir=path.parent / "run")  # type: ignore[arg-type]


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
    monkeypatch.setattr(hostsfile.os, "rename", busy)
    assert write(path)
    assert (path.read_bytes(), path.stat().st_ino) == (FILE + BLOCK, before)
    assert write(path, None)
    assert path.read_bytes() == FILE
    assert sorted(one.name for one in tmp_path.iterdir()) == ["hosts", "run"]


def test_a_missing_file_is_made_for_names_only(tmp_path: Path) -> None:
    path = tmp_path / "hosts"
    assert not write(path, None)
    assert not path.exists()
    assert write(path)
    assert path.read_bytes() == BLOCK
    assert os.stat(path).st_mode & 0o777 == 0o644
