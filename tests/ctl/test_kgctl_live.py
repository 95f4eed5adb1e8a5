"""What the hosts say: `kgctl status --live`, `graph`, on an etcd in memory whose agents answer as the test has them."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from errno import ENODEV, EROFS
from functools import partial
from ipaddress import ip_network

import pytest
import trio
from attrs import evolve
from click.testing import CliRunner, Result
from test_arrivals import mesh as arrivals_mesh
from test_kgctl_explain import probed, world

from helpers import eventually, put_kept, require
from kilo_etcd.ctl.main import main
from kilo_etcd.ctl.reports.hops import suspicions
from kilo_etcd.ctl.reports.live import Live, ago, amount
from kilo_etcd.ctl.reports.report import Report
from kilo_etcd.ctl.reports.trace import Plans, explain
from kilo_etcd.etcd.api import Client, Config, EtcdError, Full, PermissionDenied, Status, Unavailable
from kilo_etcd.etcd.client import open_client
from kilo_etcd.etcd.values import Member
from kilo_etcd.kernel.errors import cannot_ping, failure
from kilo_etcd.kernel.state import AllowPings, SetForwarding
from kilo_etcd.model import Snapshot
from kilo_etcd.planning.dropped import drops_packets_for
from kilo_etcd.store import operator
from kilo_etcd.store.diagnostics import LEASE_SECONDS, serve
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import (
    DiagnosticsRequest,
    DiagnosticsResponse,
    Role,
    StatusRecord,
    TakenRoute,
    Tunnel,
    decode_status,
    encode,
)
from kilo_etcd.testing.etcd_server import EtcdServer
from kilo_etcd.testing.fake_etcd import FakeClient, FakeEtcd
from kilo_etcd.topology.graph import LEGEND
from kilo_etcd.topology.segments import build_topology

KEYS = Keys()
Says = dict[str, DiagnosticsResponse]


class Mesh:
    """Two locations led by gcp-1 and home-1 (see `world`), a laptop, and agents that say what `says` has."""

    def __init__(self) -> None:
        self.etcd = FakeEtcd()
        self.says: Says = {}
        self.silent: set[str] = set()
        self.old: set[str] = set()
        """Whose agents do not know that they may be asked to send packets."""
        self.lost: Callable[[str, str], bool] = lambda source, target: False
        """Whether packets between two nodes are lost."""
        self.denied = False
        self.refusal: EtcdError = PermissionDenied("user eve may not grant a lease in etcd")
        self.snapshot: Snapshot = trio.run(self._fill)

    async def _fill(self) -> Snapshot:
        client = self.etcd.client()
        await world(client)
        snapshot = (await operator.snapshot(client, KEYS))[0]
        topology = build_topology(snapshot)
        for name, node in snapshot.nodes.items():
            leader = topology.segment_of(name).leader.name
            status = StatusRecord(
                public_key=node.public_key,
                revision=snapshot.revision,
                role=Role.LEADER if leader == name else Role.MEMBER,
                location=node.location,
                leader=leader,
            )
            await put_kept(client, KEYS.status(name), encode(status))
        return snapshot

    def fails(self, name: str, *errors: str) -> None:
        """Have the status of a node's agent name these errors."""
        status = decode_status(self.etcd.get(KEYS.status(name)) or b"")
        trio.run(put_kept, self.etcd.client(), KEYS.status(name), encode(evolve(status, errors=errors)))

    def key(self, name: str) -> str:
        nodes, peers = self.snapshot.nodes, self.snapshot.peers
        return nodes[name].public_key if name in nodes else peers[name].public_key

    def tunnel(self, to: str, handshake: int, received: int = 2048, sent: int = 100) -> Tunnel:
        return Tunnel(self.key(to), handshake, received, sent, "203.0.113.9:51820")

    async def agent(self, name: str) -> None:
        async def reply(request: DiagnosticsRequest) -> DiagnosticsResponse:
            await trio.lowlevel.checkpoint()
            response = self.says.get(
                name, DiagnosticsResponse(time=int(time.time() * 1000), backend="kernel", mtu=1420)
            )
            if name in self.old:
                return response
            found: dict[bool, list[str]] = {False: [], True: []}
            for other, node in self.snapshot.nodes.items():
                for address in map(str, node.mesh_addresses):
                    if other != name and (request.tries or address in request.targets):
                        found[self.lost(name, other)].append(address)
            return evolve(response, reached=tuple(found[False]), unreached=tuple(found[True]))

        await serve(self.etcd.client(name), KEYS, name, reply)

    def run(self, *arguments: str) -> Result:
        return CliRunner().invoke(main, arguments, prog_name="kgctl")


@pytest.fixture
def mesh(monkeypatch: pytest.MonkeyPatch, virtual_time: None) -> Mesh:
    made = Mesh()

    @asynccontextmanager
    async def opened(config: Config, **_: object) -> AsyncIterator[Client]:
        client = made.etcd.client()
        async with trio.open_nursery() as nursery:
            for name in made.snapshot.nodes.keys() - made.silent:
                nursery.start_soon(made.agent, name)
            await trio.testing.wait_all_tasks_blocked()
            if made.denied:
                monkeypatch.setattr(client, "grant_lease", denied)
            yield client
            nursery.cancel_scope.cancel()
        # The agents' leases for their responses end by themselves; here no time passes between two commands.
        for lease in [lease for lease, ttl in made.etcd.leases().items() if ttl == LEASE_SECONDS]:
            await made.etcd.client().revoke_lease(lease)

    async def denied(*_: object) -> None:
        await trio.lowlevel.checkpoint()
        raise made.refusal

    monkeypatch.setattr("kilo_etcd.etcd.client.open_client", opened)
    return made


