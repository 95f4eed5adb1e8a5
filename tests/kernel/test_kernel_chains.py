"""Which forward chains drop mesh packets: firewalls as people have them, followed as the kernel does."""

from __future__ import annotations

import errno
import shutil
import struct
import time
from collections.abc import Iterable
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path

import pytest
import trio
from attrs import evolve
from kernel_worlds import PRIVATE
from test_kernel_forward import LEADER as PLAN
from test_kernel_forward import sh

from kilo_etcd.agent.obstacle_watch import OBSTACLES_PAUSE, OBSTACLES_PERIOD
from kilo_etcd.kernel import cleanup, ipvs, open_kernel
from kilo_etcd.kernel.firewall import destinations, hooks, iptables
from kilo_etcd.kernel.firewall.chains import (
    BaseChain,
    Condition,
    FilterRule,
    Obstacle,
    Packet,
    drops,
    from_iptables,
    obstacles,
    packets,
    translates,
    translation_from_iptables,
)
from kilo_etcd.kernel.firewall.destinations import OwnAddresses
from kilo_etcd.kernel.firewall.forwardchains import ForwardChains
from kilo_etcd.kernel.firewall.iptables import Iptables
from kilo_etcd.kernel.firewall.netfilter import Netfilter
from kilo_etcd.kernel.netlink.codec import UNREADABLE
from kilo_etcd.kernel.read.hooks import _INTERVAL, MOST_MEMBERS, MOST_TARGETS, _ranges
from kilo_etcd.kernel.state import Setup
from kilo_etcd.model import IPNetwork
from kilo_etcd.model.hostplan import RoutePlan, Via
from kilo_etcd.planning.dropped import dropped_networks

MESH = (ip_network("10.4.0.0/16"),)
LEADER = evolve(PLAN, unreachable_routes=MESH)
OUT, BACK = Packet(4, "kilo0", "eth0", MESH), Packet(4, "eth0", "kilo0", MESH)

DOCKER = """\
-P FORWARD DROP
-N DOCKER
-N DOCKER-USER
-N DOCKER-ISOLATION-STAGE-1
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -o docker0 -j DOCKER
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j RETURN
-A DOCKER-ISOLATION-STAGE-1 -j RETURN
-A DOCKER-USER -j RETURN
"""
UFW = """\
-P FORWARD DROP
-N ufw-before-forward
-N ufw-after-forward
-N ufw-user-forward
-A FORWARD -j ufw-before-forward
-A FORWARD -j ufw-after-forward
-A ufw-before-forward -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-forward -p icmp -m icmp --icmp-type 8 -j ACCEPT
-A ufw-before-forward -j ufw-user-forward
"""
KUBERNETES = """\
-P FORWARD ACCEPT
-N KUBE-FORWARD
-A FORWARD -m comment --comment "kubernetes forwarding rules" -j KUBE-FORWARD
-A KUBE-FORWARD -m conntrack --ctstate INVALID -j DROP
-A KUBE-FORWARD -m mark --mark 0x4000/0x4000 -j ACCEPT
"""


@pytest.mark.parametrize(
    ("printed", "out", "back"),
    [
        ("-P FORWARD ACCEPT", False, False),
        ("-P FORWARD DROP", True, True),
        (DOCKER, True, True),
        (DOCKER + "-A DOCKER-USER -i kilo0 -j ACCEPT\n", True, True),  # after its return
        (DOCKER.replace("-A DOCKER-USER", "-A DOCKER-USER -i kilo0 -j ACCEPT\n-A DOCKER-USER"), False, True),
        (UFW, None, None),  # echo requests pass, and who knows what else
        (UFW + "-A ufw-user-forward -i kilo0 -j ACCEPT\n-A ufw-user-forward -o kilo0 -j ACCEPT\n", False, False),
        (KUBERNETES, False, False),
        ("-P FORWARD DROP\n-A FORWARD -i kilo+ -j ACCEPT", False, True),
        ("-P FORWARD DROP\n-A FORWARD -s 10.0.0.0/8 -d 10.0.0.0/8 -j ACCEPT", False, False),
        ("-P FORWARD DROP\n-A FORWARD -s 192.168.0.0/16 -j ACCEPT", True, True),
        ("-P FORWARD DROP\n-A FORWARD -s 10.4.1.0/24 -j ACCEPT", None, None),
        ("-P FORWARD DROP\n-A FORWARD -s 10.4.0.1/255.255.0.255 -j ACCEPT", None, None),
        ("-P FORWARD ACCEPT\n-A FORWARD -j REJECT --reject-with icmp-host-prohibited", True, True),
        ("-P FORWARD ACCEPT\n-A FORWARD -i eth0 -j REJECT --reject-with icmp-host-prohibited", False, True),
        ("-P FORWARD ACCEPT\n-A FORWARD -d 10.4.1.1/32 -j DROP", False, False),  # somebody's own wish
        ("-P FORWARD DROP\n-A FORWARD -j LOG\n-A FORWARD -m set --match-set x src -j ACCEPT", None, None),
        ("-P FORWARD DROP\n-A FORWARD -m set --match-set new src -j ACCEPT", None, None),
        ("-P FORWARD DROP\n-A FORWARD -m conntrack --ctstate RELATED,ESTABLISHED,UNTRACKED -j ACCEPT", None, None),
        ("-P FORWARD ACCEPT\n-A FORWARD -m conntrack ! --ctstate RELATED,ESTABLISHED,UNTRACKED -j DROP", True, True),
        ("-P FORWARD DROP\n-A FORWARD -m conntrack ! --ctstate UNTRACKED -j ACCEPT", False, False),
        ("-P FORWARD ACCEPT\n-N Y\n-A FORWARD -m mark --mark 0x0 -g Y\n-A FORWARD -j DROP", None, None),
    ],
)  # fmt: skip
def test_what_iptables_says_of_its_chain(printed: str, out: bool | None, back: bool | None) -> None:
    chain = from_iptables(printed, 4)
    assert chain is not None
    assert (drops(chain, OUT), drops(chain, BACK)) == (out, back)
    assert drops(chain, Packet(6, "kilo0", "eth0")) is False


def test_the_sentence_says_how_certain_it_is_and_whose_firewall_it_is() -> None:
    ufw = from_iptables(UFW, 4)
    assert ufw is not None
    (obstacle,) = obstacles([ufw], packets("kilo0", ["eth0"], [4], MESH), "kilo0", opening=False)
    assert obstacle.certain, "echo requests pass, and nothing else"
    where = "between kilo0 and eth0 (IPv4), in iptables' chain FORWARD (its policy is to drop)"
    mend = "ufw route allow in on kilo0 && ufw route allow out on kilo0"
    assert obstacle.text == f"the firewall drops TCP and UDP packets that this host forwards {where}: {mend}"
    marked = from_iptables(UFW + "-A ufw-user-forward -m mark --mark 7 -j ACCEPT\n", 4)
    assert marked is not None
    (obstacle,) = obstacles([marked], packets("kilo0", ["eth0"], [4], MESH), "kilo0", opening=False)
    assert not obstacle.certain
    assert obstacle.text == f"the firewall may drop what this host forwards {where}: {mend}"


@pytest.mark.parametrize(
    ("hook", "devices", "rule", "remedy"),
    [
        ("prerouting", (), (), "the mesh's packets that come in by eth0 and by kilo0"),
        ("prerouting", (), (Condition("iif", "kilo0"),), "the mesh's packets that come in by kilo0"),
        ("ingress", ("eth0",), (), "the mesh's packets that come in by eth0"),
        ("egress", ("eth0", "eth7"), (), "the mesh's packets that go out by eth0"),
        ("postrouting", (), (), "what comes in by kilo0 and what goes out by kilo0"),
    ],
)
def test_the_remedy_names_the_devices_whose_packets_are_dropped(
    hook: str, devices: tuple[str, ...], rule: tuple[Condition, ...], remedy: str
) -> None:
    rules = (FilterRule(conditions=rule, verdict="drop"),)
    chain = BaseChain(family="inet", table="t", name="f", drops=False, hook=hook, devices=devices, rules=rules)
    (obstacle,) = obstacles([chain], packets("kilo0", ["eth0"], [4], MESH), "kilo0", opening=False)
    assert obstacle.text.endswith(f": let through {remedy} there")


@pytest.mark.parametrize("hook", ["ingress", "egress"])
def test_a_chain_whose_devices_are_gone_drops_nothing(hook: str) -> None:
    chain = BaseChain(family="netdev", table="t", name="f", drops=True, hook=hook)
    assert [drops(chain, packet) for packet in (OUT, BACK)] == [False, False]
    assert [drops(evolve(chain, devices=("kilo0",)), packet) for packet in (OUT, BACK)] == (
        [True, False] if hook == "ingress" else [False, True]
    )


@pytest.mark.parametrize(
    ("printed", "dropped", "doubtful", "what"),
    [
        ("-P FORWARD DROP\n-A FORWARD -p icmp -j ACCEPT", "tcp udp", "", "drops TCP and UDP packets"),
        ("-P FORWARD DROP\n-A FORWARD -p icmp -m icmp --icmp-type 8 -j ACCEPT", "tcp udp", "icmp",
         "drops TCP and UDP packets"),
        ("-P FORWARD DROP\n-A FORWARD -p 6 -j ACCEPT\n-A FORWARD -p 17 -j ACCEPT", "icmp", "", "drops ICMP packets"),
        ("-P FORWARD DROP\n-A FORWARD ! -p tcp -j ACCEPT", "tcp", "", "drops TCP packets"),
        ("-P FORWARD DROP\n-A FORWARD ! -p udp -j ACCEPT", "udp", "", "drops UDP packets"),
        ("-P FORWARD DROP\n-A FORWARD -p all -j ACCEPT", "", "", ""),
        ("-P FORWARD DROP\n-A FORWARD -p tcp -m tcp --dport 22 -j ACCEPT", "udp icmp", "tcp",
         "drops UDP and ICMP packets, and may drop TCP packets,"),
        ("-P FORWARD DROP\n-A FORWARD -p icmp -j ACCEPT\n-A FORWARD -p tcp -m tcp --dport 22 -j ACCEPT", "udp", "tcp",
         "drops UDP packets, and may drop TCP packets,"),
        ("-P FORWARD DROP\n-A FORWARD -p icmp -j ACCEPT\n-A FORWARD -p tcp -m tcp --dport 22 -j ACCEPT\n"
         "-A FORWARD -p udp -m udp --dport 53 -j ACCEPT", "", "tcp udp", "may drop TCP and UDP packets"),
        ("-P FORWARD DROP\n-A FORWARD -p tcp -j ACCEPT\n-A FORWARD -p udp -j ACCEPT\n"
         "-A FORWARD -p icmp -m icmp --icmp-type 8 -j ACCEPT", "", "icmp", "may drop ICMP packets"),
        ("-P FORWARD DROP\n-A FORWARD -p gre -j ACCEPT", "tcp udp icmp", "", "drops what"),
        ("-P FORWARD DROP\n-A FORWARD -m mark --mark 7 -j ACCEPT", "", "tcp udp icmp", "may drop what"),
        ("-P FORWARD ACCEPT\n-A FORWARD -p tcp -j REJECT --reject-with tcp-reset", "tcp", "", "drops TCP packets"),
        ("-P FORWARD ACCEPT\n-A FORWARD -p tcp -m tcp --dport 25 -j DROP", "", "", ""),
    ],
)  # fmt: skip
def test_protocols_are_told_apart(printed: str, dropped: str, doubtful: str, what: str) -> None:
    chain = from_iptables(printed, 4)
    assert chain is not None
    sent = packets("kilo0", ["eth0"], [4], MESH)
    certain, perhaps = set(dropped.split()), set(doubtful.split())
    assert {packet.protocol for packet in sent if drops(chain, packet)} == certain
    assert {packet.protocol for packet in sent if drops(chain, packet) is None} == perhaps
    found = obstacles([chain], sent, "kilo0", opening=False)
    assert bool(found) is bool(certain | perhaps)
    for obstacle in found:
        assert obstacle.certain is bool(certain & {"tcp", "udp"}), "echo requests are tried, and nothing else"
        assert obstacle.untested is bool((certain | perhaps) & {"tcp", "udp"})
        assert obstacle.blocked == ({4} if dropped == "tcp udp icmp" else set()), "a leader stays that forwards some"
        start = f"the firewall {what} this host forwards between" if what.endswith("what") else (
            f"the firewall {what} that this host forwards between"
        )  # fmt: skip
        assert obstacle.text.startswith(start)


