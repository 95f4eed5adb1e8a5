"""The variables of etcdctl that `kg` and `kgctl` do not take. An environment that was made for etcdctl must not reach
another etcd here, nor the same one as somebody else, without a word.

A variable of which `kg` and `kgctl` have the flag is read as that. One that etcdctl has as a way to etcd or as
credentials is refused in a sentence. All others have no effect: they say how long etcdctl waits or what it prints, or
etcdctl does not know them either.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

WITHOUT_EFFECT = frozenset({
    "ETCDCTL_DEBUG", "ETCDCTL_HEX", "ETCDCTL_KEEPALIVE_TIME", "ETCDCTL_KEEPALIVE_TIMEOUT", "ETCDCTL_WATCH_KEY",
    "ETCDCTL_WATCH_RANGE_END", "ETCDCTL_WRITE_OUT",
    # etcd's API 2.
    "ETCDCTL_NO_SYNC", "ETCDCTL_OUTPUT", "ETCDCTL_TIMEOUT", "ETCDCTL_TOTAL_TIMEOUT",
})  # fmt: skip
"""Variables of etcdctl's that do not say which etcd is reached, or as whom."""

_INSTEAD = {
    "ETCDCTL_AUTH_JWT_TOKEN": "write ETCDCTL_USER and ETCDCTL_PASSWORD",
    # etcd's API 2.
    "ETCDCTL_CA_FILE": "write ETCDCTL_CACERT",
    "ETCDCTL_CERT_FILE": "write ETCDCTL_CERT",
    "ETCDCTL_ENDPOINT": "write ETCDCTL_ENDPOINTS",
    "ETCDCTL_KEY_FILE": "write ETCDCTL_KEY",
    "ETCDCTL_PEERS": "write ETCDCTL_ENDPOINTS",
    "ETCDCTL_USERNAME": "write ETCDCTL_USER",
}
"""Ways to etcd and credentials -> what to write instead."""


def refusal(environment: Mapping[str, str], program: str) -> str | None:
    """Why `program` does not go by this environment, in a sentence; None: it does. An empty value is as good as
    none."""
    version = environment.get("ETCDCTL_API", "")
    if version and version.strip() != "3":
        return f"ETCDCTL_API={version}: {program} speaks etcd's API 3 only; write ETCDCTL_API=3 or unset it."
    name = next((name for name in sorted(_INSTEAD) if environment.get(name)), None)
    if name is None:
        return None
    return f"{name} is set, which {program} does not take: {_INSTEAD[name]}; unset it for {program}."


def unknown(environment: Mapping[str, str], known: Collection[str]) -> tuple[str, ...]:
    """The variables that look like etcdctl's and are none, such as a mistyped one. `known` are those that are taken."""
    others = {"ETCDCTL_API", *known, *WITHOUT_EFFECT, *_INSTEAD}
    given = (name for name, value in environment.items() if name.startswith("ETCDCTL_") and value)
    return tuple(sorted(name for name in given if name not in others))
