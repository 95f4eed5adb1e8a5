"""No message ever quotes a secret, however it is mistyped and wherever it has slipped to."""

from __future__ import annotations

import importlib
import json
import pkgutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import attrs
import click
import pytest
import yaml
from click.testing import CliRunner

import kilo_etcd
from helpers import scaled
from kilo_etcd.agent.options import all_flags
from kilo_etcd.base.quoting import SECRET, shown, shown_name, shown_path
from kilo_etcd.ctl.formats.manifest import read_peers
from kilo_etcd.ctl.main import main
from kilo_etcd.etcd.api import BadRequest, Config, Header, KeyValue
from kilo_etcd.etcd.endpoint import parse_endpoint
from kilo_etcd.etcd.grpc import Doing, StatusError, to_error
from kilo_etcd.model import Endpoint
from kilo_etcd.runtime.options import etcd_config
from kilo_etcd.store import records
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import PeerRecord, RecordError, decode_peer, read
from kilo_etcd.store.view import View

PUBLIC = "A" * 43 + "="
SECRETS = (
    "c2VjcmV0IHNlY3JldCBzZWNyZXQgc2VjcmV0IHNlY3I",  # 43 of 44 characters
    "c2VjcmV0IHNlY3JldCBzZWNyZXQgc2VjcmV0IHNlY3I=a",
    "c2VjcmV0IHNlY3JldCBzZWNyZXQgc2VjcmV0IHNlY3I =",
    "c2VjcmV0IHNlY3JldCBzZWNyZXQgc2VjcmV0",
    "c2VjcmV0IHNlY3JldCBz\nZWNyZXQgc2VjcmV0IHNlY3I=",  # a line of a terminal ended there
    "c2Vj_mV0-HNlY3JldCBzZW-yZXQgc2_jcmV0IHN-Y3I=",  # as URLs have it
    "73656372657420736563726574207365637265742073656372657420736563721",
    "sesame, open",
)


def wrong(secret: str) -> Iterator[Any]:
    """Ways in which the value of a field can be wrong."""
    yield from (secret, f" {secret}", f"{secret}\n", {"key": secret}, {secret: 1}, {"a": {"b": [secret]}})
    yield from (
        [secret],
        [[secret]],
        [{"value": secret}],
        f"PresharedKey = {secret}",
        f"file:{secret}",
        secret.encode().hex(),
    )
    yield from (True, 7, 1.5, [], {})


def quoted(secret: str, message: str) -> bool:
    """Whether any eight characters of the secret, plain or in hex, stand in the message."""
    texts = (secret, secret.encode().hex())
    return any(text[at : at + 8] in message for text in texts for at in range(len(text) - 7))


def said_of(call: Callable[[], object], refusal: type[Exception]) -> str:
    """What a call is refused with; empty: it is not."""
    try:
        call()
    except refusal as error:
        return str(error)
    return ""


def marked() -> Iterator[tuple[type, str]]:
    """Kind of record, and the name in JSON of each of its fields that is marked secret."""
    for kind in records._RECORDS:
        for attribute in attrs.fields(kind):
            if attribute.metadata.get(SECRET):
                yield kind, records._camel(attribute.name)


def test_every_field_that_holds_a_secret_is_marked_and_has_no_repr() -> None:
    assert list(marked()) == [(PeerRecord, "presharedKey")]
    found = set()
    for module in pkgutil.walk_packages(kilo_etcd.__path__, "kilo_etcd."):
        if module.name.endswith("__main__") or ".testing" in module.name:
            continue
        for kind in vars(importlib.import_module(module.name)).values():
            if isinstance(kind, type) and attrs.has(kind):
                for attribute in attrs.fields(kind):
                    if attribute.name in ("private_key", "preshared_key", "password"):
                        found.add(f"{kind.__name__}.{attribute.name}")
                        assert not attribute.repr, f"{kind}.{attribute.name}"
    assert {"PeerRecord.preshared_key", "Peer.preshared_key", "Config.password", "Configuration.private_key"} <= found
    assert {flag.name for flag in all_flags() if flag.secret} == {"--user", "--password"}


@pytest.mark.parametrize("secret", SECRETS)
def test_no_reason_for_a_rejected_record_quotes_a_secret(secret: str) -> None:
    keys = Keys()
    for kind, name in marked():
        for value in wrong(secret):
            data = {"publicKey": PUBLIC, name: value}
            with pytest.raises(RecordError) as caught:
                read(kind, json.dumps(data).encode())
            assert not quoted(secret, str(caught.value)), caught.value
            assert str(caught.value).startswith(f"{name}: ")
            # And as it is in the log, in `kgctl status` and in the metric's label: the snapshot's.
            view = View(keys)
            kv = KeyValue(
                key=keys.peer("x").encode(), value=json.dumps(data).encode(), create_revision=1, mod_revision=1
            )
            view.load([kv], Header(revision=1))
            (note,) = view.snapshot().rejected
            assert note.reason == str(caught.value)


@pytest.mark.parametrize("secret", SECRETS[:-1])
def test_nor_does_one_for_a_secret_in_another_place(secret: str) -> None:
    places: list[dict[str, Any]] = [
        {name: value}
        for name in ("presharedkey", "psk", "privateKey", "publicKey", "allowedIPs", "endpoint", "persistentKeepalive")
        for value in wrong(secret)
    ]
    places += [{secret: "presharedKey"}, {f"presharedKey={secret}": None}, {f"presharedKey:{secret}": ""}]
    for place in places:
        for data in ({"publicKey": PUBLIC, **place}, [{"publicKey": PUBLIC, **place}]):
            text = json.dumps(data)
            for spoilt in (text, text[:-1], text + ",", text.replace('"', "'"), text.replace(":", "=")):
                message = said_of(partial(decode_peer, spoilt.encode()), RecordError)
                assert not quoted(secret, message), (spoilt, message)


