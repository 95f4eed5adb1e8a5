"""Which client URLs of etcd's members a host can use, and the copy on disk."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from attrs import evolve

from kilo_etcd.etcd.api import Config, Discovery, Tls
from kilo_etcd.etcd.values import Member
from kilo_etcd.runtime.etcd_members import FILE, Usable, keep, remove, usable, with_known_members

PLAIN = Config(endpoints=("10.0.0.1:2379",))
WITH_TLS = Config(endpoints=("https://10.0.0.1:2379",), tls=Tls())
HERE = Config(endpoints=("http://127.0.0.1:2379",))
SECURE_SRV = Config(endpoints=(), discovery=Discovery(domain="example.com"))
INSECURE_SRV = Config(endpoints=(), discovery=Discovery(domain="example.com", insecure=True))


GIVEN = '{"endpoints": ["http://10.0.0.1:2379"], "tls": false}'


def member(*urls: str, name: str = "a", learner: bool = False, number: int = 171) -> Member:
    return Member(id=number, name=name, peer_urls=(), client_urls=urls, is_learner=learner)


@pytest.mark.parametrize(
    ("config", "given", "expected"),
    [
        (PLAIN, member("http://10.0.0.2:2379", "https://etcd:2379"), ("http://10.0.0.2:2379", "https://etcd:2379")),
        (PLAIN, member("http://[2001:db8::2]:2379/"), ("http://[2001:db8::2]:2379",)),
        (WITH_TLS, member("https://10.0.0.2:2379"), ("https://10.0.0.2:2379",)),
        (HERE, member("http://localhost:2379", "http://[::1]:2379"), ("http://localhost:2379", "http://[::1]:2379")),
        (SECURE_SRV, member("https://10.0.0.2:2379"), ("https://10.0.0.2:2379",)),
    ],
)
def test_client_urls_are_endpoints(config: Config, given: Member, expected: tuple[str, ...]) -> None:
    assert usable([given], config) == Usable(endpoints=expected)


@pytest.mark.parametrize(
    ("config", "given", "sentence"),
    [
        (PLAIN, member(name=""), "etcd member ab has no client URL yet, so it has not started"),
        (
            PLAIN,
            member("http://10.0.0.2:2379", learner=True),
            "etcd member a is a learner, which serves no clients yet",
        ),
        *(
            (PLAIN, member(url), f"{url} of etcd member a is left out: it {why} (etcd --advertise-client-urls)")
            for url, why in (
                ("http://localhost:2379", "is reached on the member's own host only"),
                ("http://LOCALHOST.:2379", "is reached on the member's own host only"),
                ("http://127.0.0.1:2379", "is reached on the member's own host only"),
                ("http://[::1]:2379", "is reached on the member's own host only"),
                ("http://0.0.0.0:2379", "is no address to connect to"),
                ("http://[::]:2379", "is no address to connect to"),
                ("http://[fe80::1]:2379", "is reached on the member's own link only"),
                ("unix://etcd.sock", "is no endpoint"),
                ("http://", "is no endpoint"),
            )
        ),
        *(
            (
                config,
                member("http://10.0.0.2:2379"),
                "http://10.0.0.2:2379 of etcd member a is left out: it is without TLS, with which this host reaches "
                "etcd (etcd --advertise-client-urls)",
            )
            for config in (WITH_TLS, SECURE_SRV)
        ),
    ],
)
def test_a_client_url_of_no_use_is_left_out_with_the_reason(config: Config, given: Member, sentence: str) -> None:
    good = member("https://10.0.0.9:2379", number=1)
    assert usable([given, good], config) == Usable(endpoints=("https://10.0.0.9:2379",), remarks=(sentence,))


def test_the_copy_counts_for_the_endpoints_that_it_was_made_for(tmp_path: Path) -> None:
    assert with_known_members(PLAIN, tmp_path) == PLAIN
    keep(PLAIN, tmp_path, ("http://10.0.0.2:2379",))
    known = evolve(PLAIN, more_endpoints=("http://10.0.0.2:2379",))
    assert with_known_members(PLAIN, tmp_path) == known
    assert with_known_members(evolve(PLAIN, user="root", password="x"), tmp_path).more_endpoints == known.more_endpoints
    others = evolve(PLAIN, endpoints=("10.0.0.7:2379",))
    assert with_known_members(others, tmp_path) == others
    assert with_known_members(SECURE_SRV, tmp_path) == SECURE_SRV
    keep(SECURE_SRV, tmp_path, ("https://10.0.0.2:2379",))
    assert with_known_members(SECURE_SRV, tmp_path).more_endpoints == ("https://10.0.0.2:2379",)
    assert with_known_members(PLAIN, tmp_path) == PLAIN
    remove(tmp_path)
    remove(tmp_path)
    assert with_known_members(SECURE_SRV, tmp_path) == SECURE_SRV


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "1", "null", "{}", f'{{"given": {GIVEN}}}', f'{{"given": {GIVEN}, "members": 1}}',
        f'{{"given": {GIVEN}, "members": ["x y"]}}', f'{{"given": {GIVEN}, "members": [{{}}]}}', "[" * 9999,
        "\udcff",
    ],
)  # fmt: skip
def test_a_file_that_is_no_copy_is_as_good_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE).write_bytes(content.encode(errors="surrogateescape"))
    assert with_known_members(PLAIN, tmp_path) == PLAIN


@pytest.mark.parametrize(
    ("before", "now"),
    [
        (PLAIN, evolve(PLAIN, tls=Tls())),
        (evolve(WITH_TLS, endpoints=("10.0.0.1:2379",)), PLAIN),
        (evolve(SECURE_SRV, discovery=Discovery(domain="example.com", insecure=True)), SECURE_SRV),
        (INSECURE_SRV, evolve(INSECURE_SRV, tls=Tls())),
    ],
)
def test_a_copy_of_another_way_to_etcd_does_not_count(tmp_path: Path, before: Config, now: Config) -> None:
    keep(before, tmp_path, ("http://10.0.0.2:2379", "https://10.0.0.3:2379"))
    assert with_known_members(before, tmp_path).more_endpoints
    assert with_known_members(now, tmp_path) == now


@pytest.mark.parametrize("config", [WITH_TLS, SECURE_SRV, evolve(INSECURE_SRV, tls=Tls())])
def test_urls_of_the_copy_are_judged_as_those_of_the_list(tmp_path: Path, config: Config) -> None:
    urls = ("http://10.0.0.2:2379", "https://10.0.0.3:2379", "https://127.0.0.1:2379", "https://0.0.0.0:2379")
    keep(config, tmp_path, urls)
    assert with_known_members(config, tmp_path).more_endpoints == ("https://10.0.0.3:2379",)
    assert usable([member(*urls)], config).endpoints == ("https://10.0.0.3:2379",)


@pytest.mark.parametrize("members", ["abc", {"a": 1}, {"http://10.0.0.2:2379": 1}, [["10.0.0.2"]]])
def test_members_that_are_no_list_of_texts_are_none(tmp_path: Path, members: object) -> None:
    keep(PLAIN, tmp_path, ("http://10.0.0.2:2379",))
    document = json.loads((tmp_path / FILE).read_text())
    (tmp_path / FILE).write_text(json.dumps({**document, "members": members}))
    assert with_known_members(PLAIN, tmp_path) == PLAIN


def test_something_else_in_the_files_place_is_as_good_as_none(tmp_path: Path) -> None:
    (tmp_path / FILE).mkdir()
    assert with_known_members(PLAIN, tmp_path) == PLAIN
