"""Whether the state directory holds what this host needs at its next start: its private key and the cached snapshot.

An agent that runs needs neither, so nothing would show that the directory is full, read-only or gone until the host
boots, as another node or without a mesh. `look` restores what it can, the directory and the key among it, and says what
it cannot. A key that is there is never overwritten, and one that was of no use before it went is not restored: most
likely an operator has removed it for a new one.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path

from attrs import frozen

from kilo_etcd.runtime import key_file

PERIOD_SECONDS = 10.0
"""Between two looks."""

NOT_KEPT = "this host keeps forwarding, but after a boot without etcd it would go by an old snapshot or by none"
WITHOUT_KEY = "; its private key is in memory only, and if the agent is started again before that, a new one is made"


@frozen
class StateFound:
    """What one look has found. `trouble`: what is wrong, in a sentence with the remedy."""

    trouble: str | None = None
    restored: bool = False
    """Whether the private key had gone, and was written again."""
    unusable: bool = False
    """Whether the key's file is of no use (open to others, no key, or a link that leads nowhere), or is gone since."""


def look(directory: Path, private_key: str, *, restore: bool = True) -> StateFound:
    """Look at the directory, and restore it and the key, which is left out without `restore`. Blocks as long as the
    disk does."""
    restored = False
    try:
        present = key_file.peek(directory)
        if present is None and not restore:
            return StateFound(
                f"the private key {directory / key_file.KEY_FILE} is gone, and is not restored, since it was of no use "
                "before (open to others, no key, or a link to none): systemctl restart "
                "kilo-etcd has a new one made, or put it back",
                unusable=True,
            )
        if present is None:
            present = key_file.load_or_create(directory, private_key)
            restored = present == private_key
    except (key_file.UnusableKey, key_file.DanglingLink) as error:
        return StateFound(f"{error}; the agent goes on with the one that it has read", unusable=True)
    except key_file.KeyFileError as error:
        return StateFound(f"{error}; {NOT_KEPT}{WITHOUT_KEY}")
    if present != private_key:
        return StateFound(
            f"the private key in {directory / key_file.KEY_FILE} is another one than the agent has: to use it, "
            "systemctl restart kilo-etcd, else put the former one back"
        )
    if (reason := _not_writable(directory)) is not None:
        return StateFound(
            f"the state directory {directory} cannot be written to: {os.strerror(reason)}; {NOT_KEPT}", restored
        )
    return StateFound(restored=restored)


def _not_writable(directory: Path) -> int | None:
    """Why nothing can be written there (errno), as far as can be told without writing."""
    try:
        if not os.access(directory, os.W_OK | os.X_OK):
            return errno.EROFS if os.statvfs(directory).f_flag & os.ST_RDONLY else errno.EACCES
        space = os.statvfs(directory)
    except OSError as error:
        return error.errno or errno.EIO
    root = os.geteuid() == 0
    blocks, inodes = (space.f_bfree, space.f_ffree) if root else (space.f_bavail, space.f_favail)
    # Some file systems count no inodes.
    full = (space.f_blocks and not blocks) or (space.f_files and not inodes)
    return errno.ENOSPC if full else None
