"""The commands that change the mesh: what they say beforehand, what they write, and what they refuse."""

from __future__ import annotations

import base64
import json
from collections import Counter
from collections.abc import Sequence
from ipaddress import ip_address, ip_interface
from typing import Any

import pytest
import trio
from attrs import evolve
from click.testing import CliRunner, Result

from helpers import put_kept
from kilo_etcd.ctl import change
from kilo_etcd.ctl.main import main
from kilo_etcd.etcd.api import BadRequest, Client, Delete, PermissionDenied, Unavailable
from kilo_etcd.model import CandidateClass, Endpoint, Snapshot
from kilo_etcd.store import operator, silence
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import CandidateRecord, NodeRecord, Role, StatusRecord, adopts, encode
from kilo_etcd.store.silence import Claiming
from kilo_etcd.testing.fake_etcd import FakeClient, FakeEtcd

KEYS = Keys()
HOSTS = {"gcp-1": (1, "gcp"), "gcp-2": (2, "gcp"), "home-1": (3, "home")}


def key_of(number: int) -> str:
    return f"{chr(64 + number)}{'A' * 42}="


async def world(client: Client) -> None:
    """gcp-1 leads gcp-1 and gcp-2; home-1 is alone; gcp-1's agent lives and is up to date."""
    await client.put("/kilo/mesh/subnets", "10.4.0.0/16")
    await client.put("/kilo/mesh/granularity", "location")
    revision = 0
    for name, (number, location) in HOSTS.items():
        record = NodeRecord(
            public_key=key_of(number),
            endpoint=Endpoint.parse(f"203.0.113.{number}:51820"),
            internal_ips=(ip_interface(f"10.{1 if location == 'gcp' else 2}.0.{number}/24"),),
            location=location,
        )
        await client.put(f"/kilo/by/{name}/addresses/10.4.0.{number}", "")
        await client.put(KEYS.node(name), encode(record))
        offer = encode(CandidateRecord(rank=CandidateClass.PUBLIC))
        revision = await put_kept(client, KEYS.election(location, name), offer)
    await alive(client, "gcp-1", revision)


async def alive(client: Client, name: str, revision: int) -> None:
    number, location = HOSTS[name]
    status = StatusRecord(
        public_key=key_of(number), revision=revision, role=Role.LEADER, location=location, leader="gcp-1"
    )  # fmt: skip
    await put_kept(client, KEYS.status(name), encode(status))


@pytest.fixture
def etcd(fake: FakeEtcd) -> FakeEtcd:
    trio.run(world, fake.client())
    return fake


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="kgctl")


def held(etcd: FakeEtcd) -> dict[str, bytes | None]:
    return {key: etcd.get(key) for key in etcd.keys("/kilo")}


# --- what will be different -------------------------------------------------------------------------------------------


def test_a_dry_run_says_what_would_be_different_and_writes_nothing(etcd: FakeEtcd) -> None:
    before = held(etcd)
    result = run("location", "set", "home-1", "gcp", "--dry-run")
    assert result.output.splitlines() == [
        "home-1 moves from home to gcp",
        "tunnels between nodes: 0 instead of 1",
        "Nothing was written (--dry-run).",
    ]
    assert held(etcd) == before


def test_a_change_of_leader_is_foreseen(etcd: FakeEtcd) -> None:
    result = run("annotate", "gcp-2", "leader=true")
    assert result.output.splitlines() == [
        "gcp-2 is now preferred as its location's leader",
        "gcp-2: annotated",
    ]
    # Its candidacy is still of the old class: it leads when its agent has entered anew.
    assert etcd.get("/kilo/annotations/gcp-2/leader") == b"true"


def test_trouble_that_a_change_would_end_is_said_before(etcd: FakeEtcd) -> None:
    etcd.put("/kilo/annotations/gcp-1/subnets", "172.20.0.0/24")
    etcd.put("/kilo/annotations/home-1/subnets", "172.20.0.0/16")
    result = run("annotate", "home-1", "subnets-", "--dry-run")
    (trouble,) = [line for line in result.output.splitlines() if line.startswith("trouble that ends: ")]
    assert "172.20.0.0/16" in trouble
    assert "gcp-1" in trouble


def test_networks_that_would_be_left_out_are_refused(etcd: FakeEtcd) -> None:
    assert run("annotate", "gcp-1", "subnets=172.20.0.0/24").exit_code == 0
    before = held(etcd)
    for name in ("subnets", "allowed-location-ips"):
        result = run("annotate", "home-1", f"{name}=172.20.0.0/16")
        assert result.exit_code == 1
        assert result.output.count("\n") == 1
        assert "172.20.0.0/16" in result.output
        assert "gcp-1" in result.output
        assert result.output.endswith("nothing was written\n")
    assert held(etcd) == before
    assert run("location", "set", "home-1", "home").output == "home-1: home\n"
    assert run("location", "set", "home-1", "home").output == "home-1: home already\n"


# --- annotate ---------------------------------------------------------------------------------------------------------


