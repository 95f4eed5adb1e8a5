"""`kgctl peer` and `kgctl showconf`: what is read, written, refused and printed."""

from __future__ import annotations

import base64
import json
import subprocess
from ipaddress import ip_interface
from pathlib import Path

import pytest
import trio
import yaml
from attrs import evolve
from click.testing import CliRunner, Result

from helpers import put_kept, require
from kilo_etcd.ctl.commands import peer
from kilo_etcd.ctl.context import Failure
from kilo_etcd.ctl.main import main
from kilo_etcd.etcd.api import Client
from kilo_etcd.model import CandidateClass, Endpoint
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import CandidateRecord, NodeRecord, decode_peer, encode, read
from kilo_etcd.testing.fake_etcd import FakeEtcd

KEYS = Keys()
HOSTS = {"gcp-1": (1, "gcp"), "gcp-2": (2, "gcp"), "home-1": (3, "home")}
MANIFEST = """\
apiVersion: kilo.squat.ai/v1alpha1
kind: Peer
metadata:
  name: squat
spec:
  allowedIPs:
  - 10.5.0.1/32
  endpoint:
    dnsOrIP:
      dns: vpn.example.org
    port: 51820
  publicKey: {key}
  persistentKeepalive: 10
"""


def key_of(number: int) -> str:
    return base64.b64encode(bytes([number]) * 32).decode()


async def world(client: Client) -> None:
    """gcp-1 leads gcp; home-1 is alone, with a network behind it; tablet is a peer."""
    await client.put("/kilo/mesh/subnets", "10.4.0.0/16")
    await client.put("/kilo/mesh/granularity", "location")
    for name, (number, location) in HOSTS.items():
        record = NodeRecord(
            public_key=key_of(number),
            endpoint=Endpoint.parse(f"203.0.113.{number}:51820"),
            internal_ips=(ip_interface(f"10.{1 if location == 'gcp' else 2}.0.{number}/24"),),
            location=location,
        )
        await client.put(f"/kilo/by/{name}/addresses/10.4.0.{number}", "")
        await client.put(KEYS.node(name), encode(record))
        await put_kept(client, KEYS.election(location, name), encode(CandidateRecord(rank=CandidateClass.PUBLIC)))
    await client.put("/kilo/annotations/home-1/subnets", "172.20.0.0/24")
    await client.put("/kilo/peers/tablet", json.dumps({"publicKey": key_of(20), "allowedIPs": ["10.9.0.20/32"]}))


@pytest.fixture
def etcd(fake: FakeEtcd) -> FakeEtcd:
    trio.run(world, fake.client())
    return fake


def run(*arguments: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, arguments, prog_name="kgctl", input=stdin)


def held(etcd: FakeEtcd) -> dict[str, bytes | None]:
    return {key: etcd.get(key) for key in etcd.keys("/kilo")}


def add(name: str, number: int, allowed: str, *more: str) -> Result:
    return run("peer", "add", name, "--public-key", key_of(number), "--allowed-ips", allowed, *more)


# --- add --------------------------------------------------------------------------------------------------------------


def test_a_peer_is_added_from_flags(etcd: FakeEtcd, tmp_path: Path) -> None:
    (tmp_path / "psk").write_text(key_of(99) + "\n")
    result = add("laptop", 21, "10.9.0.2, fd09::2", "--endpoint", "[2001:db8::7]:4711", "--persistent-keepalive", "25",
                "--preshared-key-file", str(tmp_path / "psk"))  # fmt: skip
    assert result.output == "peer laptop joins the mesh\npeer laptop: added\n"
    record = decode_peer(etcd.get("/kilo/peers/laptop") or b"")
    assert [str(network) for network in record.allowed_ips] == ["10.9.0.2/32", "fd09::2/128"]
    assert str(record.endpoint) == "[2001:db8::7]:4711"
    assert (record.public_key, record.persistent_keepalive, record.preshared_key) == (key_of(21), 25, key_of(99))


