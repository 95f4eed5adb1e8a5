"""Two meshes joined and parted, both in one etcd in memory."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from ipaddress import ip_interface

import pytest
import trio
from click.testing import CliRunner, Result

from helpers import eventually, put_kept
from kilo_etcd.ctl.commands.join import visitors
from kilo_etcd.ctl.main import main
from kilo_etcd.etcd.api import Client, Compare, Op, TxnResult, Unavailable
from kilo_etcd.etcd.client import open_client
from kilo_etcd.model import CandidateClass, Endpoint
from kilo_etcd.store import operator
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import CandidateRecord, NodeRecord, decode_peer, encode
from kilo_etcd.testing.etcd_server import EtcdServer
from kilo_etcd.testing.fake_etcd import FakeClient, FakeEtcd
from kilo_etcd.topology.segments import build_topology

A, B = Keys("/a"), Keys("/b")


async def fill(client: Client, keys: Keys, number: int, hosts: dict[str, str]) -> None:
    """A mesh 10.<number>.0.0/16 of hosts with locations; the first of a location leads."""
    await client.put(keys.subnets, f"10.{number}.0.0/16")
    await client.put(keys.granularity, "location")
    for index, (name, location) in enumerate(hosts.items(), 1):
        record = NodeRecord(
            public_key=f"{chr(64 + number + index)}{'A' * 42}=",
            endpoint=Endpoint.parse(f"203.0.{number}.{index}:51820"),
            internal_ips=(ip_interface(f"192.168.{number}.{index}/24"),),
            location=location,
        )
        await client.put(keys.address(name, ip_interface(f"10.{number}.0.{index}").ip), "")
        await client.put(keys.node(name), encode(record))
        await put_kept(
            client, keys.election(location, name), encode(CandidateRecord(rank=CandidateClass.REST, since=""))
        )


@pytest.fixture
def etcd(fake: FakeEtcd) -> FakeEtcd:
    trio.run(fill, fake.client(), A, 1, {"a-1": "x", "a-2": "x", "a-3": ""})
    trio.run(fill, fake.client(), B, 11, {"b-1": "y"})
    fake.put("/a/annotations/a-2/subnets", "172.20.0.0/24")
    return fake


def kgctl(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["--prefix", "/a", "mesh", *arguments, "--other-prefix", "/b"], prog_name="kgctl")


def peers(etcd: FakeEtcd, keys: Keys) -> dict[str, list[str]]:
    return {
        key.removeprefix(keys.peers_root): [str(n) for n in decode_peer(etcd.get(key) or b"").allowed_ips]
        for key in etcd.keys(keys.peers_root)
    }


def test_every_segment_is_a_peer_of_the_other_mesh(etcd: FakeEtcd) -> None:
    done = kgctl("join", "--yes")
    assert done.exit_code == 0, done.output
    assert done.output.endswith("The meshes are joined.\n")
    assert "In /a:\n  peer b.location.y joins the mesh\n" in done.output
    assert peers(etcd, B) == {
        "a.location.": ["10.1.0.3/32"],
        "a.location.x": ["10.1.0.1/32", "10.1.0.2/32", "172.20.0.0/24"],
    }
    assert peers(etcd, A) == {"b.location.y": ["10.11.0.1/32"]}
    assert json.loads(etcd.get("/b/peers/a.location.x") or b"")["endpoint"] == "203.0.1.1:51820"
    # Nothing of it is in anybody's way: all is granted.
    for keys in (A, B):
        topology = build_topology(trio.run(operator.snapshot, etcd.client(), keys)[0])
        assert topology.problems == ()
        assert topology.snapshot.rejected == ()
    again = kgctl("join", "--yes")
    assert again.output == "Nothing to change: the meshes are joined already.\n"


def test_joining_again_follows_a_leader_and_parting_forgets_only_the_others(etcd: FakeEtcd) -> None:
    etcd.put("/b/peers/laptop", json.dumps({"publicKey": "Z" + "A" * 42 + "=", "allowedIPs": ["10.99.0.2/32"]}))
    assert kgctl("join", "--yes").exit_code == 0
    etcd.delete(A.election("x", "a-1"))
    etcd.delete("/a/by/a-3/node")
    done = kgctl("join", "--yes")
    assert "peer a.location. leaves the mesh" in done.output
    assert json.loads(etcd.get("/b/peers/a.location.x") or b"")["endpoint"] == "203.0.1.2:51820"
    assert "a.location." not in peers(etcd, B)
    done = kgctl("unjoin", "--yes")
    assert done.output.endswith("The meshes are parted.\n")
    assert (peers(etcd, A), list(peers(etcd, B))) == ({}, ["laptop"])
    assert kgctl("unjoin", "--yes").output == "Nothing to change: the meshes are not joined.\n"


def test_nothing_is_written_unless_it_is_wanted(etcd: FakeEtcd) -> None:
    before = etcd.revision
    assert "Nothing was written (--dry-run)." in kgctl("join", "--dry-run").output
    done = kgctl("join")
    assert (done.exit_code, done.stderr) == (
        1,
        "kgctl: Join the two meshes? Nothing was written: there is no terminal to ask at, so say --yes\n",
    )
    assert etcd.revision == before


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("/b/mesh/subnets", "10.1.0.0/16", "10.1.0.0/16 of a overlaps 10.1.0.0/16 of b"),
        ("/b/annotations/b-1/subnets", "172.20.0.128/25", "172.20.0.0/24 of a overlaps 172.20.0.128/25 of b"),
        ("/b/annotations/b-1/subnets", "192.168.1.0/24", "overlaps 192.168.1.0/24, which a-1 of a is on"),
        ("/b/peers/laptop", '{"publicKey": "Z%s=", "allowedIPs": ["10.1.0.2/32"]}' % ("A" * 42), "10.1.0.2/32"),
        ("/b/peers/rival", '{"publicKey": "B%s=", "allowedIPs": ["10.98.0.2/32"]}' % ("A" * 42), "public key"),
    ],
)
def test_what_overlaps_is_refused_with_the_pair_named(etcd: FakeEtcd, key: str, value: str, words: str) -> None:
    etcd.put(key, value)
    before = etcd.revision
    done = kgctl("join", "--yes")
    assert done.exit_code == 1
    assert words in done.stderr
    assert done.stderr.endswith("nothing was written\n")
    assert etcd.revision == before


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"publicKey": "Y" + "A" * 42 + "=", "allowedIPs": ["10.11.0.1/32"]}),
        # Rejected, and long: of such a value a view keeps the reason alone.
        json.dumps({"publicKey": "Y" + "A" * 42 + "=", "comment": "x" * 2000}),
    ],
)
def test_a_second_mesh_that_cannot_be_written_leaves_the_first_as_it_was(
    etcd: FakeEtcd, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    etcd.put("/a/peers/b.location.y", text)
    held = etcd.get("/a/peers/b.location.y")
    original = type(etcd.client()).txn

    async def txn(
        self: FakeClient, compare: Sequence[Compare], success: Sequence[Op] = (), failure: Sequence[Op] = ()
    ) -> TxnResult:
        if any("/b/" in str(getattr(op, "key", "")) for op in success):
            raise Unavailable("no endpoint of etcd answered")
        return await original(self, compare, success, failure)

    monkeypatch.setattr(type(etcd.client()), "txn", txn)
    done = kgctl("join", "--yes")
    assert (done.exit_code, done.stderr) == (1, "kgctl: /b: no endpoint of etcd answered\n")
    assert etcd.get("/a/peers/b.location.y") == held
    assert peers(etcd, B) == {}


def test_names_and_ends_that_cannot_be(etcd: FakeEtcd) -> None:
    run = CliRunner().invoke
    same = run(main, ["--prefix", "/a", "mesh", "join"])
    assert (same.exit_code, "one and the same mesh" in same.stderr) == (2, True)
    named = run(main, ["--prefix", "/a", "mesh", "join", "--other-endpoints", "10.0.0.9:2379"])
    assert (named.exit_code, "Both meshes would be called a" in named.stderr) == (2, True)
    wrong = run(main, ["--prefix", "/a", "mesh", "join", "--other-prefix", "/b", "--label", "x/y"])
    assert (wrong.exit_code, "'x/y' is no name for a mesh" in wrong.stderr) == (2, True)
    empty = run(main, ["--prefix", "/a", "mesh", "join", "--other-prefix", "/none", "--yes"])
    assert (empty.exit_code, empty.stderr) == (
        1,
        "kgctl: there is no node under /none: its first agent makes the mesh; nothing was written\n",
    )


def test_names_of_segments_are_names_of_peers(etcd: FakeEtcd) -> None:
    etcd.put("/a/mesh/granularity", "full")
    topology = build_topology(trio.run(operator.snapshot, etcd.client(), A)[0])
    assert list(visitors(topology, "a")) == ["a.node.a-1", "a.node.a-2", "a.node.a-3"]


@pytest.mark.etcd
async def test_following_brings_the_peers_up_to_date() -> None:
    async with EtcdServer.run() as server, open_client(server.config()) as client:
        await fill(client, A, 1, {"a-1": "x", "a-2": "x", "a-3": ""})
        await fill(client, B, 11, {"b-1": "y"})

        async def known(text: bytes) -> bool:
            kv = await client.get("/b/peers/a.location.x")
            return kv is not None and text in kv.value

        command = [sys.executable, "-m", "kilo_etcd.ctl.main", "--prefix", "/a", "mesh", "join", "--other-prefix", "/b"]
        process = await trio.lowlevel.open_process(
            [*command, "--follow"],
            env={**os.environ, "ETCDCTL_ENDPOINTS": ",".join(server.config().endpoints)},
            stdout=subprocess.DEVNULL,
        )
        try:
            await eventually(partial(known, b"203.0.1.1"))
            await client.delete(A.election("x", "a-1"))
            await eventually(partial(known, b"203.0.1.2"))
            process.send_signal(signal.SIGINT)
            with trio.fail_after(30):
                assert await process.wait() == 130
        finally:
            process.kill()
            await process.wait()
