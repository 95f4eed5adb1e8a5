"""The variables of etcdctl that `kg` and `kgctl` do not take: an environment that was made for etcdctl must not reach
another etcd here, or reach it in another way, without a word.

A variable of which `kg` and `kgctl` have the flag is read as that. Those that say only what etcdctl prints are left to
it. Any other one is refused in a sentence, that of a later etcdctl or a mistyped one too.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

OUTPUT = frozenset({"ETCDCTL_DEBUG", "ETCDCTL_HEX", "ETCDCTL_WRITE_OUT"})
"""What etcdctl prints, and how. They are without effect on `kg` and `kgctl`."""

_WATCH = frozenset({"ETCDCTL_WATCH_KEY", "ETCDCTL_WATCH_RANGE_END"})
"""What `etcdctl watch` watches."""

_LOST = "an etcd member that does not answer is left after 2.5 s, which is not for setting"

_INSTEAD = {
    "ETCDCTL_KEEPALIVE_TIME": _LOST,
    "ETCDCTL_KEEPALIVE_TIMEOUT": _LOST,
    # etcd's API 2.
    "ETCDCTL_CA_FILE": "write ETCDCTL_CACERT",
    "ETCDCTL_CERT_FILE": "write ETCDCTL_CERT",
    "ETCDCTL_ENDPOINT": "write ETCDCTL_ENDPOINTS",
    "ETCDCTL_KEY_FILE": "write ETCDCTL_KEY",
    "ETCDCTL_PEERS": "write ETCDCTL_ENDPOINTS",
    "ETCDCTL_TIMEOUT": "write ETCDCTL_DIAL_TIMEOUT",
    "ETCDCTL_TOTAL_TIMEOUT": "write ETCDCTL_COMMAND_TIMEOUT",
    "ETCDCTL_USERNAME": "write ETCDCTL_USER",
}


def refusal(environment: Mapping[str, str], known: Collection[str], program: str) -> str | None:
    """Why `program`, which has flags for the variables `known`, does not go by this environment, in a sentence; None:
    it does. An empty value is as good as none."""
    for name in sorted(environment):
        value = environment[name]
        if not name.startswith("ETCDCTL_") or not value or name in known or name in OUTPUT or name in _WATCH:
            continue
        if name == "ETCDCTL_API":
            if value.strip() == "3":
                continue
            return f"ETCDCTL_API={value}: {program} speaks etcd's API 3 only; write ETCDCTL_API=3 or unset it."
        instead = _INSTEAD.get(name, f"it may say another way to etcd than {program} would take")
        return f"{name} is set, which {program} does not take: {instead}; unset it for {program}."
    return None