@pytest.mark.parametrize("secret", SECRETS[:-1])
def test_nor_does_a_refusal_of_a_manifest(secret: str) -> None:
    documents: list[Any] = [secret, [secret], [[secret]], {secret: None}, {"kind": {"presharedKey": secret}}]
    documents += [
        {"kind": f"presharedKey: {secret}"},
        {"kind": "List", "items": [secret]},
        {"metadata": {"name": [secret]}},
    ]
    for name in ("presharedKey", "presharedkey", "publicKey", "allowedIPs", "endpoint", "persistentKeepalive", "kind"):
        for value in wrong(secret):
            documents += [{"name": "x", "publicKey": PUBLIC, name: value}]
            documents += [{"metadata": {"name": "x"}, "spec": {"publicKey": PUBLIC, name: value}}]
    documents += [
        {"name": "x", "publicKey": PUBLIC, "endpoint": {"dnsOrIP": {"ip": value}, "port": value}}
        for value in wrong(secret)
    ]
    # Of many documents each secret has its share in make test-fast, each another one.
    step = max(1, len(documents) // scaled(len(documents), 60))
    documents = documents[SECRETS.index(secret) % step :: step]
    texts = [text for document in documents for text in (json.dumps(document), yaml.safe_dump(document))]
    texts += [
        f"publicKey: {PUBLIC}\npresharedKey: {tag} {secret}"
        for tag in ("!!int", "!!float", "!!timestamp", "!!bool", "!x", "*", "&")
    ]
    texts += [
        f"[Interface]\nPrivateKey = {secret}\n",
        f"{{publicKey: {PUBLIC}, presharedKey={secret}}}",
        f"presharedKey:{secret}",
    ]
    messages = [(text, said_of(partial(read_peers, text, "standard input"), ValueError)) for text in texts]
    assert not [(text, message) for text, message in messages if quoted(secret, message)]
    assert {message.startswith("standard input") for _, message in messages if message} == {True}
    assert sum(bool(message) for _, message in messages) > 100 // step


@pytest.mark.parametrize(
    "secret", ["sesame", "ses:ame", "ses@ame", "ses#ame", "ses/ame", "ses,ame", "ses?ame", "[sesame"]
)
def test_no_flag_repeats_a_password(secret: str) -> None:
    urls = [
        f"{scheme}root:{secret}@{host}"
        for scheme in ("", "http://", "https://", "ftp://")
        for host in ("a:2379", "", "[::1", "a:x")
    ]
    for url in urls:
        with pytest.raises(click.BadParameter, match="--user is for") as caught:
            etcd_config(endpoints=f"b:2379,{url}")
        assert "ame" not in caught.value.message
        assert "ame" not in said_of(partial(parse_endpoint, url, tls=False), BadRequest)
    wrong: tuple[dict[str, Any], ...] = (
        {"user": f"root:{secret}", "dial_timeout": "x"},
        {"password": secret},
        {"user": f":{secret}"},
    )
    for given in wrong:
        with pytest.raises(click.UsageError) as wrong_flag:
            etcd_config(**given)
        assert secret not in wrong_flag.value.format_message()
    # etcdctl takes the user whole where there is a password beside it.
    both = etcd_config(user=f"root:{secret}", password="other")
    for code, said in ((3, "etcdserver: authentication failed"), (7, "permission denied"), (16, "invalid auth token")):
        error = to_error(StatusError(code, said), Doing("read"), endpoint="a", user=both.shown_user)
        assert secret not in str(error)
    assert "password" not in repr(both)


def test_a_key_in_the_place_of_a_file_is_not_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for secret in SECRETS[:2]:
        for arguments in (
            ["peer", "add", "x", "--public-key", PUBLIC, "--allowed-ips", "10.9.0.2", "--preshared-key-file", secret],
            ["peer", "add", "-f", secret],
            ["connect", "--private-key", secret],
            ["--cacert", f"-----BEGIN CERTIFICATE-----\n{secret}\n", "status"],
            ["peer", "add", "x", "--public-key", secret, "--allowed-ips", "10.9.0.2"],
        ):
            done = CliRunner().invoke(main, arguments)
            assert done.exit_code in (1, 2), done.output
            assert not quoted(secret, done.output), done.output
            assert "Traceback" not in done.output
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_secret_is_still_shown() -> None:
    assert shown("10.4.0.0/33") == "'10.4.0.0/33'"
    assert shown("x y" * 100) == "'" + ("x y" * 19)[:56] + "..."
    assert [shown(value) for value in (7, None, [1], {"a": 1}, 10**100)][:4] == ["7", "None", "a list", "an object"]
    assert shown_name("allowedIps") == "allowedIps"
    assert shown_path("/etc/kilo/psk") == "/etc/kilo/psk"
    with pytest.raises(ValueError, match=r"'gcp-1.example.org:x' is no endpoint: 'x' is no port"):
        Endpoint.parse("gcp-1.example.org:x")
    assert Config(user="root").shown_user == "root"