def now() -> int:
    return int(time.time() * 1000)


def test_tunnels_and_traffic_are_shown_as_the_leaders_have_them(mesh: Mesh) -> None:
    mesh.says["gcp-1"] = DiagnosticsResponse(
        time=now(),
        tunnels=(mesh.tunnel("home-1", 12), mesh.tunnel("laptop", -1, 0, 0), Tunnel("X" + "A" * 42 + "=", 1, 1, 1, "")),
    )
    # A standby knows the leaders too; what it knows is no tunnel.
    mesh.says["gcp-2"] = DiagnosticsResponse(time=now(), tunnels=(mesh.tunnel("home-1", -1),))
    mesh.says["home-2"] = DiagnosticsResponse(time=now(), undone=3, changes=("ip route add 10.4.0.0/16 dev kilo0",))
    result = mesh.run("status", "--live")
    assert result.exit_code == 0, result.output
    lines = [" ".join(line.split()) for line in result.output.splitlines()]
    assert "1 of 1 tunnels up" in lines[0]
    assert "gcp-1 home-1 12 s 2.0 KiB 100 B 203.0.113.9:51820" in lines
    assert "gcp-1 laptop never 0 B 0 B 203.0.113.9:51820" in lines
    assert "home-2 3 ip route add 10.4.0.0/16 dev kilo0" in lines
    assert not [line for line in lines if line.startswith("gcp-2 home-1")]
    said = json.loads(mesh.run("status", "--live", "-o", "json").stdout)["live"]
    assert (said["tunnels"], said["up"], said["silent"], said["refused"]) == (1, 1, [], None)
    assert {kernel["name"]: kernel["undone"] for kernel in said["kernels"]}["home-2"] == 3
    assert json.loads(mesh.run("status", "-o", "json").stdout)["live"] is None
    assert not [key for key in mesh.etcd.keys("/") if "requests" in key or "responses" in key]


def test_who_does_not_answer_and_who_may_not_ask_are_told(mesh: Mesh) -> None:
    mesh.silent = {"home-1"}
    result = mesh.run("status", "--live")
    assert "home-1  its agent lives, but has not answered in time" in result.output
    mesh.denied = True
    result = mesh.run("status", "--live")
    assert result.exit_code == 0
    assert "no host could be asked: user eve may not grant a lease in etcd" in result.output


def test_what_to_do_where_the_hosts_cannot_be_asked_follows_from_what_etcd_said(mesh: Mesh) -> None:
    def remedy() -> str:
        findings = json.loads(mesh.run("check", "-o", "json").stdout)
        (finding,) = (finding for finding in findings if finding["subject"] == "hosts")
        assert finding["text"] == f"their agents could not be asked: {mesh.refusal}"
        return str(finding["remedy"])

    mesh.denied = True
    assert remedy().startswith("ask as a user who may write below /kilo-status/")
    mesh.refusal = Full("etcd is full: could not grant a lease; compact, defragment, then etcdctl alarm disarm")
    assert remedy() == "mend that and check again, or look on the hosts: wg show, journalctl -u kilo-etcd"


def test_a_graph_is_coloured_by_what_either_end_says(mesh: Mesh) -> None:
    def edge(*arguments: str) -> str:
        output = mesh.run("graph", *arguments).output
        return next(line.strip() for line in output.splitlines() if '"gcp-1" -> "home-1"' in line)

    assert edge("--plain") == '"gcp-1" -> "home-1" [dir=both];'
    mesh.says["gcp-1"] = DiagnosticsResponse(
        time=now(), tunnels=(mesh.tunnel("home-1", 250), mesh.tunnel("laptop", 30))
    )
    # home-1 answers, and knows no such peer.
    assert 'color="#c62828"' in edge()
    assert 'label="last handshake 4 min ago"' in edge()
    mesh.says["home-1"] = DiagnosticsResponse(time=now(), tunnels=(mesh.tunnel("gcp-1", 9),))
    assert edge() == '"gcp-1" -> "home-1" [dir=both, color="#2e7d32", edgetooltip="last handshake 9 s ago"];'
    assert (
        '"gcp-1" -> "peer laptop"' not in mesh.run("graph").output or "handshake 30 s ago" in mesh.run("graph").output
    )
    mesh.silent = {"gcp-1", "home-1"}
    assert edge() == '"gcp-1" -> "home-1" [dir=both];'
    mesh.denied = True
    result = mesh.run("graph")
    assert result.exit_code == 0
    assert "kgctl: drawn without colours, since the hosts could not be asked: user eve may not" in result.stderr


def test_a_graph_in_other_hands(mesh: Mesh) -> None:
    mesh.says["gcp-1"] = DiagnosticsResponse(time=now(), tunnels=(mesh.tunnel("home-1", 5),))
    document = json.loads(mesh.run("graph", "-o", "json").stdout)
    assert document["internalIps"] == "off"
    assert {
        "one": "gcp-1",
        "other": "home-1",
        "kind": "tunnel",
        "up": True,
        "says": "last handshake 5 s ago",
    } in document["edges"]
    assert {"one": "gcp-1", "other": "gcp-2", "kind": "local", "up": None, "says": None} in document["edges"]
    assert [node["name"] for node in document["nodes"] if node["leader"]] == ["gcp-1", "home-1"]
    drawn = mesh.run("graph", "-o", "mermaid").stdout.splitlines()
    assert drawn[:4] == ["---", 'title: "10.4.0.0/16, fd04::/64; internal-ips off"', "---", "flowchart LR"]
    assert '        n0(["gcp-1<br>10.4.0.1, fd04::1"])' in drawn
    assert "    n0 <--> n3" in drawn
    assert any(line.strip().endswith("stroke:#2e7d32") for line in drawn)