@pytest.mark.parametrize(
    ("printed", "blocked"),
    [
        ("-P FORWARD DROP", {4}),
        ("-P FORWARD DROP\n-A FORWARD -i eth0 -j ACCEPT", set[int]()),  # A router lets out, and answers in.
        ("-P FORWARD DROP\n-A FORWARD -o eth1 -j ACCEPT\n-A FORWARD -i eth1 -j ACCEPT", set[int]()),  # One of two.
        (UFW, set[int]()),
    ],
)
def test_in_which_families_nothing_passes(printed: str, blocked: set[int]) -> None:
    chain = from_iptables(printed, 4)
    assert chain is not None
    (obstacle,) = obstacles([chain], packets("kilo0", ["eth0", "eth1"], [4, 6], MESH), "kilo0", opening=False)
    assert obstacle.blocked == blocked


class Chains(Netfilter):
    """nftables with these chains, wherever it runs."""

    def __init__(self, *chains: BaseChain) -> None:
        super().__init__()
        self._found = chains

    def passed_chains(self) -> tuple[BaseChain, ...]:
        return self._found

    def translating_chains(self) -> tuple[BaseChain, ...]:
        return ()


class NoXtables(Iptables):
    """iptables without older tables beside nftables."""

    def legacy(self, version: int, *, patience: float) -> None:
        return None

    def legacy_translation(self, version: int, *, patience: float) -> None:
        return None


def test_what_a_host_refuses_of_silent_members_makes_no_firewall_uncertain(tmp_path: Path) -> None:
    """Else a host would end its hold-down, or take over, because a member has fallen silent."""
    printed = "-P FORWARD DROP\n-A FORWARD -s 192.168.0.0/16 -j ACCEPT"
    opened = "-P FORWARD DROP\n-A FORWARD -s 10.0.0.0/8 -d 10.0.0.0/8 -j ACCEPT"
    refused = {ip_network("10.4.0.9/32"): "it does not answer", ip_network("192.168.0.0/24"): "it does not answer"}
    silent = evolve(LEADER, unreachable_routes=(*MESH, *refused), refused=refused)
    cut_off = evolve(silent, refused={**refused, MESH[0]: "its leader does not answer"})
    xtables = NoXtables("kilo0", tmp_path / "y", lambda: 1)
    for plan in (LEADER, silent, cut_off):
        for text, certain in ((printed, [True]), (opened, [])):
            chain = from_iptables(text, 4)
            assert chain is not None
            chains = ForwardChains("kilo0", tmp_path / "x", Chains(chain), xtables, opening=False)
            assert [obstacle.certain for obstacle in chains.obstacles(plan, ["eth0"])] == certain


