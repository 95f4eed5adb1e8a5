"""The host's WireGuard private key: read from the state directory, or made there once.

The key is the host's identity in the mesh, so a file that is there is never overwritten: what cannot be read, is no
key, or could be read by others is refused with a sentence that says what to do (the last two as `UnusableKey`). A new
key appears whole or not at all (written aside, synced, linked into place), also when two agents start at once: then
both use the first one's.
"""

from __future__ import annotations

import base64
import binascii
import errno
import os
import secrets
import stat
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from kilo_etcd.base import descriptors
from kilo_etcd.base.regularfile import NotRegular, open_regular

KEY_FILE = "key"
KEY_BYTES = 32
_MOST_BYTES = 1024
_REPLACE = "stop what uses it (systemctl stop kilo-etcd), remove it, and start that again: a new one is made"


class KeyFileError(Exception):
    """The private key cannot be had; the message is one sentence for the operator."""


class UnusableKey(KeyFileError):
    """The file that is there is no key, or others can read it: that does not pass by itself."""


class DanglingLink(KeyFileError):
    """The file is a symbolic link that leads nowhere: perhaps what it leads to is not mounted yet."""


def load_or_create(state_dir: Path, new: str | None = None) -> str:
    """The private key in base64, as `wg genkey` prints it; made (with its directory) where there is none, or `new`.
    KeyFileError."""
    return load_or_create_file(state_dir / KEY_FILE, flag="--state-dir", new=new)


def load_or_create_file(path: Path, *, flag: str, new: str | None = None) -> str:
    """The private key in this file, made (with its directory) where there is none, or `new`. `flag` is the option that
    names another place. KeyFileError."""
    existing = peek_file(path)
    if existing is not None:
        return existing
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _write_new(path, new or generate())
    except OSError as error:
        if (short := descriptors.shortage(error)) is not None:
            raise KeyFileError(f"the private key cannot be written to {path.parent}: {short}") from None
        remedy = "make room there" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make the directory writable"
        raise KeyFileError(
            f"the private key cannot be written to {path.parent}: {error.strerror}; "
            f"{remedy} or choose another with {flag}"
        ) from None
    key = peek_file(path)
    if key is None:
        raise KeyFileError(f"the private key {path} vanished while it was made; start again")
    return key


def peek(state_dir: Path) -> str | None:
    """The private key that is there already; None where there is none, UnusableKey where it is of no use."""
    return peek_file(state_dir / KEY_FILE)


def peek_file(path: Path) -> str | None:
    """As `peek`, of a file."""
    try:
        opened = open_regular(path, follow=True)
    except FileNotFoundError:
        if path.is_symlink():
            raise DanglingLink(
                f"the private key {path} is a symbolic link, and there is no file where it leads; "
                f"put the key there, or {_REPLACE}"
            ) from None
        return None
    except NotRegular:
        raise UnusableKey(f"the private key {path} is no regular file; move it away") from None
    except OSError as error:
        if (short := descriptors.shortage(error)) is not None:
            raise KeyFileError(f"the private key {path} cannot be read: {short}") from None
        raise KeyFileError(f"the private key {path} cannot be read: {error.strerror}; mend or move the file") from None
    with opened as file:
        status = os.fstat(file.fileno())
        if status.st_mode & 0o077:
            raise UnusableKey(
                f"the private key {path} is open to others (mode {stat.S_IMODE(status.st_mode):04o}); "
                f"run chmod 600 {path}; if others may have read it, {_REPLACE}"
            )
        raw = file.read(_MOST_BYTES)
    text = raw.strip()
    try:
        key = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(key) != KEY_BYTES:
        raise UnusableKey(
            f"the private key file {path} holds no WireGuard private key (44 characters of base64); "
            f"put the right one back, or {_REPLACE}"
        )
    return base64.b64encode(key).decode()


def peek_public_key(state_dir: Path) -> str | None:
    """The public key of the private key that is there already, in base64; None where there is none."""
    private = peek(state_dir)
    return None if private is None else public_key(private)


def generate() -> str:
    """A new private key, in base64."""
    return base64.b64encode(X25519PrivateKey.generate().private_bytes_raw()).decode()


def public_key(private: str) -> str:
    """The public key of a private key, both in base64, as `wg pubkey` computes it."""
    key = X25519PrivateKey.from_private_bytes(base64.b64decode(private))
    return base64.b64encode(key.public_key().public_bytes_raw()).decode()


def agreed(private: str, public: str) -> bytes | None:
    """The secret of 32 bytes that the owners of two keys can both compute (X25519) without a message to each other;
    None with a public key that yields none."""
    try:
        theirs = X25519PublicKey.from_public_bytes(base64.b64decode(public))
        return X25519PrivateKey.from_private_bytes(base64.b64decode(private)).exchange(theirs)
    except ValueError:
        return None


def _write_new(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    handle = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(aside, path)
        except FileExistsError:
            return
    finally:
        aside.unlink()
    sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """See to it that a file's new name is on the disk."""
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
