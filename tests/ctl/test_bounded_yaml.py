"""Manifests that mean more than they say: each is refused in one sentence, at once."""

from __future__ import annotations

import json
import time
from contextlib import suppress
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import examples
from kilo_etcd.ctl.commands import peer
from kilo_etcd.ctl.formats import bounded_yaml
from kilo_etcd.ctl.formats.bounded_yaml import MAX_VALUES, load_documents
from kilo_etcd.ctl.formats.manifest import read_peers
from kilo_etcd.ctl.main import main
from kilo_etcd.lab.spec import SpecError, read_spec

KEY = "A" * 43 + "="
FEW = 4000
"""Values, in place of MAX_VALUES: reading as many as that takes a tenth of a second."""
BOMB = "a0: &a0 [[], []]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 30))
MERGES = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [{', '.join([f'*a{n - 1}'] * 10)}]}}\n" for n in range(1, 30))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("&a [*a]", "stands for something around it"),
        ("&a\n- *a\n- *a", "stands for something around it"),
        ("kind: List\nitems: &a [[*a]]", "stands for something around it"),
        ("&a {kind: List, items: [*a]}", "stands for something around it"),
        ("&a {? *a : 1}", "stands for something around it"),
        ("spec: &a {<<: *a}", "stands for something around it"),
        # Not even if nodes of an earlier document were in the same place in memory.
        ("&a [[], []]\n---\n" * 50 + "&a [*a]", "stands for something around it"),
        (BOMB, f"holds more than {FEW} values"),
        (f"kind: List\n{BOMB}items: [*a29]", f"holds more than {FEW} values"),
        (MERGES, f"holds more than {FEW} values"),
        ("---\na\n" * 100_000, f"holds more than {FEW} values"),
        (json.dumps([{}] * 100_000), f"holds more than {FEW} values"),
        (f"- &a [{'x, ' * 2000}]\n- [{'*a, ' * 2000}]", f"holds more than {FEW} values"),
        ("[" * 100_000, "is nested too deeply"),
        ("{a: " * 100_000, "is nested too deeply"),
        ("- " * 100_000, "is nested too deeply"),
        ("? " * 50_000, "is nested too deeply"),
        (json.dumps([[[]]]).replace("[]", "[" * 50_000), "is nested too deeply"),
        ("a: !!int x", "line 1, is neither YAML nor JSON"),
        (f"publicKey: {KEY}\nendpoint: 2026-13-45", "is neither YAML nor JSON"),
        ("a: !!timestamp x", "is neither YAML nor JSON"),
        ("a: !!float x", "is neither YAML nor JSON"),
        ("a: " + "9" * 5000, "has a number of more than 100 digits"),
        # Base 60: its reading took minutes.
        ("a: 1" + ":1" * 200_000, "has a number of more than 100 digits"),
        ("a: 1" + ":1" * 200_000 + ".5", "has a number of more than 100 digits"),
        ("a: !!python/object/apply:os.system [x]", "is neither YAML nor JSON"),
        ("*a", "is neither YAML nor JSON"),
        ("a: 'x\x00'", "is neither YAML nor JSON"),
        ("{? [a] : b}", "is neither YAML nor JSON"),
        ("a: b: c", "line 1, is neither YAML nor JSON"),
    ],
)
def test_what_means_more_than_it_says_is_refused_at_once(text: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_yaml, "MAX_VALUES", FEW)
    began = time.process_time()
    result = CliRunner().invoke(main, ["peer", "add", "-f", "-"], input=text)
    assert result.exit_code == 1, result.output
    assert result.output.startswith("kgctl: standard input")
    assert says in result.output
    assert result.output.count("\n") == 1
    assert len(result.output) < 300
    assert time.process_time() - began < 20


def test_a_text_of_very_many_values_is_refused_long_before_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert MAX_VALUES <= 50_000, "each takes some 20 microseconds"
    monkeypatch.setattr(bounded_yaml, "MAX_VALUES", FEW)

    def cost(values: int) -> float:
        began = time.process_time()
        with suppress(ValueError):
            load_documents("- 1\n" * values, "x")
        return time.process_time() - began

    few = min(cost(400) for _ in range(3))
    assert cost(200_000) < 50 * few, "what it takes to read FEW of them, not all"
    with pytest.raises(ValueError, match=f"holds more than {FEW} values, aliases written out: give fewer at once"):
        load_documents("- 1\n" * (FEW + 1), "x")


def test_a_file_without_an_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer, "MAX_FILE", 1000)
    (tmp_path / "large").write_text("#" * 1001)
    for arguments, text in (
        (["-f", "/dev/zero"], ""),
        (["-f", str(tmp_path / "large")], ""),
        (["-f", "-"], "#" * 1001),
    ):
        result = CliRunner().invoke(main, ["peer", "add", *arguments], input=text)
        assert (result.exit_code, "is larger than 1000 bytes" in result.output) == (1, True), result.output


def test_more_peers_than_one_transaction_takes_are_refused_before_etcd_is_asked() -> None:
    one = {"publicKey": KEY, "allowedIPs": ["10.9.0.1/32"]}
    for shape in ("---\n".join, lambda texts: f"[{','.join(texts)}]"):
        text = shape([json.dumps({"name": f"p{number}", **one}) + "\n" for number in range(129)])
        result = CliRunner().invoke(main, ["--endpoints", "127.0.0.1:1", "peer", "add", "-f", "-"], input=text)
        assert (result.exit_code, result.output) == (
            1, "kgctl: there are 129 peers in it, and one transaction of etcd's takes 128: split it\n",
        )  # fmt: skip


def test_anchors_aliases_and_merge_keys_work_as_ever() -> None:
    text = f"""
kind: List
items:
- &first
  metadata: {{name: a}}
  spec: &spec {{publicKey: {KEY}, allowedIPs: &ips [10.9.0.1/32], persistentKeepalive: &k 25}}
- <<: *first
  metadata: {{name: b}}
- metadata: {{name: c}}
  spec: {{<<: *spec, allowedIPs: *ips, persistentKeepalive: *k}}
"""
    assert [named_peer.name for named_peer in read_peers(text, "x")] == ["a", "b", "c"]
    assert len({named_peer.record for named_peer in read_peers(text, "x")}) == 1
    # Nor does the depth of an ordinary one come near the bound.
    deep = "[" * (bounded_yaml.MAX_DEPTH - 1) + "]" * (bounded_yaml.MAX_DEPTH - 1)
    assert load_documents(deep, "x") == list(yaml.safe_load_all(deep))


@settings(max_examples=examples(100), deadline=None)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(max_size=10),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
        max_leaves=20,
    ),
    st.booleans(),
)
def test_what_is_within_the_bounds_is_read_as_yaml_reads_it(value: object, shared: bool) -> None:
    text = yaml.safe_dump([value, value] if shared else value)  # with anchors and aliases
    assert load_documents(text, "x") == [one for one in yaml.safe_load_all(text) if one is not None]


def test_a_lab_that_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "lab.toml"
    file.write_text("a = " + "[" * 100_000)
    with pytest.raises(SpecError, match="is nested too deeply"):
        read_spec(file)