def test_kilos_own_manifest_is_taken_as_it_is(etcd: FakeEtcd, tmp_path: Path) -> None:
    text = MANIFEST.format(key=key_of(21))
    (tmp_path / "peer.yaml").write_text(text)
    assert run("peer", "add", "-f", str(tmp_path / "peer.yaml")).output.endswith("peer squat: added\n")
    record = decode_peer(etcd.get("/kilo/peers/squat") or b"")
    assert (str(record.endpoint), record.persistent_keepalive) == ("vpn.example.org:51820", 10)
    # What it prints is what it reads.
    for output in ("yaml", "json"):
        shown = run("peer", "show", "squat", "-o", output).output
        assert yaml.safe_load(shown) == yaml.safe_load(text)
        again = run("peer", "add", "-f", "-", stdin=shown)
        assert again.output == "peer squat: is so already\n"


def test_several_peers_come_together_from_standard_input(etcd: FakeEtcd) -> None:
    one = yaml.safe_load(MANIFEST.format(key=key_of(21)))
    other = {
        "name": "router",
        "publicKey": key_of(22),
        "allowedIPs": ["192.0.2.0/24"],
        "endpoint": "198.51.100.7:51820",
    }
    text = json.dumps({"apiVersion": "v1", "kind": "List", "items": [one, other]})
    assert run("peer", "add", "-f", "-", stdin=text).exit_code == 0
    assert etcd.keys("/kilo/peers/") == ["/kilo/peers/router", "/kilo/peers/squat", "/kilo/peers/tablet"]
    listed = run("peer", "list", "-o", "json").output
    assert {item["metadata"]["name"] for item in json.loads(listed)["items"]} == {"router", "squat", "tablet"}


def test_none_is_written_if_one_is_refused(etcd: FakeEtcd) -> None:
    before = held(etcd)
    text = MANIFEST.format(key=key_of(21)) + "---\n" + MANIFEST.format(key="nonsense").replace("squat\n", "bad\n")
    result = run("peer", "add", "-f", "-", stdin=text)
    assert result.exit_code == 1
    assert result.output == (
        "kgctl: standard input: peer bad: publicKey: a text of 8 characters is no WireGuard key (32 bytes in base64); "
        "nothing was written\n"
    )
    assert held(etcd) == before


def test_a_peer_that_is_there_is_replaced_only_when_that_is_said(etcd: FakeEtcd) -> None:
    result = add("tablet", 21, "10.9.0.21")
    assert result.exit_code == 1
    assert "there is a peer tablet already; --replace replaces it" in result.output
    assert add("tablet", 21, "10.9.0.21", "--replace").exit_code == 0
    assert decode_peer(etcd.get("/kilo/peers/tablet") or b"").public_key == key_of(21)


