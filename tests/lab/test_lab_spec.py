"""The description of a lab: what can be written, and what is said to someone who wrote it wrong."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path

import pytest

from kilo_etcd.lab import HostSpec, SiteSpec, Spec, SpecError, parse_spec, read_spec
from kilo_etcd.lab.demo import led_locations
from kilo_etcd.model import Granularity, InternalIPs

EXAMPLES = sorted(Path(str(files("kilo_etcd.lab") / "examples")).glob("*.toml"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "lab.toml"
    path.write_text(text)
    return path


def test_a_site_in_short_and_hosts_at_length(tmp_path: Path) -> None:
    spec = read_spec(
        write(
            tmp_path,
            """
            etcd = 3
            granularity = " Cross"
            internal_ips = "OFF"
            [[site]]
            name = "gcp"
            label = "gcp"
            hosts = 2
            public = 1
            [[site]]
            name = "home"
            [[site.host]]
            name = "attic"
            args = ["--mtu", "1300"]
            [[site.host]]
            name = "printer"
            agent = false
            """,
        )
    )
    assert spec.etcd == 3
    assert spec.granularity is Granularity.CROSS
    assert spec.internal_ips is InternalIPs.OFF
    assert spec.sites == (
        SiteSpec(
            name="gcp",
            hosts=(HostSpec(name="gcp-1", public=True, label="gcp"), HostSpec(name="gcp-2", label="gcp")),
        ),
        SiteSpec(
            name="home", hosts=(HostSpec(name="attic", args=("--mtu", "1300")), HostSpec(name="printer", agent=False))
        ),
    )


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_that_ships_is_valid(path: Path) -> None:
    assert read_spec(path).hosts


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_what_to_try_in_an_example_is_printed_and_not_a_comment(path: Path) -> None:
    assert "# kgctl" not in path.read_text()
    for step in read_spec(path).next_steps:
        assert step.startswith("kgctl ")
        assert len(step) <= 118


def test_what_is_sent_to_the_lab_is_what_arrives() -> None:
    spec = Spec.simple({"gcp": 3, "dc": 2}, labels={"gcp": "gcp", "dc-2": "dc-2"}, etcd=3, agents=False, open=True)
    assert parse_spec(spec.as_mapping(), "there") == spec


def test_many_hosts_are_spread_so_that_no_lan_is_large() -> None:
    spec = Spec.simple(50)
    assert [len(site.hosts) for site in spec.sites] == [10] * 5
    assert len({host.name for host in spec.hosts}) == 50


SITE = '[[site]]\nname = "a"\nhosts = 2\n'


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("etcd = 1", "site is missing"),
        ("etcd = 2\n" + SITE, "etcd"),
        (
            "colour = 1\n" + SITE,
            "colour is unknown; known here are agent_args, agent_command, agents, etcd, etcd_args, ",
        ),
        (SITE + "colour = 1", "site[1].colour is unknown; known here are host, hosts, label, latency_ms, "),
        ("next_steps = 3\n" + SITE, "next_steps"),
        ('granularity = "mesh"\n' + SITE, "granularity"),
        ('internal_ips = "clear"\n' + SITE, "write routed, encrypted or off"),
        ("lease_ttl = 1\n" + SITE, "lease_ttl"),
        ('wireguard = "magic"\n' + SITE, "wireguard"),
        ('families = ["ipx"]\n' + SITE, "families"),
        ('agents = "yes"\n' + SITE, "agents"),
        (SITE + SITE, "two sites are called 'a'"),
        (SITE + 'subnets = ["10.0.0.0/33"]', "site a.subnets"),
        (SITE + 'subnets = ["10.0.0.1/24"]', "site a.subnets"),
        (SITE + 'subnets = ["10.0.0.0/24", "10.0.0.0/25"]', "overlaps"),
        (SITE + '[[site.host]]\nname = "a-1"', "taken already"),
        (SITE + '[[site.host]]\nname = "operator"', "taken already"),
        (SITE + '[[site.host]]\nname = "Bad Name"', "Bad Name"),
        (SITE + '[[site.host]]\nname = "b"\nsubnet = 1', "subnet"),
        (SITE + '[[site.host]]\nname = "b"\npublik = true', "site[1].host[1].publik is unknown"),
        (SITE + "[[site.host]]\npublic = true", "site[1].host[1].name is missing"),
        (SITE + "loss_percent = 101", "loss_percent"),
        (SITE + 'nat = "cone"', "site a.nat"),
        ('[[site]]\nname = "a"', "no hosts"),
        ("site = 3", "site"),
        ("not toml", "is not TOML"),
    ],
)
def test_a_mistake_is_one_sentence_with_file_and_key(tmp_path: Path, text: str, key: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(SpecError) as error:
        read_spec(path)
    assert str(path) in str(error.value)
    assert key in str(error.value)
    assert "\n" not in str(error.value)


def test_the_page_on_the_file_has_each_key_and_no_other() -> None:
    top = read_spec(EXAMPLES[0]).as_mapping()
    (site, *_) = top["site"]
    keys = [set(top), {*site, "hosts", "public", "label"}, {"label", *site["host"][0]}]
    page = (Path(__file__).parents[2] / "docs/lab.md").read_text()
    sections = page.split("\n## ")[1:]
    assert [set(re.findall(r"^\| `(\w+)` \|", section, flags=re.MULTILINE)) for section in sections] == keys


def test_a_missing_file_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="cannot be read: No such file"):
        read_spec(tmp_path / "none.toml")


def test_the_demo_waits_for_no_leader_where_a_host_is_alone() -> None:
    sites = (
        SiteSpec(name="a", hosts=(HostSpec(name="a-1", label="a"), HostSpec(name="a-2", label="a"))),
        SiteSpec(name="b", hosts=(HostSpec(name="b-1", label="b"), HostSpec(name="b-2"), HostSpec(name="b-3"))),
    )
    assert led_locations(Spec(sites=sites)) == 2, "a, and the default location"
    assert led_locations(Spec(sites=sites[1:])) == 1