def test_hosts_that_are_gone_are_grey_as_is_all_that_ends_at_them(mesh: Mesh) -> None:
    mesh.says["gcp-1"] = DiagnosticsResponse(time=now(), tunnels=(mesh.tunnel("home-1", 9),))
    mesh.etcd.delete("/kilo-status/by/home-1/status")
    drawn = mesh.run("graph").output.splitlines()
    (node,) = (line for line in drawn if line.strip().startswith('"home-1" ['))
    assert 'label=<<font point-size="17">home-1</font><font point-size="10"><br/>gone<br/>' in node
    assert 'fontcolor="#757575", style="filled,dashed", penwidth=3' in node
    (edge,) = (line.strip() for line in drawn if '"gcp-1" -> "home-1"' in line)
    assert edge == '"gcp-1" -> "home-1" [dir=both, style=dashed, color="#9e9e9e"];', "an old handshake proves nothing"
    assert all(text in "\n".join(drawn) for text in LEGEND)
    nodes = json.loads(mesh.run("graph", "-o", "json").stdout)["nodes"]
    assert {node["name"]: node["alive"] for node in nodes if not node["alive"]} == {"home-1": False}
    mermaid = mesh.run("graph", "-o", "mermaid").stdout
    assert "home-1<br>gone<br>" in mermaid
    assert "    class n3 gone\n" in mermaid
    # Who asks no host knows nothing of that.
    plain = mesh.run("graph", "--plain").output
    assert "gone" not in plain
    assert LEGEND[0] not in plain


def test_mermaid_takes_any_name(mesh: Mesh) -> None:
    mesh.etcd.put("/kilo/locations/home-1", 'a "b" <c>;#1;|')
    drawn = mesh.run("graph", "-o", "mermaid", "--plain").stdout
    assert 'subgraph s0["location: a #34;b#34; #60;c#62;#59;#35;1#59;#124;"]' in drawn