@pytest.mark.parametrize(
    ("name", "number", "allowed", "sentence"),
    [
        ("laptop", 1, "10.9.0.2", "peer laptop: its public key is that of node gcp-1"),
        ("laptop", 20, "10.9.0.2", "peer laptop: its public key is that of peer tablet"),
        ("laptop", 21, "10.9.0.20", "peer laptop: 10.9.0.20/32 overlaps 10.9.0.20/32 of peer tablet"),
        ("laptop", 21, "10.4.7.7", "10.4.7.7/32"),
        ("laptop", 21, "172.20.0.9", "172.20.0.9/32"),
        ("laptop", 21, "0.0.0.0/0", "peer laptop: 0.0.0.0/0 is a default route"),
        ("laptop", 21, "10.1.0.1", "peer laptop: 10.1.0.1 is the internal IP of node gcp-1; choose another address"),
    ],
    ids=["node's key", "peer's key", "peer's network", "mesh's subnet", "node's subnet", "default route", "node's IP"],
)
def test_what_contradicts_the_mesh_is_refused(
    etcd: FakeEtcd, name: str, number: int, allowed: str, sentence: str
) -> None:
    before = held(etcd)
    result = add(name, number, allowed)
    assert result.exit_code == 1, result.output
    assert result.output.count("\n") == 1
    assert sentence in result.output
    assert result.output.endswith("nothing was written\n")
    assert held(etcd) == before


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (["laptop"], 2, "Give its --public-key"),
        ([], 2, "Give the peer a NAME"),
        (["laptop", "--public-key", "short", "--allowed-ips", "10.9.0.2"], 2, "5 characters is no WireGuard key"),
        (["laptop", "--public-key", key_of(21)], 2, "Give --allowed-ips"),
        (["laptop", "--public-key", key_of(21), "--allowed-ips", "10.9.0.2/99"], 2, "is no network (CIDR)"),
        (["laptop", "--public-key", key_of(21), "--allowed-ips", "10.9.0.2/24"], 2, "is an address within 10.9.0.0/24"),
        (["laptop", "--public-key", key_of(21), "--allowed-ips", "10.9.0.2", "--endpoint", "x"], 2, "port is missing"),
        (["a b", "--public-key", key_of(21), "--allowed-ips", "10.9.0.2"], 2, "is no peer name"),
        (["laptop", "--generate", "--public-key", key_of(21)], 2, "Give its --public-key, or"),
        (["laptop", "--public-key", key_of(21), "--allowed-ips", "10.9.0.2", "--qr"], 2, "--qr goes with --generate"),
        (["-f", "/nowhere"], 1, "/nowhere cannot be read: No such file or directory"),
        (["-f", "-", "--public-key", key_of(21)], 2, "leave the other options out"),
        (["laptop", "--public-key", key_of(21), "--allowed-ips", "10.9.0.2", "--preshared-key-file", "/nowhere"], 1,
         "/nowhere cannot be read"),
    ],
)  # fmt: skip
def test_what_peer_add_refuses(etcd: FakeEtcd, arguments: list[str], status: int, sentence: str) -> None:
    before = held(etcd)
    result = run("peer", "add", *arguments)
    assert result.exit_code == status, result.output
    assert sentence in result.output
    assert held(etcd) == before


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{", "is neither YAML nor JSON"),
        ("", "has no peer in it"),
        ("just text", "a text of 9 characters is no peer"),
        ("kind: Pod\nmetadata: {name: x}", "a 'Pod' is no Peer"),
        ("publicKey: " + key_of(21), "has no name"),
        ("name: x\npublicKey: 7", "publicKey: a number is no WireGuard key"),
        ("name: x\npublicKey: " + key_of(21) + "\nallowedIps: []", "allowedIps is no field of a peer"),
        ("name: x\npublicKey: " + key_of(21) + "\nallowedIPs: 10.0.0.1", "allowedIPs is no list"),
        ("name: x\npublicKey: " + key_of(21) + "\nendpoint: {port: 1}", "neither dnsOrIP.ip nor dnsOrIP.dns"),
        ("name: x\npublicKey: " + key_of(21) + "\npersistentKeepalive: soon", "persistentKeepalive: 'soon' is no"),
        ("name: a/b\npublicKey: " + key_of(21), "'a/b' is no peer name"),
        (
            "name: x\npublicKey: " + key_of(21) + "\n---\nname: x\npublicKey: " + key_of(22),
            "two peers in it are called x",
        ),
        ("[" * 3000, "standard input"),
    ],
)
def test_what_manifests_are_refused(etcd: FakeEtcd, text: str, sentence: str) -> None:
    before = held(etcd)
    result = run("peer", "add", "-f", "-", stdin=text)
    assert result.exit_code == 1, result.output
    assert result.output.startswith("kgctl: ")
    assert sentence in result.output
    assert held(etcd) == before


def test_keys_are_made_here_and_the_private_one_goes_nowhere_else(etcd: FakeEtcd) -> None:
    result = run("peer", "add", "phone", "--allowed-ips", "10.9.0.3", "--persistent-keepalive", "25", "--generate")
    assert result.exit_code == 0, result.output
    assert result.stderr == "peer phone joins the mesh\npeer phone: added\n"
    (private,) = (line.split(" = ")[1] for line in result.stdout.splitlines() if line.startswith("PrivateKey = "))
    assert "Address = 10.9.0.3/32" in result.stdout
    assert private.encode() not in b"".join(value or b"" for value in held(etcd).values())
    from kilo_etcd.runtime.key_file import public_key

    assert decode_peer(etcd.get("/kilo/peers/phone") or b"").public_key == public_key(private)
    code = run("peer", "add", "phone2", "--allowed-ips", "10.9.0.4", "--generate", "--qr")
    assert "█" in code.stdout or "▄" in code.stdout
    assert "PrivateKey" not in code.output


