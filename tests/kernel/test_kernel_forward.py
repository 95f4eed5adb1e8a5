"""`--forward-rules`: mesh traffic passes iptables' FORWARD chain, in docker's company too."""

from __future__ import annotations

import subprocess

import pytest
import trio
from attrs import evolve
from kernel_worlds import PRIVATE, TARGET, host_with, lines, plan, tunnel

from kilo_etcd.kernel import Memory, Setup, cleanup, diff, open_kernel
from kilo_etcd.kernel.diff import difference
from kilo_etcd.kernel.firewall.forward import DOCKER, FORWARD, read_rules, rules_for
from kilo_etcd.model import IPNetwork
from kilo_etcd.model.hostplan import HostPlan

MESH = tunnel("10.4.0.0/16", "10.4.0.1")
LEADER = plan(MESH, forwarding=(4,))
OPEN = evolve(TARGET, forward_rules=True)
PASSES = [
    'iptables -w 5 -I FORWARD 1 -i kilo0 -m comment --comment kilo-etcd:kilo0 -j ACCEPT',
    'iptables -w 5 -I FORWARD 1 -o kilo0 -m comment --comment kilo-etcd:kilo0 -j ACCEPT',
]  # fmt: skip


def behind(wanted: HostPlan, *networks: IPNetwork) -> HostPlan:
    return evolve(wanted, behind=networks)


def sh(command: str) -> str:
    return subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout


def ours(program: str = "iptables") -> list[str]:
    return [line for line in sh(f"{program} -S").splitlines() if "kilo-etcd:kilo0" in line]


# -- what is decided: pure ------------------------------------------------------------------------------------


def test_forward_is_opened_only_when_told_to_and_closed_again() -> None:
    host = evolve(host_with(plan(MESH, forwarding=(4,))), forward_chains={4: FORWARD, 6: FORWARD})
    assert diff(LEADER, host, Memory(), TARGET) == ()
    assert lines(diff(LEADER, host, Memory(), OPEN)) == PASSES
    opened = evolve(host, forward_rules=frozenset(rules_for(LEADER, "kilo0", "kilo-ipip", {4: FORWARD})))
    assert diff(LEADER, opened, Memory(), OPEN) == ()
    assert lines(diff(LEADER, opened, Memory(), TARGET)) == [
        "iptables -w 5 -D FORWARD -i kilo0 -m comment --comment kilo-etcd:kilo0 -j ACCEPT",
        "iptables -w 5 -D FORWARD -o kilo0 -m comment --comment kilo-etcd:kilo0 -j ACCEPT",
    ]


def test_when_docker_comes_the_rules_move_into_its_chain_for_users() -> None:
    opened = evolve(
        host_with(LEADER),
        forward_rules=frozenset(rules_for(LEADER, "kilo0", "kilo-ipip", {4: FORWARD})),
        forward_chains={4: DOCKER},
    )
    assert [line.split()[3:5] for line in lines(diff(LEADER, opened, Memory(), OPEN))] == [
        ["-I", DOCKER], ["-I", DOCKER], ["-D", FORWARD], ["-D", FORWARD],
    ]  # fmt: skip


def test_a_member_lets_the_mesh_through_to_the_networks_behind_it_and_nobody_else() -> None:
    member = behind(LEADER, tunnel("172.20.2.0/24").destination)
    matches = [" ".join(rule.match) for rule in rules_for(member, "kilo0", "kilo-ipip", {4: FORWARD})]
    assert matches == [
        "-i kilo0",
        "-o kilo0",
        "-s 10.4.0.0/16 -d 172.20.2.0/24",
        "-s 172.20.2.0/24 -d 10.4.0.0/16",
    ]


def test_without_iptables_it_is_said_what_to_install() -> None:
    (failure,) = difference(LEADER, host_with(LEADER), Memory(), OPEN).failures
    assert failure.aside
    assert (
        failure.text
        == "--forward-rules needs the program iptables, which is not installed or does not work: install it"
    )


def test_rules_of_others_and_of_other_interfaces_are_not_taken_for_ours() -> None:
    printed = """\
-P FORWARD DROP
-N DOCKER-USER
-A FORWARD -i kilo1 -m comment --comment "kilo-etcd:kilo1" -j ACCEPT
-A FORWARD -i kilo0 -j ACCEPT
-A FORWARD -i kilo0 -m comment --comment "kilo-etcd:kilo0 by hand" -j DROP
-A DOCKER-USER -i kilo0 -m comment --comment "kilo-etcd:kilo0" -j ACCEPT
"""
    chain, rules = read_rules(printed, 4, "kilo0")
    assert chain == DOCKER
    assert [(rule.chain, rule.match) for rule in rules] == [(DOCKER, ("-i", "kilo0"))]


# -- with the real iptables -----------------------------------------------------------------------------------


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_rules_are_made_repaired_and_removed() -> None:
    sh("iptables -P FORWARD DROP")
    async with open_kernel(Setup(private_key=PRIVATE, forward_rules=True)) as kernel:
        assert ["IPv4" in obstacle.text for obstacle in await kernel.obstacles()] == [True]
        report = await kernel.apply(LEADER)
        assert await kernel.obstacles() == ()
        assert report.failures == ()
        assert lines(report.changes)[-3:-1] == PASSES
        assert len(ours()) == 2
        writes = kernel.writes
        for fresh in (False, True, True):
            assert (await kernel.apply(LEADER, fresh=fresh)).changes == ()
        assert kernel.writes == writes
        # Others' rules are no news; ours, flushed as docker or an operator does, are.
        sh("iptables -A FORWARD -i eth7 -j ACCEPT && iptables -D FORWARD -i eth7 -j ACCEPT")
        with trio.move_on_after(0.2) as waited:
            await kernel.wait_drift()
        assert waited.cancelled_caught
        sh("iptables -F FORWARD")
        with trio.fail_after(30):
            assert "was removed from the chain FORWARD" in await kernel.wait_drift()
        assert lines((await kernel.apply(LEADER, fresh=True)).changes) == PASSES
        # docker is started: its chain for users comes, and is the place from then on.
        sh("iptables -N DOCKER-USER && iptables -I FORWARD -j DOCKER-USER")
        with trio.fail_after(30):
            assert await kernel.wait_drift() == "docker has come"
        await kernel.apply(LEADER, fresh=True)
        assert {line.split()[1] for line in ours()} == {DOCKER}
        with trio.move_on_after(0.2) as waited:
            await kernel.wait_drift()
        assert waited.cancelled_caught
    assert sum("-D DOCKER-USER" in line for line in lines(await cleanup("kilo0"))) == 2
    assert ours() == []
    assert "-P FORWARD DROP" in sh("iptables -S")


@pytest.mark.root
@pytest.mark.usefixtures("own_namespaces")
async def test_an_agent_without_the_flag_removes_what_one_with_it_made() -> None:
    dual = plan(MESH, tunnel("fd00:4::/64"), addresses=("10.4.0.1/32", "fd00:4::1/128"), forwarding=(4, 6))
    dual = behind(dual, tunnel("172.20.2.0/24").destination, tunnel("fd00:c::/64").destination)
    async with open_kernel(Setup(private_key=PRIVATE, forward_rules=True)) as kernel:
        assert (await kernel.apply(dual)).failures == ()
        assert (await kernel.apply(dual, fresh=True)).changes == ()
        assert len(ours()) == len(ours("ip6tables")) == 4
    async with open_kernel(Setup(private_key=PRIVATE)) as kernel:
        assert len((await kernel.apply(dual)).changes) == 8
    assert ours() + ours("ip6tables") == []
