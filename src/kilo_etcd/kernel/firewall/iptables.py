"""Runs `iptables` and `ip6tables`, for `--forward-rules` alone.

Why the programs: whether FORWARD is held by nftables or by the older xtables is the host's choice, made by which
`iptables` is installed, and docker follows it too. Nothing is run while nothing happens: where iptables writes to
nftables, the rules are read again only when the kernel's ruleset has another generation than at the last reading.
The older xtables tells of no changes: there our own rules are read at every resync, and the chain FORWARD is read as
often as its caller wants to know of changes, if there is a table.
"""

from __future__ import annotations

import errno
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from attrs import frozen

from kilo_etcd.base import descriptors
from kilo_etcd.kernel.firewall.chains import BaseChain, from_iptables, translation_from_iptables
from kilo_etcd.kernel.firewall.forward import AddForward, DeleteForward, ForwardRule, read_rules

_PROGRAMS = {4: "iptables", 6: "ip6tables"}
_PATH = "/usr/local/sbin:/usr/sbin:/sbin:/usr/local/bin:/usr/bin:/bin"
_DEADLINE = 15.0
_LOCK_SECONDS = 5.0
"""How long it waits for the lock that others hold."""
_LEGACY_TABLES = {4: Path("/proc/net/ip_tables_names"), 6: Path("/proc/net/ip6_tables_names")}


_MOST_PATIENCE = 32
"""Times the usual patience, if the program does not end again and again."""


@frozen
class _LegacyReading:
    """A chain that was read, when, and how many times as long as others it is believed: twice as long after each time
    that the program did not end, or waited for the lock in vain, since the next one may take all its time too."""

    ended: float
    chain: BaseChain | None
    patience: int = 1


class IptablesError(OSError):
    """The program's error output."""

    def __init__(self, detail: str) -> None:
        super().__init__(errno.EIO, detail)
        self.detail = detail


class Iptables:
    """The rules of one interface. Blocking; `generation` gives a number that any change of nftables changes."""

    def __init__(self, interface: str, record: Path, generation: Callable[[], int | None]) -> None:
        self._interface = interface
        self._record = record
        """Says that there may be rules of ours, so that nothing is run on hosts that never had any."""
        self._generation = generation
        self._last_read: tuple[int, tuple[dict[int, str], frozenset[ForwardRule]]] | None = None
        self._legacy: dict[tuple[int, str], _LegacyReading] = {}
        self._events: bool | None = None
        self.writes = 0

    def read(self, needed: bool) -> tuple[dict[int, str], frozenset[ForwardRule]]:
        """(family -> the chain for our rules, our rules); nothing where nobody wants any and none were made."""
        if not needed and not self._record.exists():
            return {}, frozenset()
        generation = self._generation()
        if self._last_read is not None and generation is not None and self._last_read[0] == generation:
            return self._last_read[1]
        current = self._read()
        if not needed and not current[1]:
            self._record.unlink(missing_ok=True)
        self._last_read = (generation, current) if generation is not None and self._reported() else None
        return current

    def _read(self) -> tuple[dict[int, str], frozenset[ForwardRule]]:
        chains: dict[int, str] = {}
        rules: frozenset[ForwardRule] = frozenset()
        for version, program in _PROGRAMS.items():
            if shutil.which(program, path=_PATH) is None:
                continue
            try:
                chains[version], own = read_rules(
                    _run(program, "-w", f"{_LOCK_SECONDS:g}", "-S"), version, self._interface
                )
            except OSError as error:
                if descriptors.is_shortage(error):
                    raise  # Else our own rules would be taken to be gone.
                continue
            rules |= own
        return chains, rules

    def legacy(self, version: int, *, patience: float) -> BaseChain | None:
        """The chain FORWARD of the older xtables, which nftables does not show; None: it has none, or it is not to be
        read. A reading is believed for `patience` seconds, since each one runs a program; that there is no table costs
        nothing to see, and is looked at each time."""
        return self._read_again("filter", version, patience, from_iptables, "-S")

    def legacy_translation(self, version: int, *, patience: float) -> BaseChain | None:
        """Likewise its chain PREROUTING that translates addresses. If there is one and it is not to be read, all may be
        translated."""
        return self._read_again("nat", version, patience, translation_from_iptables, "-t", "nat", "-S")

    def _read_again(
        self, table: str, version: int, patience: float, read: Callable[[str | None, int], BaseChain | None],
        *arguments: str,
    ) -> BaseChain | None:  # fmt: skip
        try:
            tables = _LEGACY_TABLES[version].read_text().split()
        except OSError:
            tables = []
        if table not in tables:
            self._legacy.pop((version, table), None)
            return None
        reading = self._legacy.get((version, table))
        if reading is None or time.monotonic() - reading.ended > patience * reading.patience:
            began = time.monotonic()
            printed = _run_legacy(version, *arguments)
            ended = time.monotonic()
            chain, times = read(printed, version), 1
            if printed is None and ended - began >= _LOCK_SECONDS:
                times = min(2 * (1 if reading is None else reading.patience), _MOST_PATIENCE)
                # What holds the lock changes the rules, or hangs: what they were is the best that is known.
                chain = chain if reading is None else reading.chain
            reading = self._legacy[version, table] = _LegacyReading(ended, chain, times)
        return reading.chain

    def _reported(self) -> bool:
        """Whether iptables writes to nftables, whose generation tells of changes."""
        if self._events is None:
            try:
                self._events = "nf_tables" in _run("iptables", "--version")
            except OSError:
                return False
        return self._events

    def make(self, change: AddForward | DeleteForward) -> None:
        """IptablesError if the program refuses."""
        self.writes += 1
        self._last_read = None
        if isinstance(change, AddForward):
            with suppress(OSError):
                self._record.parent.mkdir(parents=True, exist_ok=True)
                self._record.touch()
        _run(*change.command)


def _run_legacy(version: int, *arguments: str) -> str | None:
    """What the program for the older xtables prints; None: there is none, or it fails. One without a suffix may be
    another's, which would print the rules of nftables."""
    program = _PROGRAMS[version]
    for name in (f"{program}-legacy", program):
        if shutil.which(name, path=_PATH) is not None:
            with suppress(OSError):
                if name != program or "nf_tables" not in _run(name, "--version"):
                    return _run(name, "-w", f"{_LOCK_SECONDS:g}", *arguments)
    return None


def _run(*command: str) -> str:
    try:
        completed = subprocess.run(
            command, capture_output=True, text=True, timeout=_DEADLINE, stdin=subprocess.DEVNULL,
            env={"PATH": _PATH, "LC_ALL": "C"},
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise IptablesError(f"{command[0]} did not end within {_DEADLINE:g} s") from None
    if completed.returncode:
        raise IptablesError(" ".join(completed.stderr.split()) or f"exit status {completed.returncode}")
    return completed.stdout
