"""How a subcommand gets at the mesh: `Mesh` says which etcd and prefix, `ask` does one piece of work there.

What fails for a reason that the operator can do something about ends as `Failure`: one sentence on stderr, exit 1.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import IO, TYPE_CHECKING, Any, TypeVar

import click
from attrs import frozen

from kilo_etcd.etcd.api import Client, Config, EtcdError, PermissionDenied

if TYPE_CHECKING:
    from kilo_etcd.store.keys import Keys

T = TypeVar("T")


class Failure(click.ClickException):
    """Something that the operator can mend, in one sentence."""

    exit_code = 1

    def show(self, file: IO[Any] | None = None) -> None:
        """Write the sentence to standard error, or to `file`, with `kgctl: ` before it; click calls this."""
        click.echo(f"kgctl: {self.format_message()}", err=file is None, file=file)


@frozen
class Mesh:
    """Where the mesh lives."""

    etcd: Config
    prefix: str

    def ask(
        self,
        work: Callable[[Client, Keys], Awaitable[T]],
        *,
        on_remark: Callable[[str], object] = lambda _sentence: None,
    ) -> T:
        """Run `work` with a client, in a trio of its own. `on_remark`: as `open_client` has it. Failure,
        KeyboardInterrupt, or whatever `work` raises."""

        from kilo_etcd.etcd.client import open_client
        from kilo_etcd.store.keys import Keys

        async def session() -> T:
            async with open_client(self.etcd, on_remark=on_remark) as client:
                return await work(client, Keys(self.prefix))

        return run(session)


def run(work: Callable[[], Awaitable[T]]) -> T:
    """Run `work` in a trio of its own. Failure for etcd's errors, KeyboardInterrupt, or whatever `work` raises."""
    import trio

    try:
        return trio.run(work)
    except (EtcdError, BaseExceptionGroup) as error:
        leaves = _leaves(error)
        if any(isinstance(leaf, KeyboardInterrupt) for leaf in leaves):
            raise KeyboardInterrupt from None
        if not all(isinstance(leaf, EtcdError) for leaf in leaves):
            raise
        # Several tasks that fail at one cause say the same.
        sentences = list(dict.fromkeys(map(str, leaves)))
        if any(isinstance(leaf, PermissionDenied) for leaf in leaves):
            # A host's own user may write its own keys alone, which is as it should be.
            sentences.append("or take an operator's user (--user, ETCDCTL_USER)")
        raise Failure("; ".join(sentences)) from None


def _leaves(error: BaseException) -> list[BaseException]:
    if isinstance(error, BaseExceptionGroup):
        return [leaf for part in error.exceptions for leaf in _leaves(part)]
    return [error]
