"""`kgctl explain`: the way of a packet, as an operator reads it."""

from __future__ import annotations

import json
from ipaddress import ip_interface

import pytest
import trio
from click.testing import CliRunner, Result

from kilo_etcd.ctl.main import main
from kilo_etcd.etcd import Client
from kilo_etcd.model import CandidateClass, Endpoint
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import CandidateRecord, NodeRecord, Role, StatusRecord, Unreachable, encode
from kilo_etcd.testing.fake_etcd import FakeEtcd

HOSTS = {
    # name: (number, location, internal IP, public)
    "gcp-1": (1, "gcp", "10.1.0.1/24", True),
    "gcp-2": (2, "gcp", "10.1.0.2/24", False),
    "gcp-3": (3, "gcp", "10.1.9.3/24", False),
    "home-1": (4, "home", "10.2.0.4/24", True),
    "home-2": (5, "home", "10.2.0.5/24", False),
}


async def world(client: Client) -> None:
    """Two locations led by their first hosts; gcp-3 is on another subnet; a laptop; containers behind home-2."""
    keys = Keys()
    await client.put("/kilo/mesh/subnets", "10.4.0.0/16, fd04::/64")
    await client.put("/kilo/mesh/granularity", "location")
    for name, (number, location, internal, public) in HOSTS.items():
        record = NodeRecord(
            public_key=f"{chr(64 + number)}{'A' * 42}=",
            endpoint=Endpoint.parse(f"203.0.113.{number}:51820" if public else f"{internal.partition('/')[0]}:51820"),
            internal_ips=(ip_interface(internal),),
            location=location,
        )
        await client.put(f"/kilo/addresses/10.4.0.{number}", name)
        if number != 2:
            await client.put(f"/kilo/addresses/fd04::{number}", name)
        await client.put(keys.node(name), encode(record))
        await client.put(keys.election(location, name), encode(CandidateRecord(rank=CandidateClass.REST, since="")))
    peer = {"publicKey": "Z" + "A" * 42 + "=", "allowedIPs": ["10.9.0.2/32"]}
    await client.put("/kilo/peers/laptop", json.dumps(peer))
    await client.put("/kilo/annotations/home-2/subnets", "172.20.0.0/24")


@pytest.fixture
def etcd(fake: FakeEtcd) -> FakeEtcd:
    trio.run(world, fake.client())
    return fake


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["explain", *arguments], prog_name="kgctl")


def hops(way: dict[str, object]) -> list[tuple[str, str, str, str]]:
    steps: list[dict[str, str]] = way["hops"]  # type: ignore[assignment]
    return [(step["from"], step["to"], step["how"], step["address"]) for step in steps]


def test_from_member_to_member_of_another_location(etcd: FakeEtcd) -> None:
    found = run("gcp-2", "home-2", "-o", "json")
    assert found.exit_code == 0, found.output
    (journey,) = json.loads(found.stdout)["journeys"]
    assert hops(journey["there"]) == [
        ("gcp-2", "gcp-1", "clear", "10.1.0.1"),
        ("gcp-1", "home-1", "WireGuard", "203.0.113.4:51820"),
        ("home-1", "home-2", "clear", "10.2.0.5"),
    ]
    assert [(h["from"], h["encrypted"]) for h in journey["back"]["hops"]] == [
        ("home-2", False),
        ("home-1", True),
        ("gcp-1", False),
    ]
    text = run("gcp-2", "home-2").output
    assert text.startswith("gcp-2 (10.4.0.2) to 10.4.0.5: arrives; the answer takes the same way\n"), text
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "2 gcp-1 [gcp] home-1 [home] yes WireGuard 203.0.113.4:51820" in lines


def test_each_family_is_a_journey_of_its_own_and_what_cannot_be_is_said(etcd: FakeEtcd) -> None:
    found = run("gcp-1", "home-2", "-o", "json")
    # The LANs are IPv4 only, so IPv6 gets as far as home-1 and no further.
    assert found.exit_code == 1
    four, six = json.loads(found.stdout)["journeys"]
    assert (four["works"], six["works"]) == (True, False)
    assert "home-1" in six["there"]["dropped"]
    assert "dropped on the way there" in run("gcp-1", "home-2").output


def test_another_subnet_is_reached_in_ipip(etcd: FakeEtcd) -> None:
    (journey,) = json.loads(run("gcp-2", "gcp-3", "-o", "json").stdout)["journeys"]
    assert hops(journey["there"]) == [("gcp-2", "gcp-3", "clear, in IPIP", "10.1.9.3")]


def test_a_peer_and_a_network_behind_a_node(etcd: FakeEtcd) -> None:
    found = run("gcp-2", "laptop")
    assert found.exit_code == 0, found.output
    assert "arrives; peer laptop answers by its own configuration" in found.output
    (journey,) = json.loads(run("gcp-2", "172.20.0.9", "-o", "json").stdout)["journeys"]
    assert [step["to"] for step in journey["there"]["hops"]] == ["gcp-1", "home-1", "home-2"]
    assert [step["to"] for step in journey["back"]["hops"]] == ["home-1", "gcp-1", "gcp-2"]