def test_annotations_are_put_and_taken_back_together(etcd: FakeEtcd) -> None:
    assert run("annotate", "home-1", "persistent-keepalive=25", "leader=true").exit_code == 0
    result = run("annotate", "home-1", "persistent-keepalive-", "leader-", "force-endpoint=vpn.example.org:51821", "-y")
    assert result.output.splitlines() == [
        "home-1 is reached at vpn.example.org:51821 instead of 203.0.113.3:51820",
        "home-1 sends keepalives every 0 s instead of 25 s (0: none)",
        "home-1 is no longer preferred as its location's leader",
        "home-1: annotated",
    ]
    assert etcd.keys("/kilo/annotations") == ["/kilo/annotations/home-1/force-endpoint"]
    assert run("annotate", "home-1", "force-endpoint=vpn.example.org:51821").output == (
        "Nothing to change: its annotations say so already.\n"
    )


def test_a_private_endpoint_in_place_of_a_public_one_is_said_to_cut_off_others(etcd: FakeEtcd) -> None:
    said = "home-1 has no public endpoint in IPv4 any more: nodes elsewhere no longer reach it there"
    assert said in run("annotate", "home-1", "force-endpoint=192.168.5.7:51820", "--dry-run").output.splitlines()
    for other in ("198.51.100.1:51820", "vpn.example.org:51820"):
        assert "no public endpoint" not in run("annotate", "home-1", f"force-endpoint={other}", "--dry-run").output


def test_an_internal_ip_that_the_host_may_not_have_is_said_to_be_unknown(etcd: FakeEtcd) -> None:
    said = "Only home-1's agent knows whether the host has 10.1.0.99: if it has not, kgctl status shows an error"
    assert said in run("annotate", "home-1", "force-internal-ip=10.1.0.99", "--dry-run").output.splitlines()
    assert said in run("annotate", "home-1", "force-internal-ip=10.1.0.99", "--yes").output.splitlines()
    assert "Only home-1's agent" not in run("annotate", "home-1", "force-internal-ip=-", "--yes").output


def test_a_node_may_be_annotated_before_it_registers(etcd: FakeEtcd) -> None:
    result = run("annotate", "new-1", "leader=true")
    assert result.output == "new-1: annotated; new-1 is not registered yet\n"


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["home-1"], 2, "Missing argument"),
        (["home-1", "leader"], 2, "neither name=value nor"),
        (["home-1", "leder=true"], 2, "no annotation is called 'leder'; did you mean leader?\n"),
        (["home-1", "colour=red"], 2, "advertise-exit-node, allowed-location-ips, exit-node, force-endpoint"),
        (["home-1", "colour=red"], 2, "there are advertise-exit-node"),
        (["home-1", "leader=true", "leader-"], 2, "leader is given twice"),
        (["a/b", "leader=true"], 2, "is no node name"),
        (["home-1", "persistent-keepalive=soon"], 1, "persistent-keepalive: 'soon' is no number of seconds"),
        (["home-1", "leader=true", "subnets=10.0.0.0/99"], 1, "subnets: "),
        (["home-1", "advertise-exit-node=perhaps"], 1, "advertise-exit-node: 'perhaps' is neither true nor false"),
        (["home-1", "force-endpoint=fe80::1%eth0"], 1, "force-endpoint: "),
        (["home-1", "force-internal-ip=10.0.0.1,10.0.0.2"], 1, "more than one address of a family"),
    ],
)
def test_what_annotate_refuses(etcd: FakeEtcd, arguments: list[str], status: int, sentence: str) -> None:
    before = held(etcd)
    result = run("annotate", *arguments)
    assert result.exit_code == status, result.output
    assert sentence in result.output
    assert held(etcd) == before


