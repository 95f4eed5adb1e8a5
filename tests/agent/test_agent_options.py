"""Flags and environment of `kg`, as an operator gives them."""

from __future__ import annotations

from ipaddress import ip_interface, ip_network
from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from kilo_etcd.agent.config import AgentConfig, ListenAddress, WireGuardKind, parse_subnets, too_small_for
from kilo_etcd.agent.main import kernel_setup
from kilo_etcd.agent.options import agent_flags, agent_options, all_flags
from kilo_etcd.etcd.api import Config
from kilo_etcd.model import Encapsulate, Endpoint, Granularity, InternalIPs
from kilo_etcd.model.hostplan import HostPlan
from kilo_etcd.runtime import key_file
from kilo_etcd.testing.fake_kernel import FakeHost, open_fake_kernel


def run(*args: str, env: dict[str, str] | None = None) -> AgentConfig:
    """The configuration of `kg ARGS`."""
    seen: list[AgentConfig] = []

    @click.command()
    @agent_options
    def kg(config: AgentConfig) -> None:
        seen.append(config)

    result = CliRunner().invoke(kg, args, env=env or {}, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return seen[0]


def refusal(*args: str, env: dict[str, str] | None = None) -> str:
    """The last line that `kg ARGS` ends with."""

    @click.command()
    @agent_options
    def kg(config: AgentConfig) -> None:
        raise AssertionError("it was accepted")

    result = CliRunner().invoke(kg, args, env=env or {}, catch_exceptions=False)
    assert result.exit_code == 2
    assert "Traceback" not in result.output
    return result.output.strip().splitlines()[-1]


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for flag in all_flags():
        monkeypatch.delenv(flag.env, raising=False)


async def test_a_host_that_leads_lowers_segment_sizes_unless_its_flag_says_no() -> None:
    forwards = HostPlan(node="h1", addresses=(ip_interface("10.4.0.1/32"),), clamps=True)
    for flags, has_table in (((), True), (("--no-clamp-mss",), False)):
        host, setup = FakeHost(), kernel_setup(run(*flags), key_file.generate())
        async with open_fake_kernel(host, setup) as kernel:
            assert (await kernel.apply(forwards)).notes == ()
        assert (host.observed.table is not None) is has_table


def test_without_flags_kilos_defaults_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("socket.gethostname", lambda: "node-1")
    assert run() == AgentConfig(hostname="node-1")
    config = run()
    assert config.subnets == (ip_network("10.4.0.0/16"),)
    assert config.wanted_subnets == ()
    assert config.mesh_granularity is None
    assert config.internal_ips is None
    assert config.state_dir == Path("/var/lib/kilo-etcd")
    assert config.listen == ListenAddress("127.0.0.1", 1107)
    assert config.lease_ttl == 5.0
    assert config.forget_after == 24 * 3600
    assert config.etcd == Config()


FLAGS: list[tuple[list[str], str, Any]] = [
    (["--hostname", "a.example"], "hostname", "a.example"),
    (["--location", "München 1"], "location", "München 1"),
    (["--interface", "wg-kilo"], "interface", "wg-kilo"),
    (["--port", "51821"], "port", 51821),
    (["--mesh-granularity", "cross"], "mesh_granularity", Granularity.CROSS),
    (["--internal-ips", "off"], "internal_ips", InternalIPs.OFF),
    (["--internal-ips", " Encrypted "], "internal_ips", InternalIPs.ENCRYPTED),
    (["--mesh-granularity", "FULL "], "mesh_granularity", Granularity.FULL),
    (["--subnet", "10.5.0.0/16,fd00:5::/64"], "wanted_subnets", (ip_network("10.5.0.0/16"), ip_network("fd00:5::/64"))),
    (["--encapsulate", "wireguard"], "encapsulate", Encapsulate.WIREGUARD),
    (["--mtu", "1380"], "mtu", 1380),
    (["--mtu", "auto"], "mtu", None),
    (["--internal-cidr", "10.0.0.0/8"], "internal_cidrs", (ip_network("10.0.0.0/8"),)),
    (["--prioritise-private-addresses"], "prioritise_private", True),
    (["--resync-period", "1m30s"], "resync_period", 90.0),
    (["--clean-up"], "clean_up", True),
    (["--no-clean-up"], "clean_up", False),
    (["--log-level", "all"], "log_level", "debug"),
    (["--log-level", "WARN"], "log_level", "warning"),
    (["--wireguard", "userspace"], "wireguard", WireGuardKind.USERSPACE),
    (["--userspace-command", "boringtun-cli --disable-drop-privileges"], "userspace_command",
     ("boringtun-cli", "--disable-drop-privileges")),
    (["--prefix", "/team/mesh/"], "prefix", "/team/mesh"),
    (["--lease-ttl", "2s"], "lease_ttl", 2.0),
    (["--forget-after", "1h"], "forget_after", 3600.0),
    (["--state-dir", "/srv/kilo"], "state_dir", Path("/srv/kilo")),
    (["--listen", ":1107"], "listen", ListenAddress("", 1107)),
    (["--listen", "[::1]:9"], "listen", ListenAddress("::1", 9)),
    (["--listen", "off"], "listen", None),
    (["--peer-query-port", "2107"], "peer_query_port", 2107),
    (["--endpoint", "vpn.example:51999"], "endpoint", Endpoint("vpn.example", 51999)),
    (["--endpoint", "vpn.example", "--port", "777"], "endpoint", Endpoint("vpn.example", 777)),
    (["--persistent-keepalive", "25s"], "persistent_keepalive", 25),
    (["--dry-run"], "dry_run", True),
]  # fmt: skip


@pytest.mark.parametrize(("args", "attribute", "value"), FLAGS, ids=[" ".join(args) for args, _, _ in FLAGS])
def test_a_flag_and_its_environment_variable_mean_the_same(args: list[str], attribute: str, value: Any) -> None:
    assert getattr(run(*args), attribute) == value
    env = {}
    words = list(args)
    while words:
        word = words.pop(0)
        name = "KILO_" + word.removeprefix("--no-").removeprefix("--").replace("-", "_").upper()
        if word.startswith("--no-"):
            env[name] = "false"
        elif words and not words[0].startswith("--"):
            env[name] = words.pop(0)
        else:
            env[name] = "true"
    assert getattr(run(env=env), attribute) == value


def test_an_empty_listen_is_nowhere_too() -> None:
    assert run("--listen", "").listen is None


def test_several_internal_cidrs_come_as_several_flags_or_with_commas() -> None:
    wanted = (ip_network("10.0.0.0/8"), ip_network("fd00::/8"))
    assert run("--internal-cidr", "10.0.0.0/8", "--internal-cidr", "fd00::/8").internal_cidrs == wanted
    assert run("--internal-cidr", "10.0.0.0/8, fd00::/8").internal_cidrs == wanted
    assert run(env={"KILO_INTERNAL_CIDR": "10.0.0.0/8,fd00::/8"}).internal_cidrs == wanted


REFUSALS = [
    (["--hostname", "a/b"], "'a/b' is no node name; leave out '/', white space and control characters"),
    (["--interface", "a-name-far-too-long"], "1 to 15 characters"),
    (["--port", "0"], "'0' is not a whole number from 1 to 65535"),
    (["--peer-query-port", "65536"], "'65536' is not a whole number from 1 to 65535"),
    (["--peer-query-port", "51820"], "51820 is WireGuard's port (--port); name another one"),
    (["--port", "²"], "is not a whole number"),
    (["--internal-ips", "on"], "'on' is unknown; choose one of off, routed, encrypted"),
    (["--mesh-granularity", "half"], "'half' is unknown; choose one of location, full, cross"),
    (["--subnet", "10.4.0.1/16"], "did you mean 10.4.0.0/16?"),
    (["--subnet", "10.4.0.0/16,10.5.0.0/16"], "more than one IPv4 subnet"),
    (["--subnet", "10.4.0.0/31"], "no sensible size"),
    (["--subnet", "ten"], "'ten' is no network"),
    (["--encapsulate", "x"], "choose one of never, crosssubnet, always, wireguard"),
    (["--mtu", "100"], "'100' is not a whole number from 576 to 65535"),
    (["--lease-ttl", "1s"], "1 s is too short; give at least 2s"),
    (["--lease-ttl", "2500ms"], "no whole number of seconds"),
    (["--forget-after", "3s"], "3 s is too short; give at least 5s"),
    (["--resync-period", "soon"], "'soon' is no duration; write for instance 500ms, 5s, 2m, 24h or 7d"),
    (["--prefix", "kilo"], "'kilo' is no etcd prefix; write for instance /kilo"),
    (["--prefix", "/"], "is no etcd prefix"),
    (["--listen", "example.com:1"], "is no IP address"),
    (["--listen", "1107"], "is no listen address"),
    (["--endpoint", "1.2.3:99"], "neither an address nor a DNS name"),
    (["--state-dir", "state"], "no absolute path"),
    (["--userspace-command", "'"], "is no command"),
    (["--persistent-keepalive", "70000"], "from 0 (off) to 65535"),
    (["--log-level", "loud"], "choose one of debug, info, warning, error, none"),
]


@pytest.mark.parametrize(("args", "words"), REFUSALS, ids=[" ".join(args) for args, _ in REFUSALS])
def test_a_bad_value_is_one_sentence_that_names_the_flag(args: list[str], words: str) -> None:
    said = refusal(*args)
    assert words in said
    assert args[0] in said
    assert args[0].removeprefix("--").replace("-", "_").upper() in said


def test_a_bad_environment_is_refused_like_a_bad_flag() -> None:
    assert "--mtu (KILO_MTU): 'big'" in refusal(env={"KILO_MTU": "big"})


def test_the_table_has_every_flag_once_and_says_what_it_is_for() -> None:
    flags = list(all_flags())
    assert len({flag.name for flag in flags}) == len({flag.env for flag in flags}) == len(flags)
    assert all(flag.help.endswith(".") for flag in flags)
    # The default in the table is what happens if nothing is given.
    spelt: dict[str, Any] = {
        flag.parameter: flag.default for flag in agent_flags() if not flag.switch and not flag.several
    }
    spelt["hostname"] = "here"
    assert AgentConfig.build(**spelt) == AgentConfig(hostname="here")


def test_help_shows_environment_and_no_secret() -> None:
    @click.command()
    @agent_options
    def kg(config: AgentConfig) -> None: ...

    said = CliRunner().invoke(kg, ["--help"], env={"ETCDCTL_PASSWORD": "hunter2"}).output
    assert "KILO_LEASE_TTL" in said
    assert "ETCDCTL_CACERT" in said
    assert "hunter2" not in said


def test_an_mtu_below_what_ipv6_needs_is_refused_with_an_ipv6_mesh() -> None:
    four, six = parse_subnets("10.4.0.0/16"), parse_subnets("10.4.0.0/16,fd00:4::/64")
    assert too_small_for(1279, four) is None
    assert too_small_for(None, six) is None
    assert too_small_for(1280, six) is None
    reason = too_small_for(1279, six) or ""
    assert "--mtu 1279 is too small" in reason
    assert "fd00:4::/64" in reason


def test_etcds_flags_are_among_them() -> None:
    assert run("--endpoints", "a:1,b:2").etcd == run(env={"ETCDCTL_ENDPOINTS": "a:1,b:2"}).etcd
    assert run("--endpoints", "a:1,b:2").etcd == Config(endpoints=("a:1", "b:2"))
    assert "'ftp://a' is no etcd endpoint" in refusal("--endpoints", "ftp://a")


def test_a_variable_of_etcdctls_that_is_not_taken_is_refused() -> None:
    assert "ETCDCTL_API=2: kg speaks etcd's API 3 only" in refusal(env={"ETCDCTL_API": "2"})
    assert "ETCDCTL_PEERS is set, which kg does not take: write ETCDCTL_ENDPOINTS" in refusal(
        env={"ETCDCTL_PEERS": "a:1"}
    )


def test_endpoints_may_follow_the_member_list() -> None:
    assert not run().endpoints_from_cluster
    assert run("--endpoints-from-cluster").endpoints_from_cluster
    assert run(env={"KILO_ENDPOINTS_FROM_CLUSTER": "true"}).endpoints_from_cluster