def test_a_configuration_too_long_for_a_code_is_printed_since_its_key_is_kept_nowhere(
    etcd: FakeEtcd, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_long(text: str) -> None:
        raise Failure(f"the configuration has {len(text)} bytes")

    monkeypatch.setattr(peer, "show_qr", too_long)
    result = run("peer", "add", "phone", "--allowed-ips", "10.9.0.3", "--generate", "--qr")
    assert result.exit_code == 0, result.output
    assert "PrivateKey = " in result.stdout
    assert "kgctl: the configuration has" in result.stderr


@pytest.mark.parametrize("field", ["ip: 2001:db8::7", "dns: vpn.example.org", "dnsOrIP: {ip: '2001:db8::7'}"])
def test_each_way_that_kilo_has_written_an_endpoint(etcd: FakeEtcd, field: str) -> None:
    text = f"name: x\npublicKey: {key_of(21)}\nallowedIPs: [10.9.0.2]\nendpoint:\n  {field}\n  port: 4711\n"
    assert run("peer", "add", "-f", "-", stdin=text).exit_code == 0
    assert str(decode_peer(etcd.get("/kilo/peers/x") or b"").endpoint) in (
        "[2001:db8::7]:4711", "vpn.example.org:4711",
    )  # fmt: skip


def test_a_dry_run_makes_no_configuration(etcd: FakeEtcd) -> None:
    before = held(etcd)
    result = run("peer", "add", "phone", "--allowed-ips", "10.9.0.3", "--generate", "--dry-run")
    assert result.stdout == ""
    assert result.stderr == "peer phone joins the mesh\nNothing was written (--dry-run).\n"
    assert held(etcd) == before


# --- list, show, remove -----------------------------------------------------------------------------------------------


def test_peers_are_listed_with_what_is_wrong(etcd: FakeEtcd) -> None:
    etcd.put("/kilo/peers/bad", "{")
    etcd.put("/kilo/peers/thief", json.dumps({"publicKey": key_of(1), "allowedIPs": ["10.9.0.9/32"]}))
    lines = {line.split()[0]: line for line in run("peer", "list").output.splitlines()}
    assert "not in force: the value is not JSON" in lines["bad"]
    assert "public key" in lines["thief"]
    assert lines["tablet"].split()[1:3] == [key_of(20), "10.9.0.20/32"]
    assert "cannot be read" in run("peer", "show", "bad", "-o", "yaml").output


def test_a_preshared_key_is_shown_only_where_it_is_asked_for(etcd: FakeEtcd) -> None:
    record = {"publicKey": key_of(30), "allowedIPs": ["10.9.0.30/32"], "presharedKey": key_of(77)}
    etcd.put("/kilo/peers/secret", json.dumps(record))
    assert key_of(77) not in run("peer", "list").output
    assert key_of(77) not in run("peer", "show", "secret").output
    assert key_of(77) in run("peer", "show", "secret", "-o", "yaml").output


def test_peers_are_removed_all_or_none(etcd: FakeEtcd) -> None:
    assert add("laptop", 21, "10.9.0.2").exit_code == 0
    missing = run("peer", "remove", "laptop", "nobody")
    assert (missing.exit_code, "there is no peer nobody" in missing.output) == (1, True)
    assert etcd.get("/kilo/peers/laptop") is not None
    assert run("peer", "remove", "laptop", "--dry-run").output.startswith("peer laptop leaves the mesh\n")
    assert etcd.get("/kilo/peers/laptop") is not None
    assert run("peer", "remove", "laptop", "tablet", "--yes").output.splitlines()[-2:] == [
        "peer laptop: removed",
        "peer tablet: removed",
    ]
    assert etcd.keys("/kilo/peers/") == []


def test_with_a_peer_goes_the_address_that_it_had_claimed(etcd: FakeEtcd) -> None:
    trio.run(etcd.client().put, "/kilo/peer-addresses/tablet/10.4.7.7", "")
    assert run("peer", "remove", "tablet", "--yes").exit_code == 0
    assert etcd.keys("/kilo/peer-addresses/") == []
    assert len(etcd.keys("/kilo/by/", "/addresses/")) == 3


# --- showconf ---------------------------------------------------------------------------------------------------------


def test_a_peers_configuration_holds_every_leader_and_the_whole_mesh(etcd: FakeEtcd) -> None:
    result = run("showconf", "peer", "tablet", "-o", "json")
    data = json.loads(result.output)
    assert [peer["metadata"]["name"] for peer in data["peers"]] == ["gcp-1", "home-1"]
    assert [peer["spec"]["allowedIPs"] for peer in data["peers"]] == [
        ["10.4.0.1/32", "10.4.0.2/32"],
        ["10.4.0.3/32", "172.20.0.0/24"],
    ]
    assert data["addresses"] == ["10.9.0.20/32"]
    etcd.put("/kilo/mesh/granularity", "full")
    data = json.loads(run("showconf", "peer", "tablet", "-o", "json").output)
    assert [peer["metadata"]["name"] for peer in data["peers"]] == ["gcp-1", "gcp-2", "home-1"]


def test_a_node_as_peer_can_be_piped_into_another_mesh(etcd: FakeEtcd) -> None:
    text = run("showconf", "node", "gcp-1", "--as-peer", "-o", "json", "--allowed-ips", "10.77.0.0/16").output
    other = run("--prefix", "/b", "peer", "add", "-f", "-", stdin=text)
    assert other.exit_code == 0, other.output
    record = decode_peer(etcd.get("/b/peers/gcp-1") or b"")
    assert [str(network) for network in record.allowed_ips] == ["10.4.0.1/32", "10.4.0.2/32", "10.77.0.0/16"]
    assert str(record.endpoint) == "203.0.113.1:51820"


def test_a_node_as_peer_has_the_internal_ips_that_are_routed(etcd: FakeEtcd) -> None:
    etcd.put(KEYS.internal_ips, "routed")
    for name in HOSTS:
        record = read(NodeRecord, etcd.get(KEYS.node(name)) or b"").record
        endpoint = Endpoint.parse("10.2.0.3:51820") if name == "home-1" else record.endpoint
        etcd.put(KEYS.node(name), encode(evolve(record, underlay=(), endpoint=endpoint)))

    def allowed(name: str) -> list[str]:
        entry = json.loads(run("showconf", "node", name, "--as-peer", "-o", "json").output)
        return list(entry["spec"]["allowedIPs"])

    assert allowed("gcp-1") == ["10.1.0.1/32", "10.1.0.2/32", "10.4.0.1/32", "10.4.0.2/32"]
    assert allowed("gcp-2") == ["10.4.0.2/32", "10.1.0.2/32"]
    assert "10.2.0.3/32" not in allowed("home-1"), "its WireGuard is reached there"
    etcd.put(KEYS.internal_ips, "off")
    assert allowed("gcp-1") == ["10.4.0.1/32", "10.4.0.2/32"]


def test_an_exit_node_takes_everything_that_is_nobody_elses(etcd: FakeEtcd) -> None:
    result = run("annotate", "gcp-1", "advertise-exit-node=true")
    assert result.output == "gcp-1 advertises itself as an exit node\ngcp-1: annotated\n"
    before, found = (run("showconf", "peer", "tablet", *more).output for more in ((), ("--exit-node", "gcp-1")))
    changed = [pair for pair in zip(before.splitlines(), found.splitlines(), strict=True) if pair[0] != pair[1]]
    assert changed == [
        ("AllowedIPs = 10.4.0.1/32, 10.4.0.2/32", "AllowedIPs = 0.0.0.0/0, 10.4.0.1/32, 10.4.0.2/32, ::/0")
    ]


@pytest.mark.parametrize(
    ("arguments", "status", "sentence"),
    [
        (
            ["peer", "tablet", "--exit-node", "gcp-1"],
            1,
            "node gcp-1 does not advertise itself as an exit node; allow it with kgctl annotate",
        ),
        (["peer", "tablet", "--exit-node", "nobody"], 1, "the exit node nobody is no node of the mesh"),
        (["peer", "tablet", "--exit-node", "gcp-1", "--as-peer"], 2, "leave --exit-node or --as-peer out"),
        (["node", "nobody"], 1, "there is no node"),
        (["peer", "nobody"], 1, "there is no peer nobody in force"),
        (["peer", "tablet", "--allowed-ips", "10.0.0.0/8"], 1, "this configuration has 2 (gcp-1, home-1)"),
        (["peer", "tablet", "--private-key-file", "/nowhere"], 1, "/nowhere cannot be read"),
        (["peer", "tablet", "--as-peer", "--qr"], 2, "A QR code holds a whole configuration"),
        (["peer", "tablet", "--as-peer", "--private-key-file", "-"], 2, "has no private key"),
        (["peer", "tablet", "--png", "/nowhere/x.png"], 1, "/nowhere/x.png cannot be written"),
        (["peer", "tablet", "-o", "xml"], 2, "'xml' is not one of"),
    ],
)
def test_what_showconf_refuses(etcd: FakeEtcd, arguments: list[str], status: int, sentence: str) -> None:
    result = run("showconf", *arguments)
    assert result.exit_code == status, result.output
    assert sentence in result.output


def test_a_bad_private_key_is_not_repeated(etcd: FakeEtcd) -> None:
    result = run("showconf", "peer", "tablet", "--private-key-file", "-", stdin="sesame\n")
    assert result.exit_code == 1
    assert "standard input holds no WireGuard private key" in result.output
    assert "sesame" not in result.output


def test_a_png_is_a_png(etcd: FakeEtcd, tmp_path: Path) -> None:
    assert run("showconf", "peer", "tablet", "--png", str(tmp_path / "x.png")).exit_code == 0
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
def test_the_real_tools_take_it(etcd: FakeEtcd, tmp_path: Path) -> None:
    """wg-quick reads it, and `wg setconf` puts it into a device, in which the same stands then."""
    require("wg", "wg-quick", "wireguard-go", "ip")
    private = base64.b64encode(bytes([8]) * 31 + bytes([0x48])).decode()  # as wg itself would spell it
    etcd.put("/kilo/annotations/gcp-1/persistent-keepalive", "25")
    etcd.put(
        "/kilo/peers/tablet",
        json.dumps({"publicKey": key_of(20), "allowedIPs": ["10.9.0.20/32", "fd09::20/128"], "presharedKey": key_of(77),
                    "persistentKeepalive": 25}),
    )  # fmt: skip
    subprocess.run(["wireguard-go", "wg0"], check=True, capture_output=True)
    for arguments in (["peer", "tablet"], ["node", "gcp-1"]):
        for output in ("wireguard", "wg-quick"):
            text = run("showconf", *arguments, "-o", output, "--private-key-file", "-", stdin=private).output
            conf = tmp_path / "wg0.conf"
            conf.write_text(text)
            conf.chmod(0o600)
            stripped = subprocess.run(["wg-quick", "strip", str(conf)], check=True, capture_output=True, text=True)
            if output == "wireguard":
                conf.write_text(stripped.stdout)
                subprocess.run(["wg", "setconf", "wg0", str(conf)], check=True, capture_output=True, text=True)
                shown = subprocess.run(
                    ["wg", "show", "wg0", "dump"], check=True, capture_output=True, text=True
                ).stdout.splitlines()  # fmt: skip
                data = json.loads(run("showconf", *arguments, "-o", "json").output)
                assert {line.split("\t")[0]: line.split("\t")[3] for line in shown[1:]} == {
                    peer["spec"]["publicKey"]: ",".join(peer["spec"]["allowedIPs"]) for peer in data["peers"]
                }
                assert shown[0].split("\t")[0] == private