def test_what_somebody_else_changes_meanwhile_is_not_overwritten(
    etcd: FakeEtcd, monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    from kilo_etcd.ctl import impact

    seen = impact.impact

    def interrupted(*snapshots: Snapshot) -> tuple[str, ...]:
        etcd.put("/kilo/annotations/home-1/persistent-keepalive", "10")
        return seen(*snapshots)

    monkeypatch.setattr(impact, "impact", interrupted)
    result = run("annotate", "home-1", "persistent-keepalive=25", "leader=true")
    assert result.exit_code == 1
    assert "another writer has just changed the same; nothing was written" in result.output
    assert etcd.get("/kilo/annotations/home-1/persistent-keepalive") == b"10"
    assert etcd.get("/kilo/annotations/home-1/leader") is None


# --- mesh -------------------------------------------------------------------------------------------------------------


def test_the_granularity_is_switched_when_that_is_confirmed(etcd: FakeEtcd) -> None:
    asked = run("mesh", "set", "granularity", "full")
    assert asked.exit_code == 1
    assert "say --yes" in asked.output
    assert etcd.get("/kilo/mesh/granularity") == b"location"
    result = run("mesh", "set", "granularity", "full", "--yes")
    assert result.output.splitlines() == [
        "granularity: location becomes full",
        "tunnels between nodes: 3 instead of 1",
    ]
    assert etcd.get("/kilo/mesh/granularity") == b"full"
    assert run("mesh", "set", "granularity", "full").output == "Nothing to change: granularity is full already.\n"


def test_the_internal_ips_are_switched_when_that_is_confirmed(etcd: FakeEtcd) -> None:
    assert "The routing to internal IPs of 3 nodes changes" in run("mesh", "set", "internal-ips", "routed").output
    tried = run("mesh", "set", "internal-ips", "routed", "--dry-run")
    assert "internal-ips: off becomes routed" in tried.output
    assert "note: internal-ips: routed waits until every agent knows the setting, and off is in force" in tried.output
    assert "trouble" not in tried.output
    assert etcd.get("/kilo/mesh/internal-ips") is None
    assert run("mesh", "set", "internal-ips", "routed", "--yes").exit_code == 0
    assert etcd.get("/kilo/mesh/internal-ips") == b"routed"
    told = json.loads(run("mesh", "show", "-o", "json").output)
    assert (told["internalIps"], told["internalIpsInForce"]) == ("routed", "off")
    assert "internal-ips:       off (routed waits for 3 agents)\n" in run("mesh", "show").output
    assert run("mesh", "set", "internal-ips", "encrypted", "--yes").exit_code == 0
    assert etcd.get("/kilo/mesh/internal-ips") == b"encrypted"
    assert (
        run("mesh", "set", "internal-ips", "encrypted").output
        == "Nothing to change: internal-ips is encrypted already.\n"
    )


def test_the_mesh_as_a_whole_is_shown(etcd: FakeEtcd) -> None:
    shown = json.loads(run("mesh", "show", "-o", "json").output)
    assert (shown["granularity"], shown["subnets"], shown["nodes"], shown["locations"]) == (
        "location", ["10.4.0.0/16"], 3, 2,
    )  # fmt: skip
    assert "granularity:        location\n" in run("mesh", "show").output


def test_statuses_are_read_for_the_mesh_only_while_a_switch_is_under_way(
    etcd: FakeEtcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who may not read them sees the rest."""

    async def denied(*_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise PermissionDenied("permission denied")

    monkeypatch.setattr(operator, "statuses", denied)
    assert run("mesh", "show").exit_code == 0
    etcd.put(KEYS.internal_ips, "off")
    key = KEYS.node("gcp-1")
    value = json.loads(etcd.get(key) or b"")
    etcd.put(key, json.dumps({**value, "encryption": "sends"}))
    assert run("mesh", "show").exit_code == 1


def test_neither_case_nor_blanks_count_in_a_setting(etcd: FakeEtcd) -> None:
    for what, key, text, value in (
        ("internal-ips", KEYS.internal_ips, " Off", b"off"),
        ("internal-ips", KEYS.internal_ips, "ROUTED ", b"routed"),
        ("granularity", KEYS.granularity, " Full ", b"full"),
    ):
        assert run("mesh", "set", what, text, "--yes").exit_code == 0
        assert etcd.get(key) == value
    assert run("mesh", "set", "granularity", "FULL").output == "Nothing to change: granularity is full already.\n"
    etcd.put(KEYS.internal_ips, " Encrypted\n")
    etcd.put(KEYS.granularity, "Location")
    shown = json.loads(run("mesh", "show", "-o", "json").stdout)
    assert (shown["internalIps"], shown["granularity"], shown["rejected"]) == ("encrypted", "location", 0)
    refused = run("lab", "run", "--granularity", "ring")
    assert (refused.exit_code, "'ring' is unknown; choose one of location, full, cross." in refused.output) == (2, True)


def test_mesh_set_offers_what_it_changes_and_no_more() -> None:
    shown = run("mesh", "set", "--help").output
    assert "{granularity|internal-ips} VALUE" in shown
    assert "subnets" not in shown


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["granularity", "ring"], 2, "'ring' is not a value of granularity: write location, full or cross"),
        (["internal-ips", "yes"], 2, "'yes' is not a value of internal-ips: write routed, encrypted or off"),
        (["subnets", "10.5.0.0/16"], 1, "the mesh's subnets are fixed"),
        (["colour", "red"], 2, "'colour' is not one of 'granularity', 'internal-ips'."),
    ],
)
def test_what_mesh_set_refuses(etcd: FakeEtcd, arguments: list[str], status: int, sentence: str) -> None:
    before = held(etcd)
    result = run("mesh", "set", *arguments, "--yes")
    assert result.exit_code == status
    assert sentence in result.output
    assert held(etcd) == before


# --- node -------------------------------------------------------------------------------------------------------------


def test_nodes_are_listed(etcd: FakeEtcd) -> None:
    rows = json.loads(run("node", "list", "-o", "json").output)
    assert [(row["node"], row["location"], row["role"], row["alive"]) for row in rows] == [
        ("gcp-1", "gcp", "leader", True),
        ("gcp-2", "gcp", "member", False),
        ("home-1", "home", "alone", False),
    ]


def test_a_node_is_shown_with_what_its_kernel_should_hold(etcd: FakeEtcd) -> None:
    document = json.loads(run("node", "show", "gcp-2", "-o", "json").output)
    assert (document["role"], document["alive"], document["facts"]["mesh_address"]) == ("member", False, "10.4.0.2")
    assert [peer["name"] for peer in document["peers"]] == ["home-1"]  # known already, for the case that it leads
    assert {(route["to"], route["via"], route["gateway"]) for route in document["routes"]} == {
        ("10.4.0.0/16", "underlay", "10.1.0.1"),
        ("10.4.0.1/32", "underlay", "10.1.0.1"),
    }
    assert "its agent does not report: is the host up?" in document["remarks"]
    leader = run("node", "show", "gcp-1")
    assert leader.output.startswith("gcp-1: leader in gcp; its agent lives and has applied revision ")
    assert "home-1" in leader.output
    assert "203.0.113.3:51820" in leader.output


def test_a_node_that_is_gone_is_forgotten_whole(etcd: FakeEtcd) -> None:
    assert run("location", "set", "gcp-2", "gcp").exit_code == 0
    etcd.put("/kilo/annotations/gcp-2/leader", "true")
    etcd.put("/kilo/annotations/gcp-22/leader", "true")
    result = run("node", "forget", "gcp-2")
    assert "gcp-2 leaves the mesh; label gcp, annotation leader go too (--keep-labels keeps them). " in result.output
    result = run("node", "forget", "gcp-2", "--yes")
    assert result.output.splitlines() == [
        "gcp-2 leaves the mesh: the others forget its key and its addresses",
        "gcp-2 is forgotten.",
    ]
    assert [key for key in etcd.keys("/kilo/") if "gcp-2" in key] == ["/kilo/annotations/gcp-22/leader"]


def test_a_node_is_forgotten_and_its_label_kept_or_its_label_alone_is_left_to_forget(etcd: FakeEtcd) -> None:
    assert run("location", "set", "gcp-2", "gcp").exit_code == 0
    assert run("node", "forget", "gcp-2", "--keep-labels", "--yes").exit_code == 0
    assert [key for key in etcd.keys("/kilo/") if "gcp-2" in key] == ["/kilo/locations/gcp-2"]
    assert run("node", "forget", "gcp-2", "--keep-labels", "--yes").exit_code == 1
    assert "gcp-2 has no record; label gcp goes too" in run("node", "forget", "gcp-2").output
    assert run("node", "forget", "gcp-2", "--yes").exit_code == 0
    assert [key for key in etcd.keys("/kilo/") if "gcp-2" in key] == []


async def _claims(*_: object) -> tuple[Claiming, ...]:
    await trio.lowlevel.checkpoint()
    return tuple(
        Claiming(
            name=name, addresses=(ip_address(f"10.4.0.{number}"),), registered=there, reserved=there, alive=alive,
            silent=silent,
        )
        for number, (name, there, alive, silent) in enumerate(
            [
                ("gcp-1", True, True, 0), ("gcp-2", True, False, 7200), ("home-1", True, False, 60),
                ("runner-9", False, False, 86400),
            ]
        )
    )  # fmt: skip


def test_claims_are_listed_and_the_dead_forgotten_without_their_names(
    etcd: FakeEtcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    etcd.put("/kilo/by/runner-9/addresses/10.4.0.9", "")
    etcd.put("/kilo/locations/runner-9", "gcp")
    etcd.put("/kilo/locations/gcp-2", "gcp")
    monkeypatch.setattr(silence, "claiming", _claims)
    rows = json.loads(run("node", "list", "--claims", "-o", "json").output)
    assert rows[3] == {
        "node": "runner-9", "addresses": ["10.4.0.3"], "registered": False, "reserved": False, "alive": False,
        "silentSeconds": 86400,
    }  # fmt: skip
    assert "silent for 2 h at least" in run("node", "list", "--claims").output
    assert "another node may take its address" in run("node", "list", "--claims").output
    before = held(etcd)
    assert "no agent is known to have been silent for so long" in run("node", "forget", "--dead-for", "7d").output
    assert "Nothing was written (--dry-run)." in run("node", "forget", "--dead-for", "1h", "--dry-run").output
    refused = run("node", "forget", "--dead-for", "1h")
    assert "2 nodes leave the mesh. Continue? Nothing was written" in refused.output
    assert held(etcd) == before
    done = run("node", "forget", "--dead-for", "1h", "--yes")
    assert done.output.splitlines() == [
        "gcp-2: silent for 2 h at least; 10.4.0.1",
        "runner-9: joining, or silent for 24 h at least; 10.4.0.3",
        "gcp-2 leaves the mesh: the others forget its key and its addresses",
        "gcp-2, runner-9: forgotten.",
    ]
    # Of a name without a record nobody knows that its host has been there, so what is set for it stays.
    assert [key for key in etcd.keys("/kilo/") if "gcp-2" in key or "runner" in key] == ["/kilo/locations/runner-9"]
    assert etcd.keys("/kilo/by/home-1/") != []


def test_a_node_without_a_record_whose_reservation_is_kept_is_not_called_silent(
    etcd: FakeEtcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def claiming(*_: object) -> tuple[Claiming, ...]:
        await trio.lowlevel.checkpoint()
        return (Claiming(name="new", registered=False, reserved=True, alive=False),)

    monkeypatch.setattr(silence, "claiming", claiming)
    assert "joining, or an agent keeps its addresses without a record" in run("node", "list", "--claims").output
    assert "Nothing to change" in run("node", "forget", "--dead-for", "1s", "--yes").output


def test_a_node_that_is_gone_meanwhile_does_not_keep_the_other_dead_ones(
    etcd: FakeEtcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(silence, "claiming", _claims)  # Of runner-9 nothing is left.
    assert run("node", "forget", "--dead-for", "1h", "--yes").exit_code == 0
    assert etcd.keys("/kilo/by/gcp-2/") == []


def test_a_node_that_comes_back_while_the_dead_are_forgotten_is_kept_and_the_others_go(
    etcd: FakeEtcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    etcd.put("/kilo/by/runner-9/addresses/10.4.0.9", "")
    monkeypatch.setattr(silence, "claiming", _claims)

    async def come_back(_client: Client, _keys: Keys, *, registered: frozenset[str]) -> None:
        await trio.lowlevel.checkpoint()
        etcd.put_kept(KEYS.status("gcp-2"), "{}")

    monkeypatch.setattr(change, "distrust_by_look", come_back)
    result = run("node", "forget", "--dead-for", "1h", "--yes")
    assert "runner-9: forgotten." in result.output.splitlines()
    assert result.exit_code == 1
    assert "kgctl: gcp-2: left as it was, since its agent has come back" in result.stderr
    assert etcd.keys("/kilo/by/gcp-2/") != []
    assert etcd.keys("/kilo/by/runner-9/") == []


def test_a_dead_node_whose_annotations_somebody_changes_meanwhile_is_kept_and_named(
    etcd: FakeEtcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    etcd.put("/kilo/locations/gcp-2", "gcp")
    monkeypatch.setattr(silence, "claiming", _claims)

    async def relabel(_client: Client, _keys: Keys, *, registered: frozenset[str]) -> None:
        await trio.lowlevel.checkpoint()
        etcd.put("/kilo/locations/gcp-2", "home")

    monkeypatch.setattr(change, "distrust_by_look", relabel)
    result = run("node", "forget", "--dead-for", "1h", "--yes")
    assert (result.exit_code, "kgctl: gcp-2: left as it was, since" in result.stderr) == (1, True)
    assert etcd.keys("/kilo/by/gcp-2/") != []


def test_a_dead_node_whose_record_is_put_anew_meanwhile_is_kept(
    etcd: FakeEtcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(silence, "claiming", _claims)

    async def come_and_go(_client: Client, _keys: Keys, *, registered: frozenset[str]) -> None:
        await trio.lowlevel.checkpoint()
        value = etcd.get(KEYS.node("gcp-2"))
        assert value is not None
        etcd.put_kept(KEYS.node("gcp-2"), value)

    monkeypatch.setattr(change, "distrust_by_look", come_and_go)
    result = run("node", "forget", "--dead-for", "1h", "--yes")
    assert (result.exit_code, "kgctl: gcp-2: left as it was, since" in result.stderr) == (1, True)
    assert etcd.keys("/kilo/by/gcp-2/") != []


def test_a_dead_node_that_comes_back_and_goes_before_the_question_is_answered_is_kept(
    etcd: FakeEtcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its agent found its keys as it wants them, and wrote none of them anew."""
    etcd.put("/kilo/by/runner-9/addresses/10.4.0.9", "")
    monkeypatch.setattr(silence, "claiming", _claims)

    async def refreshed(*_: object) -> tuple[Claiming, ...]:
        return tuple(evolve(each, silent=0) if each.name == "gcp-2" else each for each in await _claims())

    monkeypatch.setattr(change, "confirm", lambda _question: monkeypatch.setattr(silence, "claiming", refreshed))
    result = run("node", "forget", "--dead-for", "1h")
    assert "runner-9: forgotten." in result.output.splitlines()
    assert (result.exit_code, "kgctl: gcp-2: left as it was, since" in result.stderr) == (1, True)
    assert etcd.keys("/kilo/by/gcp-2/") != []
    assert etcd.keys("/kilo/by/runner-9/") == []


@pytest.mark.parametrize("limit", [16, 2])
def test_an_etcd_that_takes_fewer_operations_is_given_smaller_transactions(
    etcd: FakeEtcd, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    """`--max-txn-ops`. If it takes not even one node in a transaction, each is named with etcd's own sentence."""
    _silent(etcd, monkeypatch, [f"runner-{number}" for number in range(9)])
    txn = FakeClient.txn

    async def limited(self: FakeClient, compare: Any, success: Any = (), failure: Any = ()) -> Any:
        if max(len(compare), len(success)) > limit and any(isinstance(op, Delete) for op in success):
            raise BadRequest("too many operations in txn request")
        return await txn(self, compare, success, failure)

    monkeypatch.setattr(FakeClient, "txn", limited)
    done = run("node", "forget", "--dead-for", "1h", "--yes")
    if limit == 2:
        assert done.exit_code == 1
        assert "runner-8: left as it was: too many operations in txn request" in done.output
        assert len(etcd.keys("/kilo/by/runner-")) == 9
    else:
        assert done.exit_code == 0
        assert etcd.keys("/kilo/by/runner-") == []


def _silent(etcd: FakeEtcd, monkeypatch: pytest.MonkeyPatch, names: Sequence[str]) -> None:
    """Claims of nodes that are gone; `kgctl` is told of these and no others."""
    for number, name in enumerate(names):
        etcd.put(f"/kilo/by/{name}/addresses/10.4.{number // 250 + 1}.{number % 250}", "")

    async def claiming(*_: object) -> tuple[Claiming, ...]:
        await trio.lowlevel.checkpoint()
        return tuple(Claiming(name=name, registered=False, reserved=False, alive=False, silent=86400) for name in names)

    monkeypatch.setattr(silence, "claiming", claiming)


def test_a_thousand_dead_nodes_are_forgotten_by_few_transactions(
    etcd: FakeEtcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"runner-{number:04}" for number in range(1000)]
    _silent(etcd, monkeypatch, names)
    calls = _counted(monkeypatch)
    revision = etcd.revision
    done = run("node", "forget", "--dead-for", "1h", "--yes")
    assert done.exit_code == 0
    assert done.output.splitlines()[-1] == f"{', '.join(names[:10])} and 990 more: forgotten."
    assert etcd.keys("/kilo/by/runner-") == []
    # Of at most 128 conditions, three for each; and the question to agents, put and taken away.
    assert etcd.revision - revision == 24 + 2
    assert calls["range"] <= 12, "the mesh is read once, not for each transaction"


def _counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    calls = Counter[str]()
    call = FakeClient._call

    async def counting(self: FakeClient, name: str, *arguments: Any, **options: Any) -> Any:
        calls[name] += 1
        return await call(self, name, *arguments, **options)

    monkeypatch.setattr(FakeClient, "_call", counting)
    return calls


def test_a_dead_node_that_cannot_be_forgotten_does_not_keep_the_others(
    etcd: FakeEtcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = [f"runner-{number:02}" for number in range(60)]
    _silent(etcd, monkeypatch, names)
    etcd.put("/kilo-status/by/runner-07/status", "{}")  # Under no lease: nobody keeps it.
    for number in range(130):
        etcd.put(f"/kilo/annotations/runner-11/a{number}", "x")
    etcd.put("/kilo/by/runner-11/node", b"nonsense")
    etcd.put("/kilo/by/runner-23/node", b"nonsense")
    txn = FakeClient.txn

    async def meanwhile(self: FakeClient, compare: Any, success: Any = (), failure: Any = ()) -> Any:
        if any(isinstance(op, Delete) for op in success):
            if not etcd.keys("/kilo/by/runner-31/reservation"):
                etcd.put_kept("/kilo/by/runner-31/reservation", "")
                etcd.put_kept("/kilo-status/by/runner-32/status", "{}")
            if any(b"/runner-40/" in _bytes(op.key) for op in success):
                raise PermissionDenied("etcd denies it")
        return await txn(self, compare, success, failure)

    monkeypatch.setattr(FakeClient, "txn", meanwhile)
    done = run("node", "forget", "--dead-for", "1h", "--yes")
    assert done.exit_code == 1
    assert "forgotten." in done.output
    assert "runner-11: left as it was, since more than 128 keys are too many for one transaction" in done.output
    assert "runner-31, runner-32: left as it was, since its agent has come back or another writer" in done.output
    assert "runner-40: left as it was: etcd denies it; or take an operator's user" in done.output
    left = {key.split("/")[3] for key in etcd.keys("/kilo/by/runner-")}
    assert left == {"runner-11", "runner-31", "runner-32", "runner-40"}
    assert etcd.keys("/kilo-status/by/runner-07/") == []


def _bytes(key: str | bytes) -> bytes:
    return key.encode() if isinstance(key, str) else key


def test_what_was_forgotten_before_etcd_went_away_is_said(etcd: FakeEtcd, monkeypatch: pytest.MonkeyPatch) -> None:
    _silent(etcd, monkeypatch, [f"runner-{number:03}" for number in range(100)])
    txn = FakeClient.txn

    async def one(self: FakeClient, compare: Any, success: Any = (), failure: Any = ()) -> Any:
        if any(isinstance(op, Delete) for op in success) and len(etcd.keys("/kilo/by/runner-")) < 100:
            raise Unavailable("etcd is away")
        return await txn(self, compare, success, failure)

    monkeypatch.setattr(FakeClient, "txn", one)
    done = run("node", "forget", "--dead-for", "1h", "--yes")
    assert done.exit_code == 1
    assert "more: forgotten." in done.output
    assert "etcd is away" in done.output
    assert 0 < len(etcd.keys("/kilo/by/runner-")) < 100


def test_a_rejected_label_is_named_without_what_is_kept_of_it(etcd: FakeEtcd) -> None:
    etcd.put("/kilo/locations/gcp-2", b"\xff" + b"x" * 3000)
    assert "; label (rejected) goes too" in run("node", "forget", "gcp-2").output


@pytest.mark.parametrize("arguments", [[], ["gcp-2", "--dead-for", "1h"], ["--dead-for", "0s"], ["--dead-for", "soon"]])
def test_forget_needs_a_name_or_a_time(etcd: FakeEtcd, arguments: list[str]) -> None:
    assert run("node", "forget", *arguments, "--yes").exit_code == 2


def test_what_is_set_for_a_renamed_host_moves_and_what_it_left_goes(etcd: FakeEtcd) -> None:
    etcd.put("/kilo/locations/gcp-2", "gcp")
    etcd.put("/kilo/annotations/gcp-2/leader", "true")
    etcd.put("/kilo/annotations/gcp-2/exit-node", "home-1")
    etcd.put("/kilo/annotations/home-1/exit-node", "gcp-2")
    result = run("node", "rename", "gcp-2", "gcp-2.example.net")
    assert (
        "label gcp, annotation exit-node, annotation leader of gcp-2 will be gcp-2.example.net's; gcp-2 leaves the "
        "mesh. Continue?"
    ) in result.output
    result = run("node", "rename", "gcp-2", "gcp-2.example.net", "--yes")
    assert result.output.splitlines()[-1] == "gcp-2 is gcp-2.example.net now."
    assert {key: etcd.get(key) for key in etcd.keys("/kilo/") if "gcp-2" in key or "home-1/exit" in key} == {
        "/kilo/by/gcp-2.example.net/addresses/10.4.0.2": b"",
        "/kilo/annotations/gcp-2.example.net/leader": b"true",
        "/kilo/annotations/gcp-2.example.net/exit-node": b"home-1",
        "/kilo/annotations/home-1/exit-node": b"gcp-2.example.net",
        "/kilo/locations/gcp-2.example.net": b"gcp",
    }


def test_claims_that_a_rename_moves_are_kept_as_long_as_the_former_names_would_have_been(etcd: FakeEtcd) -> None:
    etcd.put_kept("/kilo/by/gcp-2/reservation", "")
    lease = etcd.data[b"/kilo/by/gcp-2/reservation"].lease
    assert run("node", "rename", "gcp-2", "new", "--yes").exit_code == 0
    assert etcd.data[b"/kilo/by/new/reservation"].lease == lease > 0


def test_a_host_that_has_joined_under_its_new_name_keeps_its_claims(etcd: FakeEtcd) -> None:
    """As where etcd did not let it take its former name's records over."""
    etcd.put("/kilo/locations/gcp-2", "gcp")
    etcd.put("/kilo/by/new/addresses/10.4.0.9", "")
    etcd.put("/kilo/locations/new", "gcp")
    assert run("node", "rename", "gcp-2", "new", "--yes").exit_code == 0
    assert [key for key in etcd.keys("/kilo/") if "gcp-2" in key] == []
    assert etcd.keys("/kilo/by/new/") == ["/kilo/by/new/addresses/10.4.0.9"]


def test_rename_undoes_nothing_that_is_set_for_the_new_name(etcd: FakeEtcd) -> None:
    etcd.put("/kilo/locations/gcp-2", "gcp")
    etcd.put("/kilo/locations/new", "home")
    before = held(etcd)
    result = run("node", "rename", "gcp-2", "new", "--yes")
    assert result.exit_code == 1
    assert "new has label home of its own, with another value: remove one of the two first" in result.output
    assert held(etcd) == before


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["forget", "gcp-1", "--yes"], "gcp-1 has an agent that lives"),
        (["forget", "gcp-1", "--dry-run"], "gcp-1 has an agent that lives"),
        (["forget", "nobody", "--yes"], "there is no node nobody"),
        (["forget", "gcp-2"], "say --yes"),
        (["rename", "gcp-1", "new", "--yes"], "gcp-1 has an agent that lives"),
        (["rename", "gcp-2", "gcp-2", "--yes"], "both names are gcp-2"),
        (["rename", "nobody", "new", "--yes"], "nothing is known of nobody"),
        (["rename", "gcp-2", "new"], "say --yes"),
        (["show", "nobody"], "there is no node nobody"),
    ],
)
def test_what_node_refuses(etcd: FakeEtcd, arguments: list[str], sentence: str) -> None:
    before = held(etcd)
    result = run("node", *arguments)
    assert result.exit_code == 1
    assert sentence in result.output
    assert held(etcd) == before


# --- wait -------------------------------------------------------------------------------------------------------------


def test_wait_returns_at_once_when_all_have_applied(etcd: FakeEtcd) -> None:
    assert run("wait").output.startswith("1 agents have applied revision ")


def test_wait_names_those_that_are_late(etcd: FakeEtcd) -> None:
    etcd.put("/kilo/locations/home-1", "gcp")
    result = run("wait", "--timeout", "100ms")
    assert result.exit_code == 1
    assert "1 of 1 agents have not applied revision" in result.output
    assert "gcp-1 (at " in result.output


@pytest.mark.parametrize("compacted", [False, True])
def test_wait_waits_for_a_deletion_too(etcd: FakeEtcd, compacted: bool) -> None:
    etcd.put("/kilo/locations/home-1", "gcp")
    trio.run(alive, etcd.client(), "gcp-1", etcd.revision)
    etcd.put("/elsewhere", "")
    if compacted:
        etcd.compact()
    deleted = etcd.delete("/kilo/locations/home-1")
    etcd.put("/elsewhere", "")
    result = run("wait", "--timeout", "100ms")
    assert result.exit_code == 1
    assert f"1 of 1 agents have not applied revision {deleted} in time: gcp-1 (at " in result.output
    trio.run(alive, etcd.client(), "gcp-1", deleted)
    assert run("wait").output == f"1 agents have applied revision {deleted}.\n"


def test_wait_waits_for_the_deletion_of_a_key_that_was_there_for_a_moment(etcd: FakeEtcd) -> None:
    etcd.put("/kilo/locations/home-1", "gcp")
    deleted = etcd.delete("/kilo/locations/home-1")
    result = run("wait", "--timeout", "100ms")
    assert f"1 of 1 agents have not applied revision {deleted} in time" in result.output


def test_wait_waits_for_nothing_where_history_is_compacted_and_nothing_was_deleted(etcd: FakeEtcd) -> None:
    etcd.put("/elsewhere", "")
    etcd.compact()
    etcd.put("/elsewhere", "")
    assert run("wait", "--timeout", "100ms").output.startswith("1 agents have applied revision ")


@pytest.mark.parametrize("end", ["applied", "died"])
async def test_wait_ends_with_the_last_one(end: str) -> None:
    from kilo_etcd.ctl.commands.wait import applied

    fake = FakeEtcd()
    client = fake.client()
    await world(client)
    newest = (await client.put("/kilo/locations/home-1", "gcp")).header.revision
    with trio.fail_after(20):
        async with trio.open_nursery() as nursery:
            found: list[object] = []

            async def wait() -> None:
                found.append(await applied(client, KEYS, timeout=20))

            nursery.start_soon(wait)
            await trio.testing.wait_all_tasks_blocked()
            assert found == []
            if end == "applied":
                await alive(client, "gcp-1", newest)
            else:
                await client.delete(KEYS.status("gcp-1"))
    assert found == [(newest, 1 if end == "applied" else 0, {})]


def test_wait_refuses_a_time_that_is_none(etcd: FakeEtcd) -> None:
    assert run("wait", "--timeout", "soon").exit_code == 2


def test_an_etcd_is_adopted_when_that_is_confirmed(etcd: FakeEtcd) -> None:
    before = etcd.revision
    result = run("mesh", "adopt")
    assert (result.exit_code, etcd.revision) == (1, before)
    assert "Have all agents follow this etcd? Nothing was written" in result.stderr
    assert "Nothing was written (--dry-run)." in run("mesh", "adopt", "--dry-run").output
    result = run("mesh", "adopt", "--yes")
    assert result.exit_code == 0, result.output
    assert f"cluster {etcd.cluster_id:x} at revision {before}" in result.output
    assert adopts(etcd.get("/kilo/mesh/adopted"), None, etcd.cluster_id)
    # Said again, it is news again: who has followed the first may have met an older etcd since.
    first = etcd.get("/kilo/mesh/adopted")
    assert run("mesh", "adopt", "--yes").exit_code == 0
    assert adopts(etcd.get("/kilo/mesh/adopted"), first, etcd.cluster_id)


# --- asking -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["location", "set", "home-1", "gcp"], "home-1 moves to gcp"),
        (["location", "set", "gcp-1", "home"], "gcp-1 moves to home"),
        (["annotate", "home-1", "force-endpoint=198.51.100.1"], "home-1 is expected at 198.51.100.1:51820"),
        (["annotate", "home-1", "force-internal-ip=-"], "home-1 has internal IP none"),
        (["annotate", "home-1", "subnets-"], "home-1 does not lead any more to 172.20.0.0/24"),
        (["peer", "remove", "laptop"], "peer laptop is cut off"),
    ],
)
def test_what_interrupts_asks_first(etcd: FakeEtcd, arguments: list[str], reason: str) -> None:
    assert run("annotate", "home-1", "subnets=172.20.0.0/24").exit_code == 0
    public_key = base64.b64encode(bytes([30]) * 32).decode()
    assert run("peer", "add", "laptop", f"--public-key={public_key}", "--allowed-ips", "10.9.0.3").exit_code == 0
    before = held(etcd)
    result = run(*arguments)
    assert (result.exit_code, held(etcd)) == (1, before), result.output
    assert "This interrupts traffic in use: " in result.stderr
    assert reason in result.stderr
    assert "there is no terminal to ask at, so say --yes" in result.stderr
    assert run(*arguments, "--dry-run").exit_code == 0
    assert run(*arguments, "--yes").exit_code == 0
    assert held(etcd) != before


