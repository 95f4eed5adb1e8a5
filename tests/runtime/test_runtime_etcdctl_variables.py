"""Each variable of etcdctl's is read, left to it, or refused in a sentence."""

from __future__ import annotations

import pytest

from kilo_etcd.runtime.etcdctl_variables import WITHOUT_EFFECT, refusal, unknown
from kilo_etcd.runtime.options import etcd_flags

KNOWN = {flag.env for flag in etcd_flags()}

GLOBAL_FLAGS = (
    "cacert", "cert", "command-timeout", "debug", "dial-timeout", "discovery-srv", "discovery-srv-name", "endpoints",
    "hex", "insecure-discovery", "insecure-skip-tls-verify", "insecure-transport", "keepalive-time",
    "keepalive-timeout", "key", "password", "user", "write-out",
)  # fmt: skip
"""Of etcdctl 3.4 and 3.5."""


@pytest.mark.parametrize("flag", GLOBAL_FLAGS)
def test_each_variable_of_etcdctl_is_taken_refused_or_without_effect(flag: str) -> None:
    variable = "ETCDCTL_" + flag.replace("-", "_").upper()
    refused = refusal({variable: "x"}, "kg") is not None
    assert [variable in KNOWN, variable in WITHOUT_EFFECT, refused].count(True) == 1


@pytest.mark.parametrize(
    ("variable", "value", "sentence"),
    [
        ("ETCDCTL_API", "2", "ETCDCTL_API=2: kgctl speaks etcd's API 3 only; write ETCDCTL_API=3 or unset it."),
        (
            "ETCDCTL_CA_FILE",
            "/x",
            "ETCDCTL_CA_FILE is set, which kgctl does not take: write ETCDCTL_CACERT; unset it for kgctl.",
        ),
        (
            "ETCDCTL_AUTH_JWT_TOKEN",
            "x",
            "ETCDCTL_AUTH_JWT_TOKEN is set, which kgctl does not take: write ETCDCTL_USER and ETCDCTL_PASSWORD; unset "
            "it for kgctl.",
        ),
    ],
)
def test_what_is_not_taken_is_refused_in_a_sentence_without_its_value(
    variable: str, value: str, sentence: str
) -> None:  # fmt: skip
    assert refusal({"PATH": "/bin", variable: value}, "kgctl") == sentence


@pytest.mark.parametrize(
    "environment",
    [
        {}, {"ETCDCTL_API": "3"}, {"ETCDCTL_API": ""}, {"ETCDCTL_KEEPALIVE_TIME": ""}, {"ETCDCTL_WRITE_OUT": "table"},
        {"ETCDCTL_WATCH_KEY": "/x"}, {"ETCD_NAME": "x"}, {"ETCDCTL_KEEPALIVE_TIME": "2s"}, {"ETCDCTL_VERSION": "v3"},
        {"ETCDCTL_ENDPOINTSS": "x"}, {"ETCDCTL_TIMEOUT": "2s"}, {"ETCDCTL_PEERS": ""},
    ],
)  # fmt: skip
def test_the_rest_is_nothing_to_refuse(environment: dict[str, str]) -> None:
    assert refusal(environment, "kg") is None


def test_what_etcdctl_does_not_have_is_named() -> None:
    others = ("ETCDCTL_API", "ETCDCTL_PEERS", "ETCDCTL_VERSION", "ETCDCTL_ENDPOINTSS", "ETCD_NAME")
    environment = {**dict.fromkeys((*KNOWN, *WITHOUT_EFFECT, *others), "x"), "ETCDCTL_EMPTY": ""}
    assert unknown(environment, KNOWN) == ("ETCDCTL_ENDPOINTSS", "ETCDCTL_VERSION")
