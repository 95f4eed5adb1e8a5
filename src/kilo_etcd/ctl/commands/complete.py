"""Shell completion with real names: what is in etcd now, asked for briefly.

Each function is a `shell_complete` of click's. Whatever goes wrong, there is nothing to complete: a person who presses
the tab key is not to be shown an error. `completion_command` prints the script for a shell.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from kilo_etcd.ctl.context import Mesh

if TYPE_CHECKING:
    from kilo_etcd.etcd.api import Client
    from kilo_etcd.store.keys import Keys

PATIENCE_SECONDS = 1.5


def nodes(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """The registered nodes."""
    return _starting(_names(context, "nodes"), incomplete)


def peers(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """The outside peers."""
    return _starting(_names(context, "peers"), incomplete)


def ends(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """Nodes and peers."""
    return _starting(_names(context, "nodes", "peers"), incomplete)


def labels(context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """The locations that have a label or a leader."""
    return _starting(_names(context, "labels"), incomplete)


def annotation_names(_context: click.Context, _parameter: click.Parameter, incomplete: str) -> list[str]:
    """`name=` for each annotation that is known."""
    from kilo_etcd.store.annotations import ANNOTATIONS

    return _starting((f"{name}=" for name in ANNOTATIONS), incomplete)


def _starting(names: Iterable[str], incomplete: str) -> list[str]:
    return sorted(name for name in names if name.startswith(incomplete))


def _names(context: click.Context, *kinds: str) -> set[str]:
    from kilo_etcd.runtime.options import etcd_and_prefix

    try:
        mesh = Mesh(*etcd_and_prefix(context.find_root()))
        return mesh.ask(lambda client, keys: _look(client, keys, kinds))
    except Exception:
        return set()


async def _look(client: Client, keys: Keys, kinds: tuple[str, ...]) -> set[str]:
    import trio

    from kilo_etcd.etcd.api import prefix_end
    from kilo_etcd.store import keys as k
    from kilo_etcd.store.operator import locations

    names: set[str] = set()
    with trio.move_on_after(PATIENCE_SECONDS):
        roots = {"nodes": keys.by_root, "labels": keys.by_root, "peers": keys.peers_root}
        for root in dict.fromkeys(roots[kind] for kind in kinds):
            for kv in (await client.range(root, prefix_end(root), keys_only=True)).kvs:
                match keys.parse(kv.key):
                    case k.NodeKey(name) if "nodes" in kinds:
                        names.add(name)
                    case k.PeerKey(name) if "peers" in kinds:
                        names.add(name)
                    case k.LeaderKey(location=name) if "labels" in kinds and name:
                        names.add(name)
        if "labels" in kinds:
            names |= {label for label in (await locations(client, keys)).values() if label}
    return names


@click.command(
    "completion",
    epilog="Examples:\n\n\b\n  kgctl completion bash | install -D -m 0644 /dev/stdin /etc/bash_completion.d/kgctl\n"
    "  kgctl completion zsh > /usr/local/share/zsh/site-functions/_kgctl\n"
    "  kgctl completion fish > ~/.config/fish/completions/kgctl.fish",
)
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
def completion_command(shell: str) -> None:
    """Print the script that has a shell complete kgctl's commands, options, and the names of nodes and peers."""
    from click.shell_completion import get_completion_class

    from kilo_etcd.ctl.main import main

    kind = get_completion_class(shell)
    assert kind is not None
    maker = kind(main, {}, "kgctl", "_KGCTL_COMPLETE")
    # click's own `source` would run the shell to look at its version, on a machine that may not have it.
    sys.stdout.write(maker.source_template % maker.source_vars() + "\n")