def test_what_the_agents_on_the_way_say_is_added(etcd: FakeEtcd) -> None:
    status = StatusRecord(
        public_key="A" * 43 + "=", revision=10**6, role=Role.LEADER, leader="gcp-1", errors=("the port is taken",)
    )
    etcd.put(Keys().status("gcp-1"), encode(status))
    remarks = json.loads(run("gcp-2", "home-1", "-o", "json").stdout)["remarks"]
    assert {"node": "gcp-1", "text": "the port is taken"} in remarks
    assert {"node": "home-1", "text": "its agent does not report: is the host up?"} in remarks
    assert "home-2" not in {remark["node"] for remark in remarks}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nobody", "gcp-1"], "there is no node nobody; kgctl status lists them"),
        (["gcp-1", "nobody"], "nobody is no node, no peer and no address; kgctl status lists them"),
        (["laptop", "gcp-1"], "laptop is a peer; explain starts at a node"),
        (["gcp-1", "8.8.8.8"], "8.8.8.8 is no part of the mesh: gcp-1 sends it by its own routing table"),
        (["gcp-2", "fd04::1"], "node gcp-2 has IPv4 only, in which fd04::1 has no address"),
    ],
)
def test_what_cannot_be_explained_is_one_sentence(etcd: FakeEtcd, arguments: list[str], says: str) -> None:
    found = run(*arguments)
    assert found.exit_code == 1
    assert found.stdout == ""
    assert says in found.stderr
    assert len(found.stderr.splitlines()) == 1


def test_why_an_address_in_a_network_that_was_left_out_is_not_reached(etcd: FakeEtcd) -> None:
    etcd.put("/kilo/annotations/gcp-1/subnets", "10.4.0.0/15")
    etcd.put("/kilo/annotations/gcp-2/subnets", "0.0.0.0/0")
    found = run("home-1", "10.5.0.9")
    assert found.exit_code == 1
    assert found.stderr == (
        "kgctl: 10.5.0.9 is no part of the mesh: home-1 sends it by its own routing table "
        "(10.4.0.0/15 of node gcp-1 is left out: it covers the mesh's own subnet; offer smaller networks)\n"
    )
    assert run("home-1", "8.8.8.8").stderr.endswith("home-1 sends it by its own routing table\n")
    shown = CliRunner().invoke(main, ["node", "show", "gcp-1"], prog_name="kgctl").output
    assert "10.4.0.0/15 of node gcp-1 is left out" in shown
    assert "0.0.0.0/0 of node gcp-2" not in shown


def test_an_address_that_nobody_has_is_dropped_where_it_would_be(etcd: FakeEtcd) -> None:
    found = run("gcp-2", "10.4.200.200")
    assert found.exit_code == 1
    assert "dropped on the way there: gcp-1 has no WireGuard peer whose allowed IPs hold 10.4.200.200" in found.output


def test_a_node_that_was_set_aside_is_named_with_its_reason(etcd: FakeEtcd) -> None:
    etcd.put("/kilo/nodes/broken", "{")
    found = run("gcp-1", "broken")
    assert found.exit_code == 1
    assert "broken is not in force: the value is not JSON" in found.stderr


def test_a_member_that_does_not_answer_is_where_a_packets_way_ends(etcd: FakeEtcd) -> None:
    def reports(name: str, *unreachable: tuple[object, ...]) -> None:
        number = HOSTS[name][0]
        status = StatusRecord(
            public_key=f"{chr(64 + number)}{'A' * 42}=",
            revision=10**6,
            unreachable=tuple(Unreachable(*one) for one in unreachable),  # type: ignore[arg-type]
        )
        etcd.put(Keys().status(name), encode(status))

    reports("gcp-1", ("gcp-2", "10.1.0.2"))
    found = run("home-2", "gcp-2", "-o", "json")
    assert found.exit_code == 1
    (journey,) = json.loads(found.stdout)["journeys"]
    assert journey["there"]["dropped"] == "gcp-2 does not answer gcp-1 at its internal IP 10.1.0.2"
    assert [step["to"] for step in journey["there"]["hops"]] == ["home-1", "gcp-1"]
    reports("gcp-2", ("gcp-1", "10.1.0.1"))
    assert "dropped on the way there: gcp-1 does not answer gcp-2 at its internal IP 10.1.0.1" in run(
        "gcp-2", "gcp-1"
    ).output.replace("\n", " ")
    # It has another address by now, so what is said of the former one is out of date.
    reports("gcp-1", ("gcp-2", "10.1.0.99"))
    reports("gcp-2")
    assert run("home-2", "gcp-2").exit_code == 0
    # It answered before, so its route is there still.
    reports("gcp-1", ("gcp-2", "10.1.0.2", True))
    (journey,) = json.loads(run("home-2", "gcp-2", "-o", "json").stdout)["journeys"]
    assert journey["there"]["dropped"] is None
    assert [step["to"] for step in journey["there"]["hops"]] == ["home-1", "gcp-1", "gcp-2"]
    # A record that cannot be meant is no reason to say nothing.
    reports("gcp-1", ("gcp-2", "nowhere"))
    assert run("home-2", "gcp-2").exit_code == 0