def test_the_older_xtables_are_read_rarely_and_a_change_is_seen_within_a_minute(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    names, now = tmp_path / "names", 1000.0
    printed = "-P FORWARD ACCEPT"
    ran: list[float] = []

    def run(*command: str) -> str:
        assert command == ("iptables-legacy", "-w", "5", "-S")
        ran.append(now)
        return printed

    monkeypatch.setattr(iptables, "_LEGACY_TABLES", {4: names, 6: tmp_path / "none"})
    monkeypatch.setattr(iptables, "_run", run)
    monkeypatch.setattr(shutil, "which", lambda name, path: name)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    chains = ForwardChains(
        "kilo0",
        tmp_path / "x",
        Chains(),
        Iptables("kilo0", tmp_path / "y", lambda: 1),
        opening=False,
    )

    def until(drops: bool) -> float:
        """Looks, as often as the agent does, until something drops or does not; the seconds that took."""
        nonlocal now
        began = now
        while bool(chains.obstacles(LEADER, ["eth0"])) is not drops:
            now += OBSTACLES_PAUSE + OBSTACLES_PERIOD
        return now - began

    for _ in range(600):
        assert until(False) == 0
        now += 1
    assert ran == [], "there is no table, so no program is run"
    names.write_text("nat\nfilter\n")
    printed = "-P FORWARD DROP"
    assert until(True) == 0, "a new table is seen at once"
    printed = "-P FORWARD ACCEPT"
    assert 0 < until(False) <= 30, "and so is its end, nearly"
    ran.clear()
    for _ in range(600):
        assert until(False) == 0
        now += 1
    assert 10 <= len(ran) <= 600 / 40
    for offset in range(0, 60, 7):
        now += offset
        assert until(False) == 0
        printed = "-P FORWARD DROP"
        assert until(True) < 60
        printed = "-P FORWARD ACCEPT"
        until(False)


def test_a_program_that_does_not_end_is_waited_for_more_and_more_rarely(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The kernel's one lock is held meanwhile."""
    names, now, waits = tmp_path / "names", 1000.0, True
    names.write_text("nat")
    ran: list[float] = []

    def run(*command: str) -> str:
        nonlocal now
        ran.append(now)
        if waits:
            now += iptables._DEADLINE
            raise iptables.IptablesError("it did not end")
        return "-P PREROUTING ACCEPT"

    monkeypatch.setattr(iptables, "_LEGACY_TABLES", {4: names, 6: tmp_path / "none"})
    monkeypatch.setattr(iptables, "_run", run)
    monkeypatch.setattr(shutil, "which", lambda name, path: name if "legacy" in name else None)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    xtables = Iptables("kilo0", tmp_path / "y", lambda: 1)

    def look(seconds: float) -> int:
        """How often the program was run."""
        nonlocal now
        ran.clear()
        end = now + seconds
        while now < end:
            xtables.legacy_translation(4, patience=15)
            now += 1
        return len(ran)

    assert look(3600) <= 15
    monkeypatch.setattr(iptables, "_DEADLINE", iptables._LOCK_SECONDS)
    assert look(3600) <= 15, "another program holds the lock"
    waits = False
    look(600)
    assert look(600) >= 30, "it ends again"


def test_a_ruleset_that_changes_while_it_is_read_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """A firewall that is being reloaded would be seen without the rules that drop: as one that lets all pass."""
    whole = BaseChain(family="inet", table="firewalld", name="filter_FORWARD", drops=True)
    found = [(), (whole,), (), (), (), (whole,)]
    generations = iter([1, 2, 2, 3, 4, 5, 6, 6])
    netfilter = Netfilter()
    monkeypatch.setattr(Netfilter, "generation", lambda self: next(generations))
    monkeypatch.setattr(Netfilter, "_open", lambda self: None)
    monkeypatch.setattr(hooks, "read", lambda device, of: found.pop(0))
    assert netfilter.forward_chains() == (whole,)
    assert netfilter.forward_chains() == (), "there is an end to it"
    assert netfilter.forward_chains() == (whole,), "and the next time it is looked at again"
    assert found == []


class Reloaded(Chains):
    """nftables that loses all its chains, one that drops and one that translates, between two readings."""

    def passed_chains(self) -> tuple[BaseChain, ...]:
        chains, self._found = self._found, ()
        return chains


def test_what_translates_and_what_drops_are_of_one_ruleset(tmp_path: Path) -> None:
    nftables = Reloaded(one_rule(Condition("daddr", OFFERED)))
    xtables = NoXtables("kilo0", tmp_path / "y", lambda: 1)
    chains = ForwardChains("kilo0", tmp_path / "x", nftables, xtables, opening=False)
    assert chains.obstacles(evolve(LEADER, behind=(OFFERED,)), ["eth0"]) == ()


LAN, LAN_ADDRESS = ip_network("192.168.9.0/24"), ip_network("192.168.9.240/32")
OFFERED, MEMBER = ip_network("172.20.1.0/24"), ip_network("10.4.0.2/32")
NEAR = {
    network: RoutePlan(destination=network, via=Via.UNDERLAY, gateway=ip_address("10.1.0.2"))
    for network in (OFFERED, MEMBER)
}


ACCEPTS_OTHERS = (
    FilterRule(conditions=(Condition("daddr", ip_network("10.4.0.3/32")), Condition("iif", "kilo0")), verdict="accept"),
    FilterRule(conditions=(Condition("iif", "eth0"),), verdict="accept"),
)


def one_rule(*conditions: Condition, hook: str = "forward", drops: bool = False) -> BaseChain:
    rules = (FilterRule(conditions=conditions, verdict="drop"),) if conditions else ()
    return BaseChain(family="ip", table="t", name="f", hook=hook, drops=drops, rules=rules)


@pytest.mark.parametrize(
    ("chain", "found"),
    [
        (one_rule(Condition("daddr", OFFERED)), [(True, (OFFERED,))]),
        (one_rule(Condition("saddr", OFFERED)), [(True, (OFFERED,))]),
        (one_rule(Condition("daddr", OFFERED), Condition("protocol", "tcp")), [(False, (OFFERED,))]),
        (one_rule(Condition("daddr", OFFERED), Condition("protocol", "icmp")), []),
        (one_rule(Condition("daddr", OFFERED), Condition("?")), []),
        (one_rule(Condition("daddr", OFFERED), Condition("iif", "kilo0"), hook="postrouting"), [(True, (OFFERED,))]),
        (one_rule(Condition("daddr", OFFERED), Condition("iif", "eth0")), []),
        (one_rule(Condition("daddr", MEMBER), hook="prerouting"), [(True, (MEMBER,))]),
        (one_rule(Condition("saddr", OFFERED), Condition("new", True)), []),
        (evolve(one_rule(drops=True), rules=ACCEPTS_OTHERS), [(False, ()), (True, (MEMBER, OFFERED))]),
        # All is dropped: that is one sentence.
        (one_rule(drops=True), [(True, ())]),
    ],
)
def test_what_is_dropped_for_one_member_or_one_network_is_found(
    chain: BaseChain, found: list[tuple[bool, tuple[IPNetwork, ...]]], tmp_path: Path
) -> None:
    plan = evolve(LEADER, routes={**LEADER.routes, **NEAR})
    chains = ForwardChains(
        "kilo0", tmp_path / "x", Chains(chain), NoXtables("kilo0", tmp_path / "y", lambda: 1), opening=False
    )
    for _ in range(2):
        obstacles = chains.obstacles(plan, ["eth0"])
        assert [(one.certain, one.networks) for one in obstacles] == found
        assert all(one.leading for one in obstacles)
        for one in obstacles:
            assert dropped_networks(one.text) == (one.networks or None)
            assert not (one.networks and one.blocked), "others get through"


def test_a_network_behind_a_host_is_cut_off_whether_it_leads_or_not(tmp_path: Path) -> None:
    to_leader = {MESH[0]: RoutePlan(destination=MESH[0], via=Via.UNDERLAY, gateway=ip_address("10.1.0.2"))}
    member = evolve(LEADER, routes=to_leader, behind=(OFFERED,))
    accept = [FilterRule(conditions=(Condition(kind, "br9"),), verdict="accept") for kind in ("oif", "iif")]
    for chain, cut in (
        (one_rule(drops=True), True),
        (evolve(one_rule(drops=True), rules=tuple(accept)), False),
        (evolve(one_rule(drops=True), rules=(accept[0],)), True),  # The answers.
        (one_rule(Condition("iif", "kilo0")), False),
    ):
        chains = ForwardChains(
            "kilo0", tmp_path / "x", Chains(chain), NoXtables("kilo0", tmp_path / "y", lambda: 1), opening=False
        )
        own = [one for one in chains.obstacles(member, ["eth0"]) if not one.leading]
        assert [one.networks for one in own] == ([(OFFERED,)] if cut else []), chain


def forwards_to(*networks: IPNetwork) -> tuple[FilterRule, ...]:
    return tuple(
        FilterRule(conditions=(Condition("daddr", network),), verdict="accept", translates=True) for network in networks
    )


def test_only_what_is_dropped_is_compared_with_what_translates_and_once_for_networks_that_are_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1000 networks and 900 rules: the kernel's one lock is held meanwhile."""
    asked = 0

    def count(chain: BaseChain, packet: Packet) -> bool | None:
        nonlocal asked
        asked += 1
        return translates(chain, packet)

    monkeypatch.setattr(destinations, "translates", count)
    offered = tuple(ip_network(f"172.{16 + number // 64}.{number % 64 * 4}.0/22") for number in range(1000))
    translated, dropped, other = offered[7], offered[:500], ip_network("10.96.0.0/22")
    rules = forwards_to(ip_network(translated[9]), *(ip_network(other[number]) for number in range(900)))
    drop = FilterRule(conditions=(Condition("daddr", dropped),), verdict="drop")
    chains = (
        BaseChain(family="ip", table="n", name="p", hook="prerouting", priority=-100, drops=False, rules=rules),
        BaseChain(family="ip", table="t", name="f", drops=False, rules=(drop,)),
    )
    # A member offers one of them too.
    routes = {**LEADER.routes, offered[8]: evolve(NEAR[OFFERED], destination=offered[8])}
    plan = evolve(LEADER, routes=routes, behind=offered)
    xtables = NoXtables("kilo0", tmp_path / "y", lambda: 1)
    found = ForwardChains("kilo0", tmp_path / "x", Chains(*chains), xtables, opening=False).obstacles(plan, ["eth0"])
    assert {one.leading: set(one.networks) for one in found} == {
        False: set(dropped) - {translated},
        True: {offered[8]},
    }
    assert asked <= 10


def test_of_many_rules_those_that_may_match_a_network_are_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rule that translates in each network, and a rule that drops each."""
    tried = 0
    matches = Condition.matches

    def count(condition: Condition, packet: Packet) -> bool | None:
        nonlocal tried
        tried += 1
        return matches(condition, packet)

    offered = tuple(ip_network(f"172.{16 + number // 64}.{number % 64 * 4}.0/22") for number in range(300))
    nat = forwards_to(*(ip_network(network[9]) for network in offered[:200]))
    drop = tuple(FilterRule(conditions=(Condition("daddr", network),), verdict="drop") for network in offered)
    chains = (
        BaseChain(family="ip", table="n", name="p", hook="prerouting", priority=-100, drops=False, rules=nat),
        BaseChain(family="ip", table="t", name="f", drops=False, rules=drop),
    )
    monkeypatch.setattr(Condition, "matches", count)
    xtables = NoXtables("kilo0", tmp_path / "y", lambda: 1)
    plan = evolve(LEADER, behind=offered)
    found = ForwardChains("kilo0", tmp_path / "x", Chains(*chains), xtables, opening=False).obstacles(plan, ["eth0"])
    assert [set(one.networks) for one in found] == [set(offered[200:])]
    assert tried <= 50 * len(offered)


TCP, UDP = (Condition("protocol", name) for name in ("tcp", "udp"))
PORT, ONE_ADDRESS = Condition("?"), Condition("daddr", ip_network("172.20.1.9/32"))


def translation(*conditions: Condition) -> FilterRule:
    return FilterRule(conditions=conditions, verdict="accept", translates=True)


REDIRECTS_DNS = translation(UDP, PORT), translation(TCP, PORT)
"""As `iptables -t nat -A PREROUTING -p udp --dport 53 -j REDIRECT`."""
PORT_FORWARD = translation(TCP, ONE_ADDRESS, PORT)
ALL_BUT_UDP = translation(Condition("protocol", "udp", equal=False))
IN_A_SET = Condition("lookup", "daddr")


@pytest.mark.parametrize(
    ("hook", "rules", "named"),
    [
        ("prerouting", (), "packets"),
        ("prerouting", (PORT_FORWARD,), "UDP packets"),
        ("prerouting", (ALL_BUT_UDP,), "UDP packets"),
        ("prerouting", (PORT_FORWARD, translation(UDP, ONE_ADDRESS)), ""),
        ("prerouting", (translation(ONE_ADDRESS),), ""),
        ("prerouting", (translation(Condition("protocol", "icmp"), ONE_ADDRESS),), "packets"),
        ("postrouting", (PORT_FORWARD,), "packets"),  # New packets are dropped before.
        # What tests no destination of the network, and does not translate all packets.
        ("prerouting", REDIRECTS_DNS, "packets"),
        ("prerouting", (*REDIRECTS_DNS, PORT_FORWARD), "UDP packets"),
        ("prerouting", (*REDIRECTS_DNS, ALL_BUT_UDP), "UDP packets"),
        ("prerouting", (translation(UDP), PORT_FORWARD), ""),
        ("prerouting", (translation(evolve(ONE_ADDRESS, equal=False), PORT),), "packets"),
        ("prerouting", (translation(IN_A_SET),), ""),
        ("prerouting", (translation(evolve(IN_A_SET, equal=False)),), "packets"),
        ("prerouting", (translation(Condition("any", ((TCP, ONE_ADDRESS), (UDP, PORT)))),), "UDP packets"),
        ("prerouting", (FilterRule(conditions=(UDP, ONE_ADDRESS), verdict="jump", target="to-dns"),), "TCP packets"),
        ("prerouting", (FilterRule(conditions=(UDP,), verdict="jump", target="to-dns"),), "packets"),
        ("prerouting", (FilterRule(conditions=(UDP,), verdict="unknown", translates=True),), "TCP packets"),
    ],
)
def test_what_translates_one_protocol_leaves_the_drop_of_others_certain(
    hook: str, rules: tuple[FilterRule, ...], named: str, tmp_path: Path
) -> None:
    nat = BaseChain(
        family="ip", table="n", name="p", hook=hook, priority=-100, drops=False, rules=rules,
        chains={"to-dns": REDIRECTS_DNS},
    )  # fmt: skip
    drop = one_rule(Condition("daddr", OFFERED))
    xtables = NoXtables("kilo0", tmp_path / "y", lambda: 1)
    chains = ForwardChains("kilo0", tmp_path / "x", Chains(nat, drop), xtables, opening=False)
    found = chains.obstacles(evolve(LEADER, behind=(OFFERED,)), ["eth0"])
    assert [one.text.partition(" for ")[0] for one in found] == ([f"the firewall drops {named}"] if named else [])
    assert all(one.certain is (named == "packets") for one in found)


def test_what_is_forwarded_is_for_no_address_of_the_host() -> None:
    local = FilterRule(conditions=(Condition("local", True),), verdict="accept")
    chain = BaseChain(family="ip", table="t", name="f", hook="prerouting", drops=True, rules=(local,))
    sent = packets("kilo0", ["eth0"], [4], MESH)
    assert [obstacle.certain for obstacle in obstacles((chain,), sent, "kilo0", opening=False)] == [True]


STATELESS = FilterRule(conditions=(Condition("new", False),), verdict="accept")


@pytest.mark.parametrize(
    ("rules", "nat", "named"),
    [
        ((), (translation(ONE_ADDRESS),), True),
        ((STATELESS,), (translation(ONE_ADDRESS),), True),
        (
            (STATELESS, FilterRule(conditions=(Condition("daddr", LAN),), verdict="accept")),
            (translation(ONE_ADDRESS),),
            False,
        ),
        (
            (FilterRule(conditions=(Condition("saddr", MESH[0]),), verdict="accept"),),
            (translation(ONE_ADDRESS),),
            False,
        ),
        ((FilterRule(conditions=(Condition("status", False),), verdict="accept"),), (translation(ONE_ADDRESS),), False),
        (
            (STATELESS, FilterRule(conditions=(Condition("oif", "br9"),), verdict="accept")),
            (translation(ONE_ADDRESS),),
            False,
        ),
        # Some of it the host itself takes.
        ((), (evolve(translation(ONE_ADDRESS), takes=True),), False),
        # What it takes of other devices is not of it.
        ((), (evolve(translation(Condition("iif", "lan9")), takes=True), translation(ONE_ADDRESS)), True),
    ],
)
def test_a_chain_that_drops_whatever_the_destination_is_named_after_a_translation(
    rules: tuple[FilterRule, ...], nat: tuple[FilterRule, ...], named: bool, tmp_path: Path
) -> None:
    """Of a host that does not lead, behind which there are services."""
    to_leader = {MESH[0]: RoutePlan(destination=MESH[0], via=Via.UNDERLAY, gateway=ip_address("10.1.0.2"))}
    plan = evolve(LEADER, routes=to_leader, behind=(OFFERED,))
    drop = BaseChain(family="ip", table="t", name="f", hook="forward", drops=True, rules=rules)
    before = BaseChain(family="ip", table="n", name="p", hook="prerouting", priority=-100, drops=False, rules=nat)
    chains = ForwardChains(
        "kilo0", tmp_path / "x", Chains(before, drop), NoXtables("kilo0", tmp_path / "y", lambda: 1), opening=False
    )
    obstacles = [obstacle for obstacle in chains.obstacles(plan, ["eth0"]) if not obstacle.leading]
    assert [obstacle.networks for obstacle in obstacles] == ([(OFFERED,)] if named else [])


def test_the_one_host_of_a_service_may_be_this_one(tmp_path: Path) -> None:
    """As the API server is on a control plane's host, which then gets the packets and forwards none."""
    service = ip_network("10.43.0.1")
    dnat = translation(Condition("daddr", service))
    before = BaseChain(family="ip", table="n", name="p", hook="prerouting", priority=-100, drops=False, rules=(dnat,))
    drop = BaseChain(family="ip", table="t", name="f", hook="forward", drops=True)
    for behind in (service, SERVICES):
        xtables = NoXtables("kilo0", tmp_path / "y", lambda: 1)
        chains = ForwardChains("kilo0", tmp_path / "x", Chains(before, drop), xtables, opening=False)
        obstacles = chains.obstacles(evolve(LEADER, behind=(behind,)), ["eth0"])
        assert [one.networks for one in obstacles if not one.leading] == ([] if behind == service else [(SERVICES,)])


@pytest.mark.parametrize(
    ("rules", "named"),
    [
        (REDIRECTS_DNS, {MEMBER, LAN}),
        ((translation(Condition("daddr", LAN_ADDRESS), PORT),), {MEMBER, LAN}),
        ((translation(Condition("daddr", MEMBER), PORT),), {MEMBER, LAN}),
        ((FilterRule(verdict="unknown", translates=True),), {MEMBER, LAN}),  # A table that cannot be read.
        ((translation(),), set()),
        ((translation(Condition("daddr", LAN)),), {MEMBER}),
    ],
)
def test_of_members_and_of_hosts_on_a_link_only_a_translation_of_all_counts(
    rules: tuple[FilterRule, ...], named: set[IPNetwork], tmp_path: Path
) -> None:
    """A member's mesh address is no service's, and a network with hosts is none of services; one of its addresses may
    be."""
    every = MEMBER, LAN, LAN_ADDRESS
    nat = BaseChain(family="ip", table="n", name="p", hook="prerouting", priority=-100, drops=False, rules=rules)
    plan = evolve(LEADER, routes={**LEADER.routes, MEMBER: NEAR[MEMBER]}, behind=(LAN,))
    for drop in (one_rule(Condition("daddr", every)), one_rule(Condition("saddr", every))):
        chains = ForwardChains(
            "kilo0", tmp_path / "x", Chains(nat, drop), NoXtables("kilo0", tmp_path / "y", lambda: 1), opening=False,
            own=lambda: OwnAddresses(links={LAN: frozenset(("br9",))}),
        )  # fmt: skip
        obstacles = chains.obstacles(plan, ["eth0"])
        assert {network for obstacle in obstacles for network in obstacle.networks} == named
        assert all(obstacle.certain for obstacle in obstacles)


def test_by_which_device_a_network_on_a_link_is_reached() -> None:
    narrower = ip_network("192.168.9.128/25")
    links = {LAN: frozenset(("br9",)), narrower: frozenset(("eth0",)), OFFERED: frozenset(("eth0", "eth1"))}
    own = OwnAddresses(links=links)
    for network, device in (("192.168.9.0/24", "br9"), ("192.168.9.0/26", "br9"), ("192.168.9.129/32", "?"),
                            ("172.20.1.0/24", "?"), ("192.168.0.0/16", "?"), ("10.43.0.0/16", "?")):  # fmt: skip
        assert own.device_to(ip_network(network)) == device


@pytest.mark.parametrize(
    ("network", "on_link"),
    [
        ("192.168.9.0/24", True), ("192.168.0.0/16", True), ("192.168.9.128/25", False), ("192.168.9.240/32", False),
        ("192.168.8.0/24", False),
        ("fd09::/64", True), ("fd00::/8", True), ("fd09::5/128", False), ("fd08::/64", False),
    ],
)  # fmt: skip
def test_which_networks_are_of_hosts_on_a_link(network: str, on_link: bool) -> None:
    own = OwnAddresses(links={LAN: frozenset(("eth0",)), ip_network("fd09::/64"): frozenset(("eth0",))})
    assert own.on_link(ip_network(network)) is on_link
    assert not OwnAddresses().on_link(ip_network(network))


# -- with the real nftables -------------------------------------------------------------------------------------------

FIREWALLD = """
table inet firewalld {
  chain filter_FORWARD {
    type filter hook forward priority filter + 10; policy accept;
    ct state { established, related } accept
    ct status dnat accept
    iifname "lo" accept
    ct state invalid drop
    jump filter_FORWARD_POLICIES
    reject with icmpx type admin-prohibited
  }
  chain filter_FORWARD_POLICIES {
    iifname "eth0" oifname "eth0" jump filter_FWD_public
    iifname "eth9" return
  }
  chain filter_FWD_public {
    accept
  }
}
"""


def load(ruleset: str) -> None:
    sh(f"nft -f - <<'END'\n{ruleset}\nEND")


TRUSTED = """
table inet firewalld {
  chain filter_FORWARD {
    type filter hook forward priority filter + 10; policy accept;
    ct state { established, related } accept
    ct status dnat accept
    iifname "lo" accept
    ct state invalid drop
    ip6 daddr { ::/96, 2002:a00::/24, 2002:7f00::/24, 2002:c0a8::/32 } reject with icmpv6 type addr-unreachable
    jump filter_FORWARD_POLICIES
    reject with icmpx type admin-prohibited
  }
  chain filter_FORWARD_POLICIES {
    iifname { "kilo0", "eth0" } oifname { "kilo0", "eth0" } jump filter_FWD_trusted
    jump filter_FWD_public
    reject with icmpx type admin-prohibited
  }
  chain filter_FWD_trusted {
    jump filter_FWD_trusted_pre
    accept
  }
  chain filter_FWD_trusted_pre { }
  chain filter_FWD_public {
    meta l4proto { icmp, ipv6-icmp } accept
  }
}
"""
UFW_RESTORED = """\
*filter
:FORWARD DROP
:ufw-before-logging-forward -
:ufw-before-forward -
:ufw-user-forward -
:ufw-after-forward -
:ufw-after-logging-forward -
:ufw-reject-forward -
-A FORWARD -j ufw-before-logging-forward
-A FORWARD -j ufw-before-forward
-A FORWARD -j ufw-after-forward
-A FORWARD -j ufw-after-logging-forward
-A FORWARD -j ufw-reject-forward
-A ufw-before-forward -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A ufw-before-forward -p icmp -m icmp --icmp-type 3 -j ACCEPT
-A ufw-before-forward -p icmp -m icmp --icmp-type 8 -j ACCEPT
-A ufw-before-forward -j ufw-user-forward
-A ufw-user-forward -i kilo0 -j ACCEPT
-A ufw-user-forward -o kilo0 -j ACCEPT
-A ufw-after-logging-forward -m limit --limit 3/min --limit-burst 10 -j LOG --log-prefix "[UFW BLOCK] "
COMMIT
"""
DOCKER_RESTORED = """\
*filter
:FORWARD DROP
:DOCKER -
:DOCKER-USER -
:DOCKER-ISOLATION-STAGE-1 -
-A FORWARD -j DOCKER-USER
-A FORWARD -j DOCKER-ISOLATION-STAGE-1
-A FORWARD -o docker0 -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT
-A FORWARD -i docker0 ! -o docker0 -j ACCEPT
-A DOCKER -d 172.17.0.2/32 ! -i docker0 -o docker0 -p tcp -m tcp --dport 80 -j ACCEPT
-A DOCKER-ISOLATION-STAGE-1 -i docker0 ! -o docker0 -j RETURN
-A DOCKER-USER -j RETURN
COMMIT
"""
OWN = """
table inet own {
  set mesh { type ipv4_addr; flags interval; auto-merge; elements = { 10.4.0.0/17, 10.4.128.0/17, 192.168.9.0/24 } }
  chain forward {
    type filter hook forward priority 0; policy drop;
    ct state vmap { established : accept, related : accept, invalid : drop }
    icmp type echo-request limit rate 5/second accept
    iifname . oifname vmap { "eth7" . "eth8" : drop, "eth0" . "kilo0" : jump both, "kilo0" . "eth0" : goto both }
  }
  chain both {
    meta l4proto { tcp, udp } ip saddr @mesh accept
  }
}
"""
KUBE_PROXY = """
table ip kube-proxy {
  map no-endpoint-services {
    type ipv4_addr . inet_proto . inet_service : verdict
    elements = { 10.96.0.10 . tcp . 53 : goto reject-chain }
  }
  set cluster-ips { type ipv4_addr; elements = { 10.96.0.1, 10.96.0.10 } }
  chain filter-forward {
    type filter hook forward priority -110; policy accept;
    ct state new jump service-endpoints-check
    ct state new jump cluster-ips-check
  }
  chain service-endpoints-check { ip daddr . meta l4proto . th dport vmap @no-endpoint-services; }
  chain cluster-ips-check {
    ip daddr @cluster-ips reject
    ip daddr 10.43.0.0/16 drop
  }
  chain reject-chain { reject; }
  map service-ips {
    type ipv4_addr . inet_proto . inet_service : verdict
    elements = { 10.43.0.1 . tcp . 443 : goto service-kubernetes, 10.43.0.10 . udp . 53 : goto service-dns }
  }
  chain nat-prerouting { type nat hook prerouting priority -100; jump services; }
  chain services {
    ip daddr . meta l4proto . th dport vmap @service-ips
    fib daddr type local tcp dport 30080 goto service-dns
  }
  chain service-kubernetes { meta l4proto tcp dnat to 192.168.9.7:6443; }
  chain service-dns { numgen random mod 1 vmap { 0 : goto endpoint }; }
  chain endpoint { meta l4proto udp dnat to 10.42.0.5:53; }
}
"""
SERVICES = ip_network("10.43.0.0/16")
OFFERS_SERVICES = evolve(LEADER, behind=(SERVICES,))
DROPS_SERVICES = (
    "table ip x { chain f { type filter hook forward priority 0; ct state new ip daddr 10.43.0.0/16 drop; }"
)
"""The beginning of a table."""
NAT = "type nat hook prerouting priority -100; policy accept;"


def services_table(family: str, name: str, networks: str, elements: str) -> str:
    """As kube-proxy's, with one service at most."""
    kind, endpoint = ("ipv4_addr", "192.168.9.7:6443") if family == "ip" else ("ipv6_addr", "[fd09::7]:6443")
    return f"""
table {family} {name} {{
  map service-ips {{ type {kind} . inet_proto . inet_service : verdict; {elements} }}
  chain filter-forward {{ type filter hook forward priority -110; ct state new jump cluster-ips-check; }}
  chain cluster-ips-check {{ {family} daddr {{ {networks} }} drop; }}
  chain nat-prerouting {{ {NAT} jump services; }}
  chain services {{ {family} daddr . meta l4proto . th dport vmap @service-ips; }}
  chain kubernetes {{ meta l4proto tcp dnat to {endpoint}; }}
}}
"""


def many_services(network: str) -> str:
    """More chains than are followed, a service each."""
    numbers = range(MOST_TARGETS + 1)
    chains = " ".join(f"chain s{number} {{ dnat to 10.42.0.5; }}\n" for number in numbers)
    services = ", ".join(f"{network}.{number} . tcp . 80 : goto s{number}" for number in numbers)
    return f"{chains} chain n {{ {NAT} ip daddr . meta l4proto . th dport vmap {{ {services} }}; }}"


BOTH = "TCP UDP"
TRANSLATIONS = [
    # What a table holds besides, and of which protocols what is for the services is dropped for certain.
    ("", BOTH),
    (f"chain n {{ {NAT} ip daddr 10.44.0.0/16 dnat to 10.42.0.5; }}", BOTH),
    (f"chain n {{ {NAT} ip daddr 10.43.0.0/16 dnat to 10.42.0.5; }}", ""),
    (f"chain n {{ {NAT} ip daddr 10.43.0.1 udp dport 53 redirect to :5353; }}", "TCP"),
    (f"chain n {{ {NAT} ip daddr 10.43.0.0/16 ip protocol tcp accept; ip daddr 10.43.0.0/16 dnat to "
     "10.42.0.5; }", "TCP"),
    (f"chain n {{ {NAT} ip daddr 10.0.0.0/8 accept; dnat to 10.42.0.5; }}", BOTH),
    (f"chain n {{ {NAT} iifname eth7 dnat to 10.42.0.5; }}", BOTH),
    # As Docker does with the ports of containers.
    (f"chain n {{ {NAT} fib daddr type local jump d; }}\n chain d {{ tcp dport 80 dnat to 10.42.0.5; }}", BOTH),
    (f"chain n {{ {NAT} fib daddr type != local jump d; }}\n chain d {{ tcp dport 80 dnat to 10.42.0.5; }}", BOTH),
    (f"chain n {{ {NAT} udp dport 53 redirect; tcp dport 53 redirect; }}", BOTH),
    (f"chain n {{ {NAT} meta l4proto {{ tcp, udp }} redirect; }}", ""),
    (f"chain n {{ {NAT} meta l4proto tcp redirect; }}", "UDP"),
    (f"chain n {{ {NAT} ip daddr & 0.0.0.255 == 9 tcp dport 53 redirect; }}", "UDP"),
    (f"chain n {{ {NAT} dnat to ip daddr map {{ 10.43.0.1 : 10.42.0.5, 10.43.0.2 : 10.42.0.6 }}; }}", ""),
    (f"chain n {{ {NAT} dnat to ip daddr map {{ 10.44.0.1 : 10.42.0.5, 10.44.0.2 : 10.42.0.6 }}; }}", BOTH),
    (f"set s {{ type ipv4_addr; flags interval; elements = {{ 10.43.0.0-10.43.0.9 }}; }}\n"
     f"chain n {{ {NAT} ip daddr @s dnat to 10.42.0.5; }}", ""),
    # A set that may change by itself.
    (f"set s {{ type ipv4_addr; timeout 1h; }}\n chain n {{ {NAT} ip daddr @s dnat to 10.42.0.5; }}", ""),
    # What does not translate its destination.
    (f"chain n {{ {NAT} ip daddr 10.43.0.0/16 counter accept; }}", BOTH),
    ("chain n { type nat hook postrouting priority 100; policy accept; masquerade; }", BOTH),
    (many_services("10.44.0"), BOTH),
    (many_services("10.43.0"), ""),
    # A rule that writes into the packet's header.
    ("chain n { type filter hook prerouting priority -300; ip daddr 10.43.0.0/16 ip daddr set 10.42.0.5; }", ""),
    ("chain n { type filter hook forward priority -1; ip daddr 10.43.0.0/16 ip daddr set 10.42.0.5; }", ""),
    ("chain n { type filter hook forward priority 1; ip daddr 10.43.0.0/16 ip daddr set 10.42.0.5; }", BOTH),
    *((f"chain n {{ type filter hook prerouting priority -150; ip daddr 10.43.0.0/16 ip {field}; }}", BOTH)
      for field in ("ttl set 65", "dscp set cs1", "ecn set ce", "saddr set 10.42.0.5")),
]  # fmt: skip


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_firewalls_that_let_the_mesh_through_are_no_obstacle() -> None:
    sh("ip link add eth0 type veth peer eth1; ip addr add 192.168.9.1/24 dev eth0; ip link set eth0 up; "
       "ip route add default via 192.168.9.2")  # fmt: skip
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        await kernel.apply(OFFERS_SERVICES)
        for ruleset, table in ((TRUSTED, "inet firewalld"), (KUBE_PROXY, "ip kube-proxy")):
            load(ruleset)
            assert await kernel.obstacles() == ()
            sh(f"nft delete table {table}")
        load(OWN)
        (obstacle,) = await kernel.obstacles()
        assert "may drop ICMP packets that" in obstacle.text
        assert (obstacle.certain, obstacle.untested) == (False, False), "echo requests tell whether it drops them"
        sh("nft delete table inet own")
        sh(f"iptables-restore <<'END'\n{UFW_RESTORED}END")
        assert await kernel.obstacles() == ()
        sh(f"iptables-restore <<'END'\n{DOCKER_RESTORED}END")
        assert [obstacle.certain for obstacle in await kernel.obstacles()] == [True]
    async with open_kernel(Setup(private_key=PRIVATE, forward_rules=True)) as kernel:
        assert (await kernel.apply(LEADER, fresh=True)).failures == ()
        assert await kernel.obstacles() == ()


def cut_protocols(obstacles: Iterable[Obstacle]) -> str:
    """Those of which packets for the services are dropped for certain."""
    both = [one for one in obstacles if one.networks]
    assert all(one.networks == (SERVICES,) for one in both)
    return " ".join(BOTH if one.certain else one.text.split()[3] for one in both)


def cut_networks(obstacles: Iterable[Obstacle]) -> list[IPNetwork]:
    assert all(obstacle.certain for obstacle in obstacles)
    return [network for obstacle in obstacles for network in obstacle.networks]


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_of_a_network_that_is_translated_on_its_way_nothing_is_certain_where_its_packets_are_others() -> None:
    sh("ip link add eth0 type veth peer eth1; ip addr add 192.168.9.1/24 dev eth0; ip link set eth0 up; "
       "ip route add default via 192.168.9.2")  # fmt: skip
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        await kernel.apply(OFFERS_SERVICES)
        for rules, certain in TRANSLATIONS:
            load(f"{DROPS_SERVICES}\n {rules}\n}}")
            assert cut_protocols(await kernel.obstacles()) == certain, rules
            sh("nft delete table ip x")
        # Before they are translated they are dropped.
        load(f"table ip x {{ chain n {{ {NAT} dnat to 10.42.0.5; }}\n"
             "chain f { type filter hook prerouting priority -150; ip daddr 10.43.0.0/16 drop; }\n}")  # fmt: skip
        assert cut_networks(await kernel.obstacles()) == [SERVICES]
        sh("nft delete table ip x")
        load(f"table ip x {{ chain n {{ {NAT} dnat to 10.42.0.5; }}\n"
             "chain f { type filter hook prerouting priority -50; ip daddr 10.43.0.0/16 drop; }\n}")  # fmt: skip
        assert await kernel.obstacles() == ()
        sh("nft delete table ip x")
        # Which of two at one place comes first is not known; of one chain it is.
        load(f"table ip x {{ chain n {{ {NAT} ip daddr 10.43.0.1 dnat to 10.42.0.5; }}\n"
             "chain f { type filter hook prerouting priority -100; ip daddr 10.43.0.0/16 drop; }\n}")  # fmt: skip
        assert await kernel.obstacles() == ()
        sh("nft delete table ip x")
        load(f"table ip x {{ chain n {{ {NAT} ip daddr 10.43.0.0/16 drop; ip daddr 10.43.0.1 dnat to 10.42.0.5; }}\n}}")
        assert cut_networks(await kernel.obstacles()) == [SERVICES]


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_what_is_dropped_by_the_device_of_a_network_behind_the_host_is_named() -> None:
    sh("ip link add eth0 type veth peer eth1; ip addr add 192.168.9.1/24 dev eth0; ip link set eth0 up; "
       "ip route add default via 192.168.9.2; ip link add lan0 type veth peer lan1; "
       "ip addr add 172.20.1.1/24 dev lan0; ip link set lan0 up; ip link set lan1 up")  # fmt: skip
    forward, egress = "type filter hook forward priority 0", 'type filter hook egress device "{}" priority 0'
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        await kernel.apply(evolve(LEADER, behind=(OFFERED, SERVICES)))
        for family, rules, named in (
            ("inet", f'{forward}; oifname "lan0" drop', [OFFERED]),
            ("inet", f'{forward}; iifname "lan0" drop', [OFFERED]),  # The answers.
            ("inet", f'{forward}; oifname "lan1" drop', []),
            ("inet", f'{forward}; iifname "eth7" oifname "lan0" drop', []),
            ("netdev", f"{egress.format('lan0')}; policy drop", [OFFERED]),
            ("netdev", f"{egress.format('lan1')}; policy drop", []),
        ):
            load(f"table {family} x {{ chain f {{ {rules}; }}\n}}")
            assert cut_networks(await kernel.obstacles()) == named, rules
            sh(f"nft delete table {family} x")


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_a_narrower_route_leads_a_part_of_a_links_network_elsewhere() -> None:
    """As those of VPNs and of containers do, whose devices may have no address in it."""
    sh("ip link add eth0 type veth peer eth1; ip addr add 172.20.0.1/16 dev eth0; ip link set eth0 up; "
       "ip route add default via 172.20.0.2; ip link add vpn0 type veth peer vpn1; ip link set vpn0 up; "
       "ip link set vpn1 up; ip link set eth1 up")  # fmt: skip
    accepting = "policy drop; ct state established,related accept; oifname vpn0 accept"
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        await kernel.apply(evolve(LEADER, behind=(OFFERED,)))
        for rules in (accepting, "oifname eth0 drop"):
            load(f"table inet x {{ chain f {{ type filter hook forward priority 0; {rules}; }}\n}}")
            assert cut_networks([one for one in await kernel.obstacles() if not one.leading]) == [OFFERED], rules
            sh(f"ip route add {OFFERED} dev vpn0")
            assert cut_networks([one for one in await kernel.obstacles() if not one.leading]) == [], rules
            sh(f"ip route del {OFFERED}; nft delete table inet x")
        sh("sysctl -qw net.ipv6.conf.all.forwarding=1; ip addr add fd09::1/64 dev eth0 nodad")
        await kernel.apply(evolve(LEADER, forwarding=frozenset({6}), behind=(ip_network("fd09::/64"),)))
        load("table inet x { chain f { type filter hook forward priority 0; oifname eth0 ip6 daddr fd00::/8 drop; }\n}")
        obstacles = [one for one in await kernel.obstacles() if not one.leading]
        assert cut_networks(obstacles) == [ip_network("fd09::/64")], "the first address is the host's own to IPv6"


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_a_part_of_a_links_network_may_be_for_services() -> None:
    """As the pool of a load balancer is."""
    sh("ip link add eth0 type veth peer eth1; ip addr add 192.168.9.1/24 dev eth0; ip link set eth0 up; "
       "ip route add default via 192.168.9.2")  # fmt: skip
    pool = ip_network("192.168.9.240/28")
    load(
        "table ip n { chain p { type nat hook prerouting priority -100; ip daddr 192.168.9.241 dnat to 10.42.0.1; }\n}"
    )
    head = "table inet x { chain f { type filter hook forward priority 0; policy drop; ct state established accept;"
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        await kernel.apply(evolve(LEADER, behind=(pool, LAN)))
        for rule, named in (
            ("ct status dnat accept", [LAN]),
            ("ip daddr 10.42.0.0/16 accept", [LAN]),
            ("", [pool, LAN]),
        ):
            load(f"{head} {rule}; }}\n}}")
            obstacles = [one for one in await kernel.obstacles() if not one.leading]
            assert sorted(cut_networks(obstacles)) == sorted(named), rule
            sh("nft delete table inet x")


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_what_kube_proxy_drops_of_services_that_are_not_there_is_meant() -> None:
    """It has no IPv6 service yet, and none of UDP. Elsewhere the same drops are none of services."""
    sh("ip link add eth0 type veth peer eth1; ip addr add 192.168.9.1/24 dev eth0; ip link set eth0 up; "
       "ip link set eth1 up; ip route add default via 192.168.9.2")  # fmt: skip
    six = ip_network("fd43::/112")
    elements = "elements = { 10.43.0.1 . tcp . 443 : goto kubernetes };"
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        await kernel.apply(evolve(LEADER, behind=(SERVICES, LAN, six)))
        for table, named in (("kube-proxy", [LAN]), ("own", [LAN, six])):
            load(services_table("ip", table, f"{SERVICES}, {LAN}", elements))
            load(services_table("ip6", table, f"{six}", ""))
            obstacles = await kernel.obstacles()
            assert cut_networks([obstacle for obstacle in obstacles if obstacle.certain]) == named
            unsure = [obstacle.text for obstacle in obstacles if not obstacle.certain]
            assert len(unsure) == (table == "own"), unsure
            sh(f"nft delete table ip {table}; nft delete table ip6 {table}")


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_a_firewall_that_forwards_nothing_new_is_named_beside_kubernetes() -> None:
    sh("ip link add eth0 type veth peer eth1; ip addr add 192.168.9.1/24 dev eth0; ip link set eth0 up; "
       "ip route add default via 192.168.9.2")  # fmt: skip
    load(KUBE_PROXY)
    to_leader = {MESH[0]: RoutePlan(destination=MESH[0], via=Via.UNDERLAY, gateway=ip_address("192.168.9.2"))}
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        await kernel.apply(evolve(OFFERS_SERVICES, routes=to_leader))
        for accepted, certain in (("established", [BOTH]), ("{ established, related }", [BOTH]), ("new", [])):
            load("table inet own { chain f { type filter hook forward priority 0; policy drop; "
                 f"ct state {accepted} accept; }}\n}}")  # fmt: skip
            own = [obstacle for obstacle in await kernel.obstacles() if not obstacle.leading]
            assert [cut_protocols([obstacle]) for obstacle in own] == certain, accepted
            sh("nft delete table inet own")
        for accepting in ("ct status dnat", "ct mark 0x4000", "ip daddr 10.42.0.0/16"):
            load("table inet own { chain f { type filter hook forward priority 0; policy drop; "
                 f"ct state established accept; {accepting} accept; }}\n}}")  # fmt: skip
            assert [one for one in await kernel.obstacles() if not one.leading] == [], accepting
            sh("nft delete table inet own")
        for program in ("iptables-nft", "iptables-legacy"):
            sh(f"{program} -P FORWARD DROP; {program} -A FORWARD -m conntrack --ctstate DNAT,ESTABLISHED -j ACCEPT")
            assert [one for one in await kernel.obstacles() if not one.leading] == [], program
            sh(f"{program} -F FORWARD; {program} -P FORWARD ACCEPT")


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_what_very_many_services_translate_is_of_their_addresses() -> None:
    """More members of a map, rules of a chain and chains than are followed."""
    sh("ip link add eth0 type veth peer eth1; ip addr add 192.168.9.1/24 dev eth0; ip link set eth0 up; "
       "ip route add default via 192.168.9.2")  # fmt: skip
    load(f"{DROPS_SERVICES}\n}}")
    numbers = range(max(hooks.MOST_RULES, MOST_MEMBERS) + 1)
    ends = " ".join(f"chain s{number} {{ dnat to 10.42.0.5; }}\n" for number in range(hooks.MOST_CHAINS + 1))
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        await kernel.apply(OFFERS_SERVICES)
        for network, certain in ((ip_network("10.44.0.0/16"), BOTH), (SERVICES, "")):
            to = [(network[number], f"s{number % (hooks.MOST_CHAINS + 1)}") for number in numbers]
            in_map = ", ".join(f"{address} . tcp . 80 : goto {chain}" for address, chain in to)
            in_rules = "\n".join(f"ip daddr {address} goto {chain}" for address, chain in to)
            for rules in (f"ip daddr . meta l4proto . th dport vmap {{ {in_map} }}", in_rules):
                load(f"table ip n {{ {ends} chain n {{ {rules}\n }}\n chain p {{ {NAT} jump n; }}\n}}")
                assert cut_protocols(await kernel.obstacles()) == certain, rules[:60]
                sh("nft delete table ip n")


@pytest.mark.parametrize(("count", "readings"), [(10, 12), (2000, 3)])
def test_very_many_addresses_of_the_host_are_read_more_rarely(
    count: int, readings: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """10,000 take 0.2 s, while the kernel's one lock is held."""
    now, read = 1000.0, 0
    held = frozenset(SERVICES[number] for number in range(count))

    def own() -> OwnAddresses:
        nonlocal read
        read += 1
        return OwnAddresses(everywhere=held)

    monkeypatch.setattr(time, "monotonic", lambda: now)
    drop, xtables = one_rule(Condition("daddr", SERVICES)), NoXtables("kilo0", tmp_path / "y", lambda: 1)
    chains = ForwardChains("kilo0", tmp_path / "x", Chains(drop), xtables, opening=False, own=own)
    for _ in range(12):
        assert cut_networks(chains.obstacles(OFFERS_SERVICES, ["eth0"])) == [SERVICES]
        now += 10
    assert read == readings


def test_of_a_long_table_of_the_older_xtables_the_addresses_are_known(tmp_path: Path) -> None:
    lines = [
        "-P PREROUTING ACCEPT",
        "-A PREROUTING -j KUBE-SERVICES",
        "-A KUBE-SVC-0 ! -d 172.20.1.0/24 -p tcp -j KUBE-SEP-0",
        "-A KUBE-SVC-0 -s 10.42.0.0/16 -d 172.20.1.1/32 -p tcp -j RETURN",
        "-A POSTROUTING -d 172.20.1.1/32 -j NETMAP --to 10.99.0.0/16",
        '-A KUBE-SVC-0 -p tcp -m comment --comment "see -d here" -j KUBE-SEP-0',
        *(f"-A KUBE-SERVICES -d {SERVICES[number]}/32 -p tcp -m tcp --dport 443 -j KUBE-SVC-{number}"
          for number in range(5000)),
    ]  # fmt: skip
    nat = translation_from_iptables("\n".join(lines), 4)
    drop = one_rule(Condition("daddr", (SERVICES, OFFERED)))
    chains = ForwardChains(
        "kilo0", tmp_path / "x", Chains(nat, drop), NoXtables("kilo0", tmp_path / "y", lambda: 1), opening=False
    )
    assert cut_networks(chains.obstacles(evolve(LEADER, behind=(SERVICES, OFFERED)), ["eth0"])) == [OFFERED]


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_a_drop_for_a_member_or_a_link_is_named_beside_translations_of_ports_and_of_single_addresses() -> None:
    sh("ip link add eth0 type veth peer eth1; ip addr add 192.168.9.1/24 dev eth0; ip link set eth0 up; "
       "ip link set eth1 up; ip route add default via 192.168.9.2")  # fmt: skip
    load(f"table ip x {{ chain f {{ type filter hook forward priority 0; ip daddr {{ {MEMBER}, {LAN} }} drop; }}\n}}")
    member = RoutePlan(destination=MEMBER, via=Via.UNDERLAY, gateway=ip_address("192.168.9.2"))
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        await kernel.apply(evolve(LEADER, routes={**LEADER.routes, MEMBER: member}, behind=(LAN,)))
        for rules in ("", "udp dport 53 redirect; tcp dport 53 redirect;", f"ip daddr {LAN_ADDRESS} dnat to 10.42.0.5;",
                      "tcp dport vmap { 53 : goto d, 80 : goto d };"):  # fmt: skip
            load(f"table ip n {{ chain d {{ dnat to 10.42.0.5; }}\n chain n {{ {NAT} {rules} }}\n}}")
            assert set(cut_networks(await kernel.obstacles())) == {MEMBER, LAN}, rules
            sh("nft delete table ip n")
        load(f"table ip n {{ chain n {{ {NAT} ip daddr {LAN} dnat to 10.42.0.5; }}\n}}")
        assert cut_networks(await kernel.obstacles()) == [MEMBER], "all of the network is translated"


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_what_iptables_and_its_older_tables_translate_is_seen() -> None:
    sh("ip link add eth0 type veth peer eth1; ip addr add 192.168.9.1/24 dev eth0; ip link set eth0 up; "
       "ip route add default via 192.168.9.2")  # fmt: skip
    load(f"{DROPS_SERVICES}\n}}")
    docker = (
        "-A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER",
        "-A DOCKER -p tcp --dport 80 -j DNAT --to 172.17.0.2",
    )
    services = (
        "-A PREROUTING ! -i eth7 -j SERVICES",
        "-A SERVICES -d 10.43.0.1/32 -p tcp --dport 443 -j DNAT --to 10.42.0.5",
    )
    for program in ("iptables-nft", "iptables-legacy"):
        for rules, certain in ((("-N DOCKER", *docker), BOTH), (("-N SERVICES", *services), "UDP")):
            sh("; ".join(f"{program} -t nat {rule}" for rule in rules))
            async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
                await kernel.apply(OFFERS_SERVICES)
                assert cut_protocols(await kernel.obstacles()) == certain, (program, rules)
        sh(f"{program} -t nat -F; {program} -t nat -X")


def test_a_drop_is_known_while_another_program_holds_the_lock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    names, now, locked = tmp_path / "names", 1000.0, False
    names.write_text("filter")

    def run(*command: str) -> str:
        nonlocal now
        if locked:
            now += iptables._LOCK_SECONDS
            raise iptables.IptablesError("Another app is currently holding the xtables lock")
        return "-P FORWARD DROP"

    monkeypatch.setattr(iptables, "_LEGACY_TABLES", {4: names, 6: tmp_path / "none"})
    monkeypatch.setattr(iptables, "_run", run)
    monkeypatch.setattr(shutil, "which", lambda name, path: name if "legacy" in name else None)
    monkeypatch.setattr(time, "monotonic", lambda: now)
    xtables = Iptables("kilo0", tmp_path / "y", lambda: 1)
    for _ in range(3):
        chain = xtables.legacy(4, patience=15)
        assert chain is not None
        assert chain.drops
        now, locked = now + 100, True
    names.write_text("")
    assert xtables.legacy(4, patience=15) is None, "the table is gone"


@pytest.mark.parametrize(
    ("programs", "printed", "certain"),
    [
        ((), None, False),
        (("iptables",), "-P PREROUTING ACCEPT", False),  # It keeps nftables, and the tables are of another time.
        (("iptables",), "iptables v1.6.1", True),
        (("iptables-legacy", "iptables"), "-P PREROUTING ACCEPT", True),
        (("iptables-legacy", "iptables"), None, False),
        (("iptables-legacy", "iptables"), "", False),
    ],
)
def test_a_table_of_the_older_xtables_that_is_not_to_be_read_may_translate_all(
    programs: tuple[str, ...], printed: str | None, certain: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = "v1.6" in (printed or "")

    def run(*command: str) -> str:
        if command[1] == "--version":
            return "iptables v1.6.1" if old else "iptables v1.8.9 (nf_tables)"
        if printed is None:
            raise iptables.IptablesError("it fails")
        assert "legacy" in command[0] or old
        return "-P PREROUTING ACCEPT" if old else printed

    names = tmp_path / "names"
    names.write_text("nat\n")
    monkeypatch.setattr(iptables, "_LEGACY_TABLES", {4: names, 6: tmp_path / "none"})
    monkeypatch.setattr(iptables, "_run", run)
    monkeypatch.setattr(shutil, "which", lambda name, path: name if name in programs else None)
    drops_services = one_rule(Condition("daddr", SERVICES))
    xtables = Iptables("kilo0", tmp_path / "y", lambda: 1)
    chains = ForwardChains("kilo0", tmp_path / "x", Chains(drops_services), xtables, opening=False)
    assert cut_networks(chains.obstacles(OFFERS_SERVICES, ["eth0"])) == ([SERVICES] if certain else [])
    names.write_text("filter\n")
    xtables = Iptables("kilo0", tmp_path / "y", lambda: 1)
    chains = ForwardChains("kilo0", tmp_path / "x", Chains(drops_services), xtables, opening=False)
    assert cut_networks(chains.obstacles(OFFERS_SERVICES, ["eth0"])) == [SERVICES], "there is no such table"


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_what_translates_sources_alone_leaves_a_drop_certain() -> None:
    """As libvirt, Docker and kube-proxy do, in chains of their own."""
    sh("ip link add eth0 type veth peer eth1; ip addr add 192.168.9.1/24 dev eth0; ip link set eth0 up; "
       "ip route add default via 192.168.9.2")  # fmt: skip
    behind = ip_network("10.1.0.0/16")
    load(f"table inet x {{ chain f {{ type filter hook forward priority 0; ip saddr {behind} drop; }}\n}}")
    many = "".join(f"ip saddr 192.168.122.{number % 256} masquerade\n" for number in range(hooks.MOST_RULES + 1))
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        await kernel.apply(evolve(LEADER, behind=(behind,)))
        assert cut_networks(await kernel.obstacles()) == [behind]
        sh("iptables-nft -t nat -N X; iptables-nft -t nat -A X -s 192.168.122.0/24 -j MASQUERADE; "
           "iptables-nft -t nat -A POSTROUTING -j X")  # fmt: skip
        assert cut_networks(await kernel.obstacles()) == [behind]
        sh("iptables-nft -t nat -F; iptables-nft -t nat -X")
        sh("iptables-nft -t nat -A POSTROUTING -s 10.4.0.0/16 -j NETMAP --to 10.99.0.0/16")
        assert cut_networks(await kernel.obstacles()) == [behind]
        sh("iptables-nft -t nat -F")
        load(f"table ip n {{ chain p {{ type nat hook postrouting priority 100; {many} }}\n}}")
        assert cut_networks(await kernel.obstacles()) == [behind]


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_a_destination_that_is_written_beside_a_translation_or_by_a_prefix_is_translated() -> None:
    sh("ip link add eth0 type veth peer eth1; ip addr add 192.168.9.1/24 dev eth0; ip link set eth0 up; "
       "ip route add default via 192.168.9.2")  # fmt: skip
    six = ip_network("fd00:43::/64")
    prefix = f"ip6tables-nft -t mangle -A PREROUTING -d {six} -j DNPT --src-pfx {six} --dst-pfx fd00:42::/64"
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        await kernel.apply(evolve(LEADER, behind=(SERVICES, six)))
        load(f"table inet x {{ chain f {{ type filter hook forward priority 0; ip saddr {SERVICES} drop; "
             f"ip6 daddr {six} drop; }}\n}}")  # fmt: skip
        assert cut_networks(await kernel.obstacles()) == [SERVICES, six]
        for written, others in (("saddr set fd00:42::5 ip6 hoplimit set 9 ip6 dscp set cs1", [six]),
                                ("daddr set fd00:42::5", [])):  # fmt: skip
            load(f"table inet n {{ chain p {{ type filter hook prerouting priority -150; ip6 daddr {six} "
                 f"ip6 {written}; }}\n}}")  # fmt: skip
            assert cut_networks(await kernel.obstacles()) == [SERVICES, *others], written
            sh("nft delete table inet n")
        load("table inet n { chain p { type filter hook prerouting priority -150; meta nfproto ipv6 iifname kilo0 "
             "ip6 daddr set fd00:42::5; }\n}")  # fmt: skip
        assert cut_networks(await kernel.obstacles()) == [SERVICES], "of all that comes in"
        sh("nft delete table inet n")
        sh(prefix)
        assert cut_networks(await kernel.obstacles()) == [SERVICES]
        load("table ip n { chain p { type nat hook postrouting priority 100; "
             f"ip daddr {SERVICES} ip daddr set 10.42.0.5 masquerade; }}\n}}")  # fmt: skip
        assert cut_networks(await kernel.obstacles()) == [], "the answers have another source"


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_what_is_for_the_host_itself_is_not_forwarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sh("ip link add eth0 type veth peer eth1; ip addr add 192.168.9.1/24 dev eth0; ip link set eth0 up; "
       "ip route add default via 192.168.9.2")  # fmt: skip
    both = "{ 10.43.0.0/16, 192.168.9.0/24 }"
    load(f"table ip x {{ chain f {{ type filter hook forward priority 0; ip daddr {both} drop; }}\n}}")
    alone = ip_network("192.168.9.1/32")
    link = ip_network("192.168.9.0/24")
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        await kernel.apply(evolve(LEADER, behind=(SERVICES, link, alone)))
        assert cut_networks(await kernel.obstacles()) == [SERVICES, link]
        # As a router has its own name, and another address that several hosts have.
        sh("ip addr add 10.43.0.10/32 dev lo; ip addr add 10.43.0.1/32 dev lo")
        assert cut_networks(await kernel.obstacles()) == [SERVICES, link]
        # Of an address on a link the neighbours are elsewhere, whoever is balanced there.
        table = tmp_path / "ip_vs"
        monkeypatch.setattr(ipvs, "TABLE", table)
        table.write_text(BALANCED.replace("0A2B0001", "C0A80901"))
        assert cut_networks(await kernel.obstacles()) == [SERVICES, link]
        sh("ip addr add 192.168.9.240/32 dev lo")
        table.write_text(BALANCED.replace("0A2B0001", "C0A809F0"))
        assert cut_networks(await kernel.obstacles()) == [SERVICES, link]
        # At any address of its loopback device, if it does not show where.
        monkeypatch.setattr(ipvs, "TABLE", tmp_path)
        assert cut_networks(await kernel.obstacles()) == [link]
        monkeypatch.setattr(ipvs, "TABLE", table)
        # As kube-proxy does in its mode ipvs, with a dummy.
        table.write_text(BALANCED)
        assert cut_networks(await kernel.obstacles()) == [link]
        # Where the host itself takes them is not before hook prerouting.
        sh("nft delete table ip x")
        load("table ip x { chain f { type filter hook prerouting priority 0; ip daddr 10.43.0.0/16 drop; }\n}")
        assert cut_networks(await kernel.obstacles()) == [SERVICES]
        sh("nft delete table ip x")
        load("table ip x { chain f { type filter hook prerouting priority 0; fib daddr type local accept; "
             f"ip daddr {both} drop; }}\n}}")  # fmt: skip
        assert cut_networks(await kernel.obstacles()) == [link]
        # What is forwarded is for no address of the host.
        sh("nft delete table ip x")
        load("table ip x { chain f { type filter hook prerouting priority 0; fib daddr type local accept; drop; }\n}")
        assert cut_networks(await kernel.obstacles()) == [link]


BALANCED = """IP Virtual Server version 1.2.1 (size=4096)
Prot LocalAddress:Port Scheduler Flags
  -> RemoteAddress:Port Forward Weight ActiveConn InActConn
TCP  0A2B0001:01BB rr
  -> 0A2A0005:192B      Masq    1      0          0
UDP  [fd43:0000:0000:0000:0000:0000:0000:000a]:0035 rr persistent 10800
  -> [fd42:0000:0000:0000:0000:0000:0000:0005]:0035 Masq 1 0 0
FWM  00000007 wlc
"""
"""As /proc/net/ip_vs has it."""


def test_the_addresses_of_ipvs_are_those_of_virtual_servers() -> None:
    assert ipvs.addresses(BALANCED) == {ip_address("10.43.0.1"), ip_address("fd43::a")}


def test_only_a_kernel_without_ipvs_balances_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else services would be taken for networks that are forwarded, and their drops for faults."""
    monkeypatch.setattr(ipvs, "TABLE", tmp_path / "none")
    assert ipvs.read() == frozenset()
    monkeypatch.setattr(ipvs, "TABLE", tmp_path)
    assert ipvs.read() is None, "it cannot be read"
    table = tmp_path / "ip_vs"
    table.write_text(BALANCED)
    monkeypatch.setattr(ipvs, "TABLE", table)

    def exhausted(path: Path) -> str:
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Path, "read_text", exhausted)
    with pytest.raises(OSError, match="Too many open files"):
        ipvs.read()


def of_services(*addresses: str, balanced: str = "") -> OwnAddresses:
    held = frozenset(map(ip_interface, addresses))
    everywhere = frozenset(one.ip for one in held)
    return OwnAddresses(everywhere=everywhere, for_services=held, balanced=frozenset(map(ip_address, balanced.split())))


@pytest.mark.parametrize(
    ("own", "local", "forwarded"),
    [
        (of_services(), "", "10.43.0.0/16 10.43.0.1/32"),
        (of_services("127.0.0.1/8", "127.0.0.2/32"), "", "0.0.0.0/1 64.0.0.0/2 127.0.0.0/8"),
        (of_services("127.0.0.1/8", balanced="127.0.0.1"), "", "0.0.0.0/1 64.0.0.0/2"),
        (of_services("::1/128", "fe80::1/64", "fe80::2/64"), "::1/128", "::/0 fe80::/10 fe80::/64"),
        (of_services("10.43.0.10/32"), "10.43.0.10/32", "10.43.0.0/16 10.0.0.0/8 10.43.0.10/31 10.43.0.1/32"),
        (of_services("10.43.0.10/32", "10.43.9.1/32"), "", "10.43.0.0/16 10.0.0.0/8 10.43.0.0/24 10.43.9.0/24"),
        (of_services("10.43.0.1/32", balanced="10.43.0.1 10.44.0.9"), "10.43.0.0/16 10.43.0.0/31 10.43.0.1/32",
         "10.43.0.2/31 10.43.1.0/24 10.44.0.0/16 10.44.0.9/32"),
        (of_services("10.43.0.1/16"), "10.43.0.0/16 10.43.1.0/24 10.43.0.9/32", "10.0.0.0/8 10.44.0.0/16"),
        (of_services("fd43::1/128", "fd43::2/128", balanced="fd43::2"), "fd43::/112 fd00::/8",
         "fd42::/112 fd43::3/128"),
        # As a load balancer is given an address of the LAN.
        (evolve(of_services("192.168.9.240/32", balanced="192.168.9.240"), links={LAN: frozenset(("br9",))}),
         "192.168.9.240/32 192.168.9.240/29", "192.168.9.0/24 192.168.0.0/16 192.168.9.0/29 192.168.9.241/32"),
    ],
)  # fmt: skip
def test_a_network_counts_as_the_hosts_own_if_its_loopback_holds_it_or_addresses_of_it_that_are_balanced(
    own: OwnAddresses, local: str, forwarded: str
) -> None:
    for networks, expected in ((local, True), (forwarded, False)):
        for network in networks.split():
            assert own.may_be(ip_network(network)) is expected, network


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_a_chain_that_forwards_some_protocols_is_named_with_the_others() -> None:
    sh("ip link add eth0 type veth peer eth1; ip addr add 192.168.9.1/24 dev eth0; ip link set eth0 up; "
       "ip route add default via 192.168.9.2")  # fmt: skip
    head = "table inet x { chain f { type filter hook forward priority 0; policy"
    tcp, all_but_icmp = "TCP packets that this host forwards", "TCP and UDP packets that this host forwards"
    cases = {
        "drop; meta l4proto icmp accept;": all_but_icmp,
        "drop; ip protocol icmp accept;": all_but_icmp,
        "drop; meta l4proto { icmp, udp } accept;": tcp,
        "drop; icmp type echo-request accept;": all_but_icmp,
        "drop; meta l4proto != tcp accept;": tcp,
        "accept; meta l4proto tcp drop;": tcp,
        "accept; ip protocol tcp reject;": tcp,
        "accept; tcp dport 25 drop;": "",
        "drop; meta l4proto { tcp, udp, icmp } accept;": "",
    }
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        await kernel.apply(LEADER)
        for rules, dropped in cases.items():
            load(f"{head} {rules} }}\n}}")
            named = [obstacle.text.partition(" between ")[0] for obstacle in await kernel.obstacles()]
            assert named == ([f"the firewall drops {dropped}"] if dropped else []), rules
            sh("nft delete table inet x")
        sh("iptables -P FORWARD DROP; iptables -A FORWARD -p icmp -j ACCEPT")
        (obstacle,) = await kernel.obstacles()
        assert (obstacle.certain, obstacle.blocked) == (True, frozenset()), "echo requests pass, so it may lead"
        assert obstacle.text.startswith(f"the firewall drops {all_but_icmp}")


HOST_CHAINS = [
    # A hook, rules, what is said of the packets, and whether a firewall may mean it.
    ("input", "meta l4proto tcp ip saddr != 192.0.2.1 drop", "TCP packets that come in from", True),
    ("input", "iifname kilo0 meta l4proto { tcp, udp } reject", "TCP and UDP packets that come in from", True),
    ("input", "tcp dport 7777 drop", "", True),
    ("input", "ct state invalid drop", "", True),
    ("input", "iifname eth9 drop", "", True),
    ("input", "ct state established accept; meta l4proto icmp accept; tcp dport 22 accept; drop",
     "UDP packets that come in from", True),
    ("input", "ct state established accept; iifname kilo0 accept; drop", "", True),
    ("prerouting", "ip saddr 10.4.0.0/16 meta l4proto tcp drop", "TCP packets that come in from", False),
    ("output", "oifname kilo0 meta l4proto udp drop", "UDP packets that go out to", False),
    ("output", "udp dport 53 drop", "", False),
    ("postrouting", "ip daddr 10.0.0.0/8 meta l4proto tcp drop", "TCP packets that go out to", False),
    ("postrouting", "ip daddr 192.0.2.0/24 drop", "", False),
]  # fmt: skip


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_what_drops_all_that_the_host_itself_sends_or_gets_is_named() -> None:
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        assert await kernel.refusals() == ()
        await kernel.apply(LEADER)
        assert await kernel.refusals() == (), "our own table refuses nothing"
        for hook, rules, what, meant in HOST_CHAINS:
            load(f"table inet x {{ chain c {{ type filter hook {hook} priority 0; policy accept; {rules}; }}\n}}")
            refusals = await kernel.refusals()
            if not what:
                assert refusals == (), rules
            else:
                (refusal,) = refusals
                assert refusal.text.startswith(f"the firewall drops all {what}"), (rules, refusal.text)
                assert "the chain c of nftables table inet x" in refusal.text
                assert refusal.meant is meant, rules
            sh("nft delete table inet x")
        sh("iptables -A OUTPUT -o kilo0 -p tcp -j DROP")
        (refusal,) = await kernel.refusals()
        assert "drops all TCP packets that go out to the mesh by kilo0 (IPv4)" in refusal.text


ECHOES = [
    # Rules of hook input, and whether they count echo requests against a limit.
    ("icmp type echo-request limit rate 5/second accept; icmp type echo-request drop", True),
    ("meta l4proto icmp limit rate over 10/second drop", True),
    ("limit rate over 1000/second drop", True),
    ("tcp flags syn limit rate 25/second accept", False),
    ("iifname eth9 icmp type echo-request limit rate 5/second accept", False),
    ("icmp type echo-request accept; drop", False),
]


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_a_limit_on_echo_requests_is_told() -> None:
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        await kernel.apply(LEADER)
        for rules, limits in ECHOES:
            load(f"table inet x {{ chain c {{ type filter hook input priority 0; policy accept; {rules}; }}\n}}")
            refusals = [refusal for refusal in await kernel.refusals() if refusal.limits_echoes]
            assert len(refusals) == limits, rules
            assert all("the chain c of nftables table inet x" in refusal.text for refusal in refusals)
            sh("nft delete table inet x")
        sh("iptables -A INPUT -p icmp -m limit --limit 5/s -j ACCEPT")
        (refusal,) = await kernel.refusals()
        assert (refusal.limits_echoes, refusal.meant) == (True, True)


PORTS = "meta l4proto . th dport"
NEW = "ct state . ip saddr"
PAIR = "iifname . oifname"
LOOKED_UP = [
    # Rules before a drop; of TCP, UDP and ICMP what is dropped from kilo0 to eth0, and from eth0 to kilo0.
    (f"{PORTS} {{ tcp . 22, udp . 53 }} accept", "??D ??D"),
    (f"{PORTS} {{ tcp . 22-30 }} accept", "?DD ?DD"),
    (f"{PORTS} {{ tcp . 0-65535 }} accept; meta l4proto udp accept", "?-D ?-D"),
    (f"{PORTS} {{ tcp . 25 }} drop; accept", "--- ---"),
    (f"{PORTS} {{ tcp . 25 }} reject; accept", "--- ---"),
    (f"{PORTS} != {{ tcp . 25 }} accept", "?-- ?--"),
    (f"{PORTS} vmap {{ tcp . 25 : drop, udp . 53 : accept }}", "D?D D?D"),
    ("ip protocol . th dport { tcp . 22 } accept", "?DD ?DD"),
    ("ip protocol . ip saddr { tcp . 10.0.0.0/8 } accept", "-DD -DD"),
    ("meta l4proto { 1, 4-17 } accept", "--- ---"),
    ("meta l4proto 2-17 accept", "--D --D"),
    ("meta l4proto { 0-5, 7-16 } accept", "DD- DD-"),
    ("meta l4proto { 6, 18-255 } accept", "-DD -DD"),
    ("meta l4proto != { 2-16, 18-255 } accept", "D-- D--"),
    ("meta l4proto vmap { tcp : accept, 7-17 : drop }; accept", "-D- -D-"),
    ("meta l4proto vmap { 6 : drop, * : accept }", "D-- D--"),
    ("meta l4proto vmap { tcp : jump other, udp : goto other }; accept", "-D- -D-"),
    ("meta l4proto vmap { tcp : continue, udp : return }; accept", "-D- -D-"),
    (f'{PAIR} {{ "kilo0" . "eth0", "eth0" . "kilo0" }} accept', "--- ---"),
    (f'{PAIR} {{ "kilo0" . "eth1", "eth1" . "kilo0" }} accept', "DDD DDD"),
    (f'{PAIR} {{ "kilo0" . "eth*" }} accept', "--- DDD"),
    (f'{PAIR} vmap {{ "kilo0" . "eth0" : accept, "eth0" . "kilo0" : drop }}', "--- DDD"),
    (f'{PAIR} . meta l4proto {{ "kilo0" . "eth0" . tcp }} accept', "-DD DDD"),
    ('iifname . tcp dport { "kilo0" . 22 } accept', "?DD DDD"),
    ('iifname { "kil*", "eth1" } accept', "--- DDD"),
    ("iifname vmap { kilo0 : accept, eth1 : drop }", "--- DDD"),
    ('iif . oif { "lo" . "lo" } drop; accept', "--- ---"),
    (f"{NEW} {{ new . 192.168.9.9 }} accept", "DDD DDD"),
    (f"{NEW} {{ new . 10.4.1.1 }} accept", "??? ???"),
    (f"{NEW} {{ new . 10.0.0.0/8 }} accept", "--- ---"),
    (f"{NEW} {{ established . 10.0.0.0/8 }} accept", "DDD DDD"),
    ("ct state . meta l4proto { new . udp, established . tcp } accept", "D-D D-D"),
    ("ct state vmap { established : accept, new : jump other }", "DDD DDD"),
    ("ct state & (new | established) == established accept", "DDD DDD"),
    ("ip saddr { 10.0.0.0/8, 192.168.0.0-192.168.0.9 } ip daddr 10.0.0.0/8 accept", "--- ---"),
    ("ip saddr { 10.4.0.0/17, 10.4.128.0/17 } accept", "--- ---"),
    ("ip saddr { 10.4.0.0-10.4.0.9 } accept", "??? ???"),
    ("ip saddr != { 192.168.0.0/16 } accept", "--- ---"),
    ("ip saddr . ip daddr { 10.4.0.0/16 . 10.4.0.0/16 } accept", "--- ---"),
    ("ip saddr 10.4.0.0-10.4.255.255 accept", "--- ---"),
    ("ip saddr 10.4.0.0-10.4.0.9 accept", "??? ???"),
    ("ip saddr 10.5.0.0-10.9.0.0 accept", "DDD DDD"),
    ("ip saddr > 10.3.255.255 accept", "--- ---"),
    ("ip saddr >= 10.4.0.1 accept", "??? ???"),
    ("ip saddr < 10.4.0.0 accept", "DDD DDD"),
    ("ip saddr <= 10.4.255.255 accept", "--- ---"),
    ("meta protocol ip drop; accept", "DDD DDD"),
    ("meta protocol { ip, arp } accept", "--- ---"),
    ("meta protocol ip6 drop; accept", "--- ---"),
    ("ct state established,related accept", "DDD DDD"),
    ("ct state established,related,untracked accept", "??? ???"),
    ("ct state vmap { established : accept, untracked : accept }", "??? ???"),
    ("ct state new,untracked accept", "--- ---"),
    ("ct state != untracked accept", "--- ---"),
    ("ip saddr & 255.0.0.255 == 10.0.0.1 accept", "??? ???"),
    ("ip6 saddr fd00::/8 drop; accept", "--- ---"),
    ("meta nfproto vmap { ipv4 : accept }", "--- ---"),
    # What else decides whether a rule matches, or writes into registers.
    ("meta l4proto tcp fib daddr type unicast accept", "?DD ?DD"),
    ("meta mark set iifname map { kilo0 : 1, eth1 : 2 } accept", "--- DDD"),
    ("meta mark set 7 accept", "--- ---"),
    ("ip saddr @members accept", "--- ---"),
    ("ip saddr @learnt accept", "??? ???"),
    ("add @learnt { ip saddr } accept", "--- ---"),
    ("add @learnt { ip saddr limit rate 5/second } accept", "??? ???"),
    ("ip saddr @limited accept", "??? ???"),
    ('limit name "slow" accept', "??? ???"),
    ('counter name "seen" accept', "--- ---"),
    ("meta l4proto @many accept", "-DD -DD"),
]


def letters(chain: BaseChain, out: str, back: str) -> str:
    shown = {True: "D", False: "-", None: "?"}
    ways = ((out, back), (back, out))
    protocols = ("tcp", "udp", "icmp")
    return " ".join("".join(shown[drops(chain, Packet(4, *way, MESH, name))] for name in protocols) for way in ways)


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
def test_sets_and_maps_are_read_field_by_field_and_range_by_range() -> None:
    declared = """
      set members { type ipv4_addr; flags interval; counter; elements = { 10.0.0.0/8 } }
      set learnt { type ipv4_addr; size 99; flags dynamic; elements = { 10.4.0.1 } }
      set limited { typeof ip saddr; limit rate 5/second; flags interval; elements = { 10.0.0.0/8 } }
      set many { type inet_proto; elements = { tcp } }
      counter seen { }
      limit slow { rate 5/second }
      chain other { }
    """
    netfilter = Netfilter()
    for rules, expected in LOOKED_UP:
        last = "" if rules.endswith("; accept") else "; drop"
        base = "chain f { type filter hook forward priority 0; policy drop;"
        load(f"table inet x {{ {declared}\n {base} {rules}{last}; }}\n}}")
        (chain,) = netfilter.forward_chains()
        assert letters(chain, "kilo0", "eth0") == expected, (rules, chain.rules)
        sh("nft delete table inet x")
    load("table inet x { chain f { type filter hook forward priority 0; policy drop; ip6 saddr fd00::/8 accept; }\n}")
    (chain,) = netfilter.forward_chains()
    assert drops(chain, Packet(6, "kilo0", "eth0", (ip_network("fd04::/48"),), "tcp")) is False
    assert drops(chain, Packet(6, "kilo0", "eth0", (ip_network("2001:db8::/48"),), "tcp")) is True
    netfilter.close()


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
def test_keys_of_several_lengths_in_one_set_are_not_readable() -> None:
    """The rule that uses it cannot be told then; the others are read."""
    keys = (b"\x01", b"\x0a\x04\x00\x00")
    members = [{"NFTA_SET_ELEM_KEY": struct.pack("=HH", 4 + len(key), 1) + key.ljust(4, b"\0")} for key in keys]
    with pytest.raises(UNREADABLE):
        list(_ranges(members, _INTERVAL))


def test_a_goto_that_may_match_takes_a_packet_past_the_rest_of_its_chain() -> None:
    netfilter = Netfilter()
    for policy, rules, expected in (
        ("accept", "tcp dport 1-65535 goto empty; drop", "?DD ?DD"),
        ("drop", "tcp dport 1-65535 goto empty; drop", "DDD DDD"),
        ("accept", "tcp dport 1-65535 goto dropping; drop", "DDD DDD"),
        ("accept", "tcp dport 1-65535 jump empty; drop", "DDD DDD"),
        ("drop", "jump inner; accept", "?DD ?DD"),
    ):
        chains = "chain empty { }\nchain dropping { drop\n}\nchain inner { tcp dport 1-65535 goto empty; drop\n}\n"
        base = f"chain f {{ type filter hook forward priority 0; policy {policy}; {rules}; }}"
        load(f"table inet x {{ {chains} {base}\n}}")
        (chain,) = netfilter.forward_chains()
        assert letters(chain, "kilo0", "eth0") == expected, (policy, rules)
        sh("nft delete table inet x")
    netfilter.close()


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
def test_a_table_that_is_switched_off_drops_nothing() -> None:
    netfilter = Netfilter()
    for flags, number in (("", 1), ("flags dormant;", 0)):
        load(f"table inet x {{ {flags} chain f {{ type filter hook forward priority 0; policy drop; }}\n}}")
        assert len(netfilter.forward_chains()) == number
        sh("nft delete table inet x")
    netfilter.close()


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
def test_a_large_set_and_a_map_to_many_chains_cannot_be_told() -> None:
    base = "chain f { type filter hook forward priority 0; policy drop;"
    addresses = ", ".join(str(ip_network("10.4.0.0/16")[2 * number]) for number in range(MOST_MEMBERS + 1))
    names = [f"c{number}" for number in range(MOST_TARGETS + 1)]
    chains = " ".join(f"chain {name} {{ }}\n" for name in names)
    targets = ", ".join(f'"eth{number}" : jump {name}' for number, name in enumerate(names))
    netfilter = Netfilter()
    for rules in (f"{base} ip saddr {{ {addresses} }} accept; }}", f"{chains} {base} iifname vmap {{ {targets} }}; }}"):
        load(f"table inet x {{ {rules}\n}}")
        (chain,) = netfilter.forward_chains()
        assert letters(chain, "kilo0", "eth0") == "??? ???"
        assert len(chain.chains) == 1
        sh("nft delete table inet x")
    netfilter.close()


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
def test_a_target_of_iptables_that_hands_packets_to_a_program_may_let_them_through() -> None:
    sh("iptables -P FORWARD DROP; iptables -A FORWARD -p tcp -j NFQUEUE; iptables -A FORWARD -p udp -j LOG")
    netfilter = Netfilter()
    (chain,) = netfilter.forward_chains()
    assert letters(chain, "kilo0", "eth0") == "?DD ?DD"
    netfilter.close()


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
def test_every_hook_that_a_forwarded_packet_passes_is_looked_at() -> None:
    netfilter = Netfilter()
    both = "meta l4proto { tcp, udp } drop"
    for family, declared, rule, expected in (
        ("ip", "type filter hook postrouting priority 5", f'oifname "eth0" iifname "kilo0" {both}', "DD- ---"),
        ("ip", "type nat hook postrouting priority 5", f'oifname "eth0" {both}', "DD- ---"),
        ("ip", "type nat hook postrouting priority 5", 'oifname "eth0" masquerade; drop', "--- DDD"),
        ("ip", "type nat hook prerouting priority 5", f"jump c; {both}", "??- ??-"),
        ("inet", "type filter hook prerouting priority 5", f'iifname "kilo0" {both}', "DD- ---"),
        ("inet", "type filter hook prerouting priority 5", f'oifname "eth0" {both}', "--- ---"),
        ("inet", 'type filter hook ingress device "kilo0" priority 5', both, "DD- ---"),
        ("netdev", 'type filter hook ingress device "kilo0" priority 5', both, "DD- ---"),
        ("netdev", 'type filter hook ingress devices = { "eth0", "eth1" } priority 5', both, "--- DD-"),
        ("netdev", 'type filter hook egress device "eth0" priority 5', f"ip saddr 10.0.0.0/8 {both}", "DD- ---"),
        ("netdev", 'type filter hook egress device "eth0" priority 5', f"ip6 saddr fd00::/8 {both}", "--- ---"),
    ):
        load(f"table {family} x {{ chain c {{ }}\n chain f {{ {declared}; policy accept; {rule}; }}\n}}")
        (chain,) = netfilter.passed_chains()
        assert letters(chain, "kilo0", "eth0") == expected, (declared, rule)
        assert netfilter.forward_chains() == (), "no other is opened"
        sh(f"nft delete table {family} x")
    # Newer kernels keep a chain whose device is gone.
    sh("ip link add eth8 type veth peer eth9")
    load('table netdev x { chain f { type filter hook ingress device "eth8" priority 5; policy drop; }\n}')
    sh("ip link delete eth8")
    assert all(letters(chain, "kilo0", "eth0") == "--- ---" for chain in netfilter.passed_chains())
    netfilter.close()


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_every_forward_chain_is_looked_at_and_opened_on_request() -> None:
    sh(
        "ip link add eth0 type veth peer eth1; ip link set eth1 up; ip addr add 192.168.9.1/24 dev eth0; "
        "ip link set eth0 up; ip route add default via 192.168.9.2"
    )
    load(FIREWALLD)
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        await kernel.apply(LEADER)
        (obstacle,) = await kernel.obstacles()
        assert obstacle.certain
        assert obstacle.text == (
            "the firewall drops what this host forwards between kilo0 and eth0 (IPv4), in the chain filter_FORWARD of "
            "nftables table inet firewalld (a rule there drops what no other accepts): set KILO_FORWARD_RULES=true, "
            "which lets the mesh's packets through and no others; or, if none of these devices has a public address: "
            "firewall-cmd --permanent --zone=trusted --add-interface=kilo0 --add-interface=eth0 && "
            "firewall-cmd --reload"
        )
        # As firewalld does when kilo0 and eth0 are in its trusted zone.
        sh("nft insert rule inet firewalld filter_FORWARD_POLICIES iifname kilo0 accept; "
           "nft insert rule inet firewalld filter_FORWARD_POLICIES iifname eth0 goto filter_FWD_public")  # fmt: skip
        assert await kernel.obstacles() == ()
        # A prefix, a network; and a chain that drops all but some.
        sh("nft delete table inet firewalld")
        load("table ip x { chain f { type filter hook forward priority 0; policy drop;"
             "iifname \"kil*\" accept; ip daddr 10.0.0.0/8 ct state new accept; }\n}")  # fmt: skip
        assert await kernel.obstacles() == ()
        sh("nft flush chain ip x f; nft add rule ip x f meta mark 7 accept")
        (obstacle,) = await kernel.obstacles()
        assert not obstacle.certain
        sh("nft delete table ip x; sysctl -qw net.ipv4.conf.eth0.forwarding=0")
        (obstacle,) = await kernel.obstacles()
        assert obstacle.text.startswith("net.ipv4.conf.eth0.forwarding is 0")
        assert obstacle.certain
        assert obstacle.blocked == {4}
        sh("sysctl -qw net.ipv4.conf.eth0.forwarding=1")
    load(FIREWALLD)
    async with open_kernel(Setup(private_key=PRIVATE, forward_rules=True)) as kernel:
        report = await kernel.apply(LEADER, fresh=True)
        assert report.failures == ()
        made = [str(change) for change in report.changes if "firewalld" in str(change)]
        assert made == [
            'nft insert rule inet firewalld filter_FORWARD iifname "kilo0" accept comment "kilo-etcd:kilo0 -i kilo0"',
            'nft insert rule inet firewalld filter_FORWARD oifname "kilo0" accept comment "kilo-etcd:kilo0 -o kilo0"',
        ]
        assert await kernel.obstacles() == ()
        writes = kernel.writes
        assert (await kernel.apply(LEADER, fresh=True)).changes == ()
        assert kernel.writes == writes
        # firewalld is reloaded.
        sh("nft delete table inet firewalld")
        with trio.fail_after(30):
            assert "filter_FORWARD of table firewalld" in await kernel.wait_drift()
        await kernel.apply(LEADER, fresh=True)
        load(FIREWALLD)
        with trio.fail_after(30):
            assert "has made the chain filter_FORWARD" in await kernel.wait_drift()
        assert len((await kernel.apply(LEADER, fresh=True)).changes) == 2
    removed = [str(change) for change in await cleanup("kilo0")]
    assert sum("nft delete rule inet firewalld filter_FORWARD handle" in one for one in removed) == 2
    assert "kilo" not in sh("nft list table inet firewalld")


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_a_tunnel_that_is_born_without_forwarding_is_given_it() -> None:
    sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv4.conf.default.forwarding=0")
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        report = await kernel.apply(LEADER)
        assert "sysctl -w net.ipv4.conf.kilo0.forwarding=1" in map(str, report.changes)
        assert report.failures == ()
        assert sh("cat /proc/sys/net/ipv4/conf/kilo0/forwarding") == "1\n"
        assert (await kernel.apply(LEADER, fresh=True)).changes == ()
        assert await kernel.obstacles() == ()
    await cleanup("kilo0")
    assert sh("cat /proc/sys/net/ipv4/conf/default/forwarding") == "0\n"