@pytest.mark.graphviz
def test_graphviz_draws(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    require("circo")
    assert b"<svg" in mesh.run("graph", "-o", "svg", "--plain").stdout_bytes
    assert mesh.run("graph", "-o", "png", "--plain").stdout_bytes.startswith(b"\x89PNG")
    monkeypatch.setenv("PATH", "/nowhere")
    result = mesh.run("graph", "-o", "svg")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "circo is not installed" in result.stderr


async def test_watching_shows_each_change_once(mesh: Mesh, monkeypatch: pytest.MonkeyPatch) -> None:
    from kilo_etcd.ctl.commands import status

    monkeypatch.setattr(status, "PAUSE_SECONDS", 0.01)
    shown: list[str] = []
    seen = trio.Event()

    def put_out(report: Report) -> None:
        shown.append(report.granularity)
        seen.set()

    async def next_one(change: Callable[[], object] = lambda: None) -> None:
        nonlocal seen
        seen = trio.Event()
        change()
        await seen.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(partial(status._follow, mesh.etcd.client(), KEYS, print_report=put_out, live=False))
        await next_one()
        await next_one(lambda: mesh.etcd.put("/kilo/mesh/granularity", "full"))
        # What changes nothing that is shown is not shown again, and etcd may be away for a while.
        mesh.etcd.put("/kilo-status/requests/12", "{}")
        mesh.etcd.down()
        await trio.sleep(0.1)
        mesh.etcd.up()
        await next_one(lambda: mesh.etcd.put("/kilo/mesh/granularity", "cross"))
        nursery.cancel_scope.cancel()
    assert list(dict.fromkeys(shown)) == ["location", "full", "cross"]


def test_words_for_times_and_amounts() -> None:
    assert [ago(value) for value in (None, 0, 119, 120, 7200, 200_000)] == [
        "never",
        "0 s",
        "119 s",
        "2 min",
        "2 h",
        "2 d",
    ]
    assert [amount(value) for value in (0, 1023, 1536, 5 << 30)] == ["0 B", "1023 B", "1.5 KiB", "5.0 GiB"]


def test_explain_is_held_against_the_kernels_on_the_way(mesh: Mesh) -> None:
    mesh.says["gcp-1"] = DiagnosticsResponse(time=now(), tunnels=(mesh.tunnel("home-1", 3),))
    result = mesh.run("explain", "gcp-2", "10.4.0.5", "--live")
    assert (result.exit_code, result.output.splitlines()[-1]) == (
        0,
        "The kernels of the hosts on the way hold what they should, and packets arrive.",
    )
    mesh.says["gcp-1"] = DiagnosticsResponse(
        time=now(), tunnels=(mesh.tunnel("home-1", 400),), trouble=("FORWARD drops",)
    )
    mesh.says["gcp-2"] = DiagnosticsResponse(time=now(), undone=1, changes=("ip route add 10.4.0.0/16 via 10.1.0.1",))
    # gcp-3 is not on the way.
    mesh.says["gcp-3"] = DiagnosticsResponse(time=now(), undone=9)
    mesh.silent = {"home-2"}
    result = mesh.run("explain", "gcp-2", "10.4.0.5", "--live", "-o", "json")
    assert result.exit_code == 1
    document = json.loads(result.stdout)
    (trace,) = document["traces"]
    # The echo was answered, whatever its tunnel says.
    assert (document["works"], trace["works"], trace["there"]["hops"][1]["broken"]) == (False, True, True)
    assert [(remark["node"], remark["text"]) for remark in document["live"]] == [
        ("home-2", "its agent lives, but has not answered in time"),
        ("gcp-1", "FORWARD drops"),
        ("gcp-2", "its kernel is not as planned: 1 change is missing: ip route add 10.4.0.0/16 via 10.1.0.1"),
        ("gcp-1", "its tunnel to home-1 has no session: last handshake 6 min ago"),
    ]
    assert json.loads(mesh.run("explain", "gcp-2", "10.4.0.5", "-o", "json").stdout)["live"] is None


def headline(mesh: Mesh, *arguments: str) -> tuple[int, str]:
    result = mesh.run("explain", *arguments, "--live")
    return result.exit_code, result.output.splitlines()[0].partition(": ")[2]


def test_explain_does_not_take_the_answer_of_a_host_in_another_ones_place_for_an_arrival(mesh: Mesh) -> None:
    mesh.says["gcp-1"] = DiagnosticsResponse(time=now(), tunnels=(mesh.tunnel("home-1", 3),))
    route = "10.4.0.5 local table 255"
    mesh.says["home-1"] = DiagnosticsResponse(
        time=now(), tunnels=(mesh.tunnel("gcp-1", 3),), routes=(TakenRoute("10.4.0.5", "", route, True),)
    )
    status, said = headline(mesh, "gcp-2", "home-2")
    assert status == 1
    assert said == f"does not arrive: the kernel of home-1 sends it by another route than the agent's: {route}"
    # What another host sends elsewhere, which is not on the way.
    assert headline(mesh, "gcp-2", "home-1")[0] == 0
    mesh.says["home-1"] = evolve(mesh.says["home-1"], routes=(TakenRoute("10.4.0.5", "", "10.4.0.5 dev eth7", True),))
    assert headline(mesh, "gcp-2", "home-2") == (
        1, "may not arrive: the kernel of home-1 sends it by another route than the agent's: 10.4.0.5 dev eth7"
    )  # fmt: skip


@pytest.mark.parametrize("cut", [3, 25])
def test_many_networks_that_a_firewall_drops_are_as_bad_as_few(mesh: Mesh, cut: int) -> None:
    networks = [ip_network(f"10.50.{number}.0/24") for number in range(cut)]
    mesh.etcd.put("/kilo/annotations/home-2/subnets", ",".join(map(str, networks)))
    mesh.says["gcp-1"] = DiagnosticsResponse(time=now(), tunnels=(mesh.tunnel("home-1", 3),))
    mesh.fails("home-2", f"{drops_packets_for(networks)}, in the chain f")
    for number in range(cut):
        said = f"does not arrive: the firewall of home-2 drops what is for 10.50.{number}.1, or the answers"
        assert headline(mesh, "gcp-2", f"10.50.{number}.1") == (1, said)
    # Which of those that it does not name it drops cannot be told.
    if cut > 20:
        named = drops_packets_for(network for network in networks if str(network) != "10.50.9.0/24")
        mesh.fails("home-2", f"{named}, in the chain f")
        for number in range(cut):
            status, said = headline(mesh, "gcp-2", f"10.50.{number}.1")
            assert status == 1
            assert said.startswith("does not arrive" if f"10.50.{number}.0/24" in named else "may not arrive")


def test_the_headline_follows_from_the_worst_that_is_found(mesh: Mesh) -> None:
    mesh.says["gcp-1"] = DiagnosticsResponse(time=now(), tunnels=(mesh.tunnel("home-1", 3),))
    assert headline(mesh, "gcp-2", "home-2") == (0, "arrives; the answer takes the same way")
    dropped = drops_packets_for([ip_network("10.4.0.5/32")])
    for answer, said in (
        (DiagnosticsResponse(time=now(), refused=("the firewall drops all TCP packets",)), "home-2"),
        (DiagnosticsResponse(time=now(), small_only=("10.4.0.2",), mtu=1420), "gcp-2, and on home-2"),
    ):
        mesh.says["home-2"] = answer
        says = f"echo requests arrive, but other packets may not: see what is wrong on {said}"
        assert headline(mesh, "gcp-2", "home-2") == (1, says)
    del mesh.says["home-2"]
    mesh.says["home-1"] = DiagnosticsResponse(
        time=now(), tunnels=(mesh.tunnel("gcp-1", 3),), trouble=(f"{dropped}, in the chain f",)
    )
    assert headline(mesh, "gcp-2", "home-2")[1].startswith("echo requests arrive, but other packets may not: ")
    assert headline(mesh, "gcp-2", "home-1") == (0, "arrives; the answer takes the same way"), "others' packets"
    mesh.lost = lambda source, target: "home-2" in (source, target)
    assert headline(mesh, "gcp-2", "home-2") == (
        1, "does not arrive: the firewall of home-1 drops what is for 10.4.0.5, or the answers"
    )  # fmt: skip


def test_what_was_not_tried_is_not_said_to_arrive(mesh: Mesh) -> None:
    mesh.says["gcp-1"] = DiagnosticsResponse(time=now(), tunnels=(mesh.tunnel("home-1", 3),))
    mesh.old = set(mesh.snapshot.nodes)
    assert headline(mesh, "gcp-2", "home-2") == (
        0, "should arrive, but was not tried; the answer takes the same way"
    )  # fmt: skip


def test_check_does_not_praise_a_prefix_without_a_mesh(mesh: Mesh) -> None:
    result = mesh.run("--prefix", "/typo", "check")
    assert result.exit_code == 1
    assert "no node has registered under this prefix" in result.output


def test_check_has_nothing_to_say_of_a_good_mesh(mesh: Mesh) -> None:
    mesh.says["gcp-1"] = DiagnosticsResponse(time=now(), tunnels=(mesh.tunnel("home-1", 3),))
    result = mesh.run("check")
    assert (result.exit_code, result.output) == (
        0,
        "All is well: etcd, records, agents, kernels, tunnels and packets.\n",
    )


def test_check_finds_what_is_wrong_and_says_what_to_do(mesh: Mesh) -> None:
    mesh.says["gcp-1"] = DiagnosticsResponse(
        time=now() - 60_000, tunnels=(), mtu=1420, backend="userspace", trouble=("FORWARD drops; let it pass",)
    )
    mesh.says["home-1"] = DiagnosticsResponse(time=now(), mtu=1380, undone=2, changes=("ip link set kilo0 up",))
    mesh.silent = {"gcp-3"}
    mesh.etcd.delete("/kilo-status/by/home-2/status")
    mesh.etcd.put("/kilo/peers/phone", "{}")
    result = mesh.run("check", "-o", "json")
    assert result.exit_code == 1
    said = {(f["severity"], f["subject"]): (f["text"], f["remedy"]) for f in json.loads(result.stdout)}
    text, remedy = said["error", "gcp-1 - home-1"]
    assert text == "no tunnel between them: no handshake yet"
    assert "UDP 203.0.113.1:51820 to gcp-1 and UDP 203.0.113.4:51820 to home-1" in remedy
    assert said["error", "gcp-1"] == ("FORWARD drops; let it pass", "")
    assert said["warning", "gcp-1"][0] == "its clock is 60 s behind this machine's"
    assert "not as planned: 2 changes are missing, the first: ip link set" in said["warning", "home-1"][0]
    assert "kgctl node forget home-2" in said["warning", "home-2"][1]
    assert said["warning", "gcp-3"][0] == "its agent lives, but has not answered in time"
    assert said["error", "/kilo/peers/phone"][0].startswith("rejected: ")
    assert said["note", "tunnels"][0] == "their MTUs differ: 1380 bytes on 1 host, 1420 bytes on 2 hosts"
    assert said["note", "agents"][0] == "WireGuard runs in userspace, which is slower, on gcp-1"
    mesh.says["home-1"] = evolve(mesh.says["home-1"], time=now())
    plain = mesh.run("check").output.splitlines()
    assert plain[-1] == "3 errors, 8 warnings, 2 notes"
    assert plain[0] == "error: /kilo/peers/phone: rejected: the field publicKey is missing"
    assert plain[1] == "    etcdctl get /kilo/peers/phone; put it right or delete it"
    kinds = [line.split(":")[0] for line in plain[:-1] if not line.startswith(" ")]
    assert kinds == ["error"] * 3 + ["warning"] * 8 + ["note"] * 2


def test_check_names_an_error_once_that_hosts_report_in_two_ways(mesh: Mesh) -> None:
    off = failure(SetForwarding(4, "kilo0"), OSError(EROFS, "Read-only file system")).text
    pings = failure(AllowPings(0), OSError(EROFS, "Read-only file system")).text
    for name in ("gcp-2", "gcp-3"):
        mesh.fails(name, "FORWARD drops; let it pass", off)
        mesh.says[name] = DiagnosticsResponse(
            time=now(),
            trouble=(
                "FORWARD drops; let it pass",
                pings,
                "net.ipv4.conf.kilo0.forwarding is 0, so nothing is forwarded",
            ),
        )
    found = [(one["subject"], one["text"]) for one in json.loads(mesh.run("check", "-o", "json").stdout)]
    for text in ("FORWARD drops; let it pass", off, pings):
        assert [subject for subject, said in found if said == text] == ["gcp-2, gcp-3"], text
    assert not [said for _, said in found if "kilo0.forwarding is 0" in said]


def test_check_asks_whether_the_name_is_right_of_what_is_said_of_nodes_that_are_not_there(mesh: Mesh) -> None:
    mesh.etcd.put("/kilo/locations/gcp-11", "gcp")
    mesh.etcd.put("/kilo/annotations/gcp-12/leader", "true")
    mesh.etcd.put("/kilo/annotations/gcp-1/leader", "true")
    found = json.loads(mesh.run("check", "-o", "json").stdout)
    (note,) = (one for one in found if one["subject"] == "labels and annotations")
    assert note["severity"] == "note"
    assert note["text"].startswith("gcp-11, gcp-12 have labels or annotations and no record: is the name right?")


def test_check_names_who_claims_addresses_without_a_record(mesh: Mesh) -> None:
    for number in range(5):
        mesh.etcd.put(f"/kilo/by/evil/addresses/10.4.7.{number}", "")
    mesh.etcd.put("/kilo/by/autoscaled-7/addresses/10.4.8.1", "")
    every = json.loads(mesh.run("check", "-o", "json").stdout)
    found = [one for one in every if "claim" in one["text"]]
    assert [(one["severity"], one["subject"]) for one in found] == [("warning", "evil"), ("note", "claims")]
    assert found[0]["text"].startswith("it claims 5 mesh addresses, which no other host can have")
    assert "kgctl node forget evil" in found[0]["remedy"]
    assert "are claimed by autoscaled-7, which are not registered" in found[1]["text"]


def test_check_does_not_ask_an_operator_to_mend_what_an_agent_writes(mesh: Mesh) -> None:
    mesh.etcd.put("/kilo/by/home-1/elections/gcp", '{"rank":0}')
    mesh.etcd.put("/kilo/by/home-9/node", "{}")
    mesh.etcd.put("/kilo/annotations/home-1/subnets", "10.x")
    said = {f["subject"]: f["remedy"] for f in json.loads(mesh.run("check", "-o", "json").stdout)}
    for key, name in (("/kilo/by/home-1/elections/gcp", "home-1"), ("/kilo/by/home-9/node", "home-9")):
        assert "put it right" not in said[key]
        assert said[key].startswith(f"etcdctl get {key}; the agent of {name} writes it")
        assert said[key].endswith(f"etcdctl del {key}")
    assert "put it right" in said["/kilo/annotations/home-1/subnets"]


def test_check_does_not_ask_for_ports_that_a_nat_has_not(mesh: Mesh) -> None:
    mesh.says["gcp-1"] = DiagnosticsResponse(time=now(), tunnels=())
    for name in ("gcp-1", "home-1"):
        mesh.etcd.put(f"/kilo/annotations/{name}/force-endpoint", "192.168.77.7:51820")
    said = {f["subject"]: f["remedy"] for f in json.loads(mesh.run("check", "-o", "json").stdout)}
    assert "192.168.77.7" not in said["gcp-1 - home-1"]
    assert said["gcp-1 - home-1"].startswith("let a host with a public endpoint lead the location of one of them")


def test_check_of_etcds_members() -> None:
    from kilo_etcd.ctl.commands.check import MemberState, Severity, _etcd

    members = (
        MemberState(endpoint="a:2379", error="a:2379 refused the connection"),
        MemberState(endpoint="b:2379", cluster_id=1, has_leader=False, errors=("memberID:1 alarm:NOSPACE",)),
        MemberState(endpoint="c:2379", cluster_id=2, seconds=0.7),
    )
    texts = [finding.text for finding in _etcd(members)]
    assert texts == [
        "a:2379 refused the connection",
        "it has no leader, so nothing can be written",
        "it raises an alarm: memberID:1 alarm:NOSPACE",
        "it took 0.7 s to answer",
        "the endpoints belong to different clusters",
    ]
    assert list(_etcd((MemberState(endpoint="a:2379", cluster_id=1),))) == []
    (large,) = _etcd((MemberState(endpoint="a:2379", cluster_id=1, db_in_use=3 << 29),))
    assert large.severity is Severity.NOTE
    assert large.text.startswith("1,536 MiB of its database are in use")
    assert "2,048 MiB unless --quota-backend-bytes" in large.text
    assert large.remedy.startswith("etcdctl compact REVISION, then etcdctl defrag")


@pytest.mark.etcd
async def test_check_judges_etcds_database_by_what_is_in_use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its file keeps its size when revisions are forgotten, and what is free in it is filled first."""
    from kilo_etcd.ctl.commands import check

    require("etcd")
    monkeypatch.setattr(check, "DEFAULT_QUOTA", 2 << 20)
    async with EtcdServer.run() as server, open_client(server.config()) as client:

        async def found() -> list[str]:
            return [finding.text for finding in check._etcd(await check._members(client, server.config()))]

        assert await found() == []
        for _ in range(30):
            revision = (await client.put("/z", "x" * 100_000)).header.revision

        async def full() -> bool:
            return "MiB of its database are in use" in "".join(await found())

        await eventually(full, 10)
        await client.compact(revision)

        async def free() -> bool:
            await client.put("/z", "")  # etcd counts anew with a write.
            return await found() == []

        await eventually(free, 20)
        assert (await client.status()).db_size > 1 << 20


@pytest.mark.etcd
async def test_check_asks_for_compaction_if_etcd_has_never_forgotten_a_revision(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kilo_etcd.ctl.commands import check

    monkeypatch.setattr(check, "MANY_REVISIONS", 10)
    require("etcd")
    async with EtcdServer.run() as server, open_client(server.config()) as client:
        keys = Keys("/kilo")
        revision = (await client.put("/kilo/a", "1")).header.revision
        assert await check._uncompacted(client, keys, revision) == 0
        for number in range(10):
            revision = (await client.put("/kilo/a", str(number))).header.revision
        assert await check._uncompacted(client, keys, revision) == revision
        (finding,) = check._etcd((), revision)
        assert finding.text.startswith(f"it has not compacted any of its {revision} revisions yet")
        assert finding.remedy.startswith("unless --auto-compaction-retention is set already, start etcd with")
        await client.compact(revision)
        assert await check._uncompacted(client, keys, revision) == 0


async def test_check_needs_no_answer_on_old_revisions(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user may be denied that, or etcd go away."""
    from kilo_etcd.ctl.commands import check

    client = FakeEtcd().client()

    async def denied(*_arguments: object, **_more: object) -> None:
        raise PermissionDenied("etcd denies user 'kilo' to read /kilo/adopted")

    monkeypatch.setattr(client, "range", denied)
    assert await check._uncompacted(client, Keys("/kilo"), check.MANY_REVISIONS) == 0


async def _checked(config: Config, members: dict[str, str], alive: set[str]) -> list[tuple[str, str]]:
    """Severity and subject of what check finds at etcd, whose `members` have these client URLs."""
    from kilo_etcd.ctl.commands.check import _etcd, _members

    class Etcd(FakeClient):
        async def status(self, endpoint: str | None = None) -> Status:
            if endpoint not in alive:
                raise Unavailable(f"cannot reach etcd at {endpoint}: connection refused")
            return await super().status(endpoint)

    etcd = FakeEtcd()
    etcd.members = tuple(
        Member(id=number, name=name, peer_urls=(), client_urls=(url,), is_learner=False)
        for number, (name, url) in enumerate(members.items())
    )
    return [(finding.severity, finding.subject) for finding in _etcd(await _members(Etcd(etcd), config))]


async def test_check_asks_etcds_members_where_the_agent_follows_them() -> None:
    given = Config(endpoints=("10.0.0.1:2379",), more_endpoints=("http://10.0.0.8:2379",))
    a, b = "http://10.0.0.8:2379", "http://10.0.0.9:2379"
    members = {"a": a, "b": b}
    assert await _checked(given, members, {a, b}) == [("note", "etcd 10.0.0.1:2379")]
    assert await _checked(given, members, {a}) == [("error", f"etcd {b}"), ("note", "etcd 10.0.0.1:2379")]
    # A given endpoint that is a member's is asked once, as that.
    assert await _checked(evolve(given, endpoints=("10.0.0.9:2379",)), members, {a}) == [("error", f"etcd {b}")]
    # The member without a usable URL may be the one that is given.
    assert await _checked(given, {"a": a, "b": "http://localhost:2379"}, {a}) == [("error", "etcd 10.0.0.1:2379")]
    # The list is of no use, so the copy counts.
    assert await _checked(given, {}, set()) == [("error", f"etcd {a}"), ("note", "etcd 10.0.0.1:2379")]
    alone = evolve(given, more_endpoints=())
    assert await _checked(alone, members, {a, b}) == [("error", "etcd 10.0.0.1:2379")]


def test_check_and_explain_name_the_leader_that_passes_nothing_on(mesh: Mesh) -> None:
    mesh.says["gcp-1"] = DiagnosticsResponse(
        time=now(),
        tunnels=(mesh.tunnel("home-1", 3),),
        possible_obstacles=("the chain forward of nftables table inet x",),
    )
    inside = {"gcp-2", "gcp-3"}
    mesh.lost = lambda source, target: len({source, target} & inside) == 1 and "gcp-1" not in (source, target)
    result = mesh.run("check", "-o", "json")
    assert result.exit_code == 1
    (finding,) = json.loads(result.stdout)
    assert (finding["severity"], finding["subject"]) == ("error", "gcp-1")
    assert finding["text"] == (
        "it leads its location and does not forward: through it nothing arrives between gcp-2, gcp-3 and home-1, home-2"
    )
    assert finding["remedy"] == "the chain forward of nftables table inet x"
    result = mesh.run("explain", "gcp-2", "home-1", "--live")
    assert result.exit_code == 1
    assert result.output.splitlines()[0].endswith("may not arrive: none of the echo requests of gcp-2 was answered")
    between = "gcp-2, gcp-3 and home-1, home-2"
    assert f"through it nothing arrives between {between}" in " ".join(result.output.split()), "all hosts try it"
    # It suggests everything but itself.
    mesh.says["gcp-1"] = DiagnosticsResponse(time=now(), tunnels=(mesh.tunnel("home-1", 3),))
    assert json.loads(mesh.run("check", "-o", "json").stdout)[0]["remedy"].endswith("kgctl explain gcp-2 home-1 --live")
    assert "--live" not in mesh.run("explain", "gcp-2", "home-1", "--live").output


def test_check_and_explain_name_what_a_leader_may_drop_although_echo_requests_arrive(mesh: Mesh) -> None:
    text = "the firewall may drop TCP and UDP packets that this host forwards"
    mesh.says["gcp-1"] = DiagnosticsResponse(
        time=now(),
        tunnels=(mesh.tunnel("home-1", 3),),
        possible_obstacles=(text,),
        untested_obstacles=(text,),
    )
    result = mesh.run("check", "-o", "json")
    assert result.exit_code == 1
    (finding,) = json.loads(result.stdout)
    assert (finding["severity"], finding["subject"]) == ("warning", "gcp-1")
    assert finding["text"].endswith(f"not all packets: {text}")
    result = mesh.run("explain", "gcp-2", "home-1", "--live", "-o", "json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["live"] == [{"node": "gcp-1", "text": text}]
    # It forwards nothing of what it sends itself.
    assert mesh.run("explain", "gcp-1", "home-1", "--live").exit_code == 0
    # An error that names it is enough.
    inside = {"gcp-2", "gcp-3"}
    mesh.lost = lambda source, target: len({source, target} & inside) == 1 and "gcp-1" not in (source, target)
    (finding,) = json.loads(mesh.run("check", "-o", "json").stdout)
    assert (finding["severity"], finding["remedy"]) == ("error", text)


def test_check_and_explain_name_what_a_hosts_own_firewall_drops(mesh: Mesh) -> None:
    lost, refused = "drops all UDP packets that go out", "drops all TCP packets that come in"
    mesh.says["gcp-1"] = DiagnosticsResponse(time=now(), tunnels=(mesh.tunnel("home-1", 3),))
    mesh.says["gcp-2"] = DiagnosticsResponse(time=now(), own_losses=(lost,), refused=(refused,))
    result = mesh.run("check", "-o", "json")
    found = [(one["severity"], one["subject"], one["text"]) for one in json.loads(result.stdout)]
    assert (result.exit_code, found) == (1, [("warning", "gcp-2", lost), ("note", "gcp-2", refused)])
    for ends in (("gcp-2", "home-1"), ("home-1", "gcp-2")):
        result = mesh.run("explain", *ends, "--live", "-o", "json")
        assert result.exit_code == 1
        assert json.loads(result.stdout)["live"] == [{"node": "gcp-2", "text": text} for text in (lost, refused)]
    # It is on no other way.
    assert mesh.run("explain", "gcp-1", "home-1", "--live").exit_code == 0
    mesh.says["gcp-2"] = DiagnosticsResponse(time=now(), refused=(refused,))
    assert mesh.run("check").exit_code == 0, "a firewall may mean it"


def test_explain_does_not_take_for_good_what_the_agents_status_names_too(mesh: Mesh) -> None:
    text = "the firewall drops UDP packets that this host forwards"
    mesh.says["gcp-1"] = DiagnosticsResponse(time=now(), tunnels=(mesh.tunnel("home-1", 3),), trouble=(text,))
    for remarks in ([], [text]):
        mesh.fails("gcp-1", *remarks)
        result = mesh.run("explain", "gcp-2", "home-1", "--live", "-o", "json")
        found = json.loads(result.stdout)
        assert (result.exit_code, found["works"]) == (1, False)
        assert [remark["text"] for remark in (*found["remarks"], *found["live"])] == [text], "it is said once"
    output = mesh.run("explain", "gcp-2", "home-1", "--live").output
    assert "hold what they should" not in output


def test_check_names_agents_that_have_not_applied_a_deletion(mesh: Mesh) -> None:
    def behind() -> set[str]:
        every = json.loads(mesh.run("check", "-o", "json").stdout)
        return {finding["subject"] for finding in every if "it has applied revision" in finding["text"]}

    assert behind() == set()
    mesh.etcd.delete("/kilo/peers/laptop")
    assert behind() == set(mesh.snapshot.nodes)


def test_check_names_what_probers_report_only_if_it_finds_no_cause(mesh: Mesh) -> None:
    def found() -> list[tuple[str, str, str]]:
        every = json.loads(mesh.run("check", "-o", "json").stdout)
        # Nobody has applied the revision of the report.
        findings = [finding for finding in every if "it has applied revision" not in finding["text"]]
        return [(finding["severity"], finding["subject"], finding["text"].partition(";")[0]) for finding in findings]

    probed(mesh.etcd, "gcp-2", "gcp-1", "home-1")
    text = "through it packets do not arrive: gcp-2 gets no answer from home-1"
    mesh.says["gcp-1"] = DiagnosticsResponse(time=now(), tunnels=(mesh.tunnel("home-1", 3),))
    assert found() == [("warning", "gcp-1", text)]
    mesh.says["gcp-1"] = DiagnosticsResponse(time=now(), tunnels=(mesh.tunnel("home-1", -1),))
    mesh.lost = lambda source, target: source[:3] != target[:3]
    assert found() == [("error", "gcp-1 - home-1", "no tunnel between them: no handshake yet")]


def test_explain_names_another_route_for_the_traced_address_and_not_for_others() -> None:
    topology = build_topology(evolve(arrivals_mesh().snapshot, subnets=(ip_network("10.4.0.0/16"),)))
    plans = Plans(topology, {})
    traces = explain(plans, "a2", "b2")
    address = str(topology.snapshot.nodes["b2"].mesh_addresses[0])

    def named(*routes: TakenRoute) -> list[str]:
        live = Live(answers={"a2": DiagnosticsResponse(reached=(address,), routes=routes)})
        return [text for name, text in suspicions(traces, topology, {}, live, {"a2", "a1", "b1", "b2"}) if name == "a2"]

    (text,) = named(TakenRoute(address, "", "none: Invalid argument", True))
    assert "its kernel sends packets for" in text
    assert named(TakenRoute("10.4.0.6", "", "none: Invalid argument", True)) == [], "the traced packet arrives"


def test_explain_says_that_packets_arrive_only_if_they_were_seen_to(mesh: Mesh) -> None:
    mesh.says["gcp-1"] = DiagnosticsResponse(time=now(), tunnels=(mesh.tunnel("home-1", 3),))
    result = mesh.run("explain", "gcp-2", "home-1", "--live")
    assert (result.exit_code, result.output.splitlines()[-1][-20:]) == (0, " and packets arrive.")
    mesh.says["gcp-1"] = DiagnosticsResponse(time=now(), tunnels=(mesh.tunnel("home-1", 3), mesh.tunnel("laptop", 3)))
    result = mesh.run("explain", "gcp-2", "laptop", "--live")
    assert (result.exit_code, result.output.splitlines()[-1].partition(";")[2]) == (
        0,
        " gcp-2 did not try whether packets arrive.",
    )
    mesh.says["gcp-1"] = DiagnosticsResponse(time=now(), tunnels=(mesh.tunnel("home-1", 3), mesh.tunnel("laptop", -1)))
    result = mesh.run("explain", "gcp-2", "laptop", "--live")
    assert (result.exit_code, result.output.splitlines()[0]) == (
        1,
        "gcp-2 (10.4.0.2) to 10.9.0.2: does not arrive: the tunnel between gcp-1 and peer laptop has no session: no "
        "handshake yet",
    )
    # Nobody asks whose agent does not live, and so it answers for nobody.
    mesh.etcd.delete("/kilo-status/by/home-1/status")
    mesh.lost = lambda source, target: target == "home-1"
    result = mesh.run("explain", "gcp-2", "home-1", "--live")
    assert result.exit_code == 1
    assert result.output.splitlines()[0].endswith("may not arrive: none of the echo requests of gcp-2 was answered")
    assert "home-1 its agent does not report: is the host up?" in " ".join(result.output.split())


def test_agents_that_do_not_know_how_to_try_are_named_and_nothing_is_claimed_of_packets(mesh: Mesh) -> None:
    mesh.says["gcp-1"] = DiagnosticsResponse(time=now(), tunnels=(mesh.tunnel("home-1", 3),))
    mesh.old = set(mesh.snapshot.nodes)
    result = mesh.run("check")
    assert result.exit_code == 0
    assert "note: packets: gcp-1, gcp-2, gcp-3, home-1, home-2 sent no echo requests" in result.output
    assert "All is well" not in result.output
    mesh.says["gcp-2"] = DiagnosticsResponse(time=now(), trouble=(cannot_ping(PermissionError()),))
    mesh.says["gcp-3"] = DiagnosticsResponse(time=now(), trouble=(cannot_ping(OSError(ENODEV, "No such device")),))
    result = mesh.run("check")
    assert (
        "note: packets: gcp-2, gcp-3 cannot ping, so it is not known whether packets from there arrive" in result.output
    )
    assert "note: packets: gcp-1, home-1, home-2 sent no echo requests" in result.output
    del mesh.says["gcp-2"]
    said = mesh.run("explain", "gcp-2", "10.4.0.5", "--live").output.splitlines()[-1]
    assert (
        said == "The kernels of the hosts on the way hold what they should; gcp-2 did not try whether packets arrive."
    )