@pytest.mark.parametrize(
    "arguments",
    [
        ["location", "set", "to-come", "gcp"],
        ["annotate", "home-1", "persistent-keepalive=25"],
        ["annotate", "home-1", "subnets=172.20.0.0/24"],
        ["annotate", "home-1", "advertise-exit-node=true"],
        ["annotate", "gcp-2", "leader=true"],
        ["location", "set", "home-1", "home"],
    ],
)
def test_what_interrupts_nobody_does_not_ask(etcd: FakeEtcd, arguments: list[str]) -> None:
    result = run(*arguments)
    assert result.exit_code == 0, result.output
    assert held(etcd) != {}


# --- an exit node
# --------------------------------------------------------------------------------------------------------


def test_a_node_gets_its_exit_node_and_what_cannot_be_is_refused(etcd: FakeEtcd) -> None:
    before = held(etcd)
    for exit_node, says in {
        "gcp-1": "node gcp-1 does not advertise itself as an exit node; allow it with kgctl annotate gcp-1 "
        "advertise-exit-node=true; nothing was written",
        "nobody": "the exit node nobody is no node of the mesh",
        "home-1": "node home-1 cannot be its own exit node",
    }.items():
        result = run("annotate", "home-1", f"exit-node={exit_node}", "--yes")
        assert (result.exit_code, says in result.stderr) == (1, True), result.output
    assert held(etcd) == before
    assert run("annotate", "gcp-1", "advertise-exit-node=true").exit_code == 0
    asked = run("annotate", "home-1", "exit-node=gcp-1")
    assert "home-1 leaves for the internet by gcp-1. Continue?" in asked.stderr
    said = run("annotate", "home-1", "exit-node=gcp-1", "--yes").output
    assert said.splitlines() == ["home-1 leaves for the internet by gcp-1, through the tunnel", "home-1: annotated"]
    assert etcd.get("/kilo/annotations/home-1/exit-node") == b"gcp-1"
    assert "gcp-1" in run("node", "show", "home-1").output
    assert "0.0.0.0/0" in run("showconf", "node", "home-1").output
    # A command that removes the exit node names who is cut off by that.
    closed = run("annotate", "gcp-1", "advertise-exit-node-", "--dry-run").output
    assert "new trouble: home-1: node gcp-1 does not advertise itself as an exit node" in closed
    assert run("annotate", "new-1", "exit-node=gcp-1").exit_code == 0, "where it will be is not known yet"
    assert "its own network again" in run("annotate", "home-1", "exit-node-", "--yes").output
