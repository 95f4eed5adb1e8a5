"""etcd's flags and `--prefix`, as an operator gives them to `kg` or `kgctl`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click
import pytest
from click.testing import CliRunner

from kilo_etcd.etcd.api import Config, Discovery, Tls
from kilo_etcd.runtime.options import etcd_config, etcd_flags, etcd_options, prefix_option


def run(env: dict[str, str], *arguments: str) -> Config:
    """How to reach etcd, of a command with this environment and these flags."""
    seen: list[Config] = []

    @click.command()
    @etcd_options
    def show(etcd: Config) -> None:
        seen.append(etcd)

    result = CliRunner().invoke(show, arguments, env=env, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return seen[0]


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for flag in etcd_flags():
        monkeypatch.delenv(flag.env, raising=False)
    monkeypatch.delenv("KILO_PREFIX", raising=False)


def test_etcds_flags_are_etcdctls(tmp_path: Path) -> None:
    pem = tmp_path / "x.pem"
    pem.write_text("")
    env = {
        "ETCDCTL_ENDPOINTS": "https://a:2379, https://[::1]:2379/",
        "ETCDCTL_CACERT": str(pem),
        "ETCDCTL_CERT": str(pem),
        "ETCDCTL_KEY": str(pem),
        "ETCDCTL_USER": "root",
        "ETCDCTL_PASSWORD": "a:b",
        "ETCDCTL_DIAL_TIMEOUT": "500ms",
        "ETCDCTL_COMMAND_TIMEOUT": "1m",
    }
    assert run(env=env) == Config(
        endpoints=("https://a:2379", "https://[::1]:2379"),
        tls=Tls(ca=str(pem), cert=str(pem), key=str(pem)),
        user="root",
        password="a:b",
        dial_timeout=0.5,
        call_timeout=60.0,
    )


def test_the_user_is_split_at_the_first_colon_unless_the_password_stands_alone() -> None:
    joined = etcd_config(user="root:a:b")
    assert (joined.user, joined.password) == ("root", "a:b")
    apart = etcd_config(user="ro:ot", password="p")
    assert (apart.user, apart.password) == ("ro:ot", "p")


def test_https_without_a_ca_takes_the_systems() -> None:
    assert etcd_config(endpoints="https://a").tls == Tls()
    assert etcd_config(endpoints="http://a").tls is None
    assert etcd_config(endpoints="a:1", insecure_skip_tls_verify=True).tls == Tls(insecure_skip_verify=True)


def test_host_and_port_alone_are_without_tls_unless_that_is_refused() -> None:
    assert etcd_config(endpoints="a:1").tls is None
    assert etcd_config(endpoints="a:1", insecure_transport=False).tls == Tls()
    assert run({"ETCDCTL_INSECURE_TRANSPORT": "false"}).tls == Tls()
    assert run({"ETCDCTL_INSECURE_TRANSPORT": "true"}).tls is None
    assert not run({}).prefer_first
    assert run({"KILO_PREFER_FIRST_ENDPOINT": "true"}).prefer_first


def test_endpoints_may_be_discovered() -> None:
    assert run(
        {
            "ETCDCTL_DISCOVERY_SRV": "example.com",
            "ETCDCTL_DISCOVERY_SRV_NAME": "mesh",
            "ETCDCTL_INSECURE_DISCOVERY": "true",
        }
    ) == Config(endpoints=(), discovery=Discovery(domain="example.com", service_name="mesh", insecure=True))
    assert run({"ETCDCTL_INSECURE_DISCOVERY": "true"}) == Config()


def test_a_flag_that_says_where_etcd_is_beats_a_variable_that_says_it_in_the_other_way() -> None:
    variables = {"ETCDCTL_DISCOVERY_SRV": "example.com", "ETCDCTL_DISCOVERY_SRV_NAME": "mesh"}
    for endpoints in ("10.0.0.1:2379", "127.0.0.1:2379"):
        assert run(variables, "--endpoints", endpoints) == Config(endpoints=(endpoints,))
    assert run({"ETCDCTL_ENDPOINTS": "10.0.0.1:2379"}, "--discovery-srv", "a").discovery == Discovery(domain="a")
    assert run(variables, "--discovery-srv", "a").discovery == Discovery(domain="a", service_name="mesh")
    for env, arguments in (
        ({**variables, "ETCDCTL_ENDPOINTS": "10.0.0.1:2379"}, ()),
        ({}, ("--endpoints", "10.0.0.1:2379", "--discovery-srv", "a")),
    ):
        with pytest.raises(AssertionError, match="are both given"):
            run(env, *arguments)


@pytest.mark.parametrize(
    "given",
    [{"discovery_srv": "http://u:secret@a"}, {"discovery_srv": "a", "discovery_srv_name": "u:secret@a"}],
)
def test_what_may_hold_a_password_is_not_repeated(given: dict[str, Any]) -> None:
    with pytest.raises(click.BadParameter) as refused:
        etcd_config(**given)
    assert "secret" not in refused.value.format_message()


def test_one_call_does_not_wait_longer_for_an_attempt_than_for_the_whole() -> None:
    assert etcd_config(command_timeout="1s").attempt_timeout == 1.0


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"endpoints": "ftp://a"}, "'ftp://a' is no etcd endpoint"),
        ({"endpoints": "a:b"}, "'a:b' is no etcd endpoint"),
        ({"endpoints": "http://a/path"}, "is no etcd endpoint"),
        ({"endpoints": " , "}, "no endpoint is given"),
        ({"cacert": "/nowhere/ca.pem"}, "'/nowhere/ca.pem' cannot be read: No such file or directory"),
        ({"user": "root"}, "no password"),
        ({"user": ":x"}, "no password"),
        ({"password": "x"}, "without --user"),
        ({"dial_timeout": "0"}, "'0' is no timeout"),
        ({"discovery_srv": "a..b"}, "'a..b' is no domain; write for instance example.com"),
        ({"discovery_srv": "http://a"}, "is no domain"),
        ({"discovery_srv": "a." * 101}, "is no domain"),
        ({"discovery_srv": "a", "discovery_srv_name": "b.c"}, "'b.c' is no part of a name in DNS"),
        ({"discovery_srv_name": "b"}, "--discovery-srv-name is given without --discovery-srv"),
        ({"discovery_srv": "a", "endpoints": "b:1"}, "are both given; give one"),
        ({"discovery_srv": "a", "prefer_first_endpoint": True}, "have no order; give one of the two"),
        ({"endpoints": "http://b:1", "insecure_transport": False}, "http://b:1 is without TLS"),
        (
            {"discovery_srv": "a", "insecure_discovery": True, "insecure_transport": False},
            "takes endpoints without TLS",
        ),
        ({"command_timeout": "ever"}, "'ever' is no duration"),
    ],
)
def test_what_is_wrong_with_etcds_flags_is_said(given: dict[str, Any], words: str) -> None:
    with pytest.raises(click.UsageError) as refused:
        etcd_config(**given)
    assert words in refused.value.format_message()


def test_a_password_in_an_endpoint_is_not_repeated() -> None:
    with pytest.raises(click.UsageError) as refused:
        etcd_config(endpoints="https://root:hunter2@a:2379")
    assert "hunter2" not in refused.value.format_message()


def test_half_a_client_certificate_is_refused(tmp_path: Path) -> None:
    pem = tmp_path / "x.pem"
    pem.write_text("")
    with pytest.raises(click.UsageError, match="--cert is given but --key is not"):
        etcd_config(cert=str(pem))


def test_a_command_may_have_arguments_called_like_flags() -> None:
    seen: list[object] = []

    @click.command()
    @click.argument("key")
    @prefix_option
    @etcd_options
    def show(key: str, prefix: str, etcd: Config) -> None:
        seen.extend([key, prefix, etcd.endpoints])

    result = CliRunner().invoke(show, ["x", "--prefix", "/a/", "--endpoints", "h:1"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    assert seen == ["x", "/a", ("h:1",)]
