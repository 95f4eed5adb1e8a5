"""Where the agent's log goes: one readable line per event, or under systemd the same line with fields of its own.

An event is a sentence and fields: `log.info("leader elected", location="gcp")`. On a terminal or in a pipe it becomes a
line; where stderr is the journal it becomes an entry whose MESSAGE is that line and whose fields can be asked for
(`journalctl -u kilo-etcd KILO_LOCATION=gcp`). A log call never raises and waits for a reader at most a twentieth of a
second: lines that nobody takes are dropped and counted, since forwarding must not stop with the log. What is logged
again and again is logged less often (`runtime.log_rate_limiter`); `write_due` is to be called now and then for the last
of it. Values come from other hosts through etcd, so whatever a terminal could take for a command is escaped.
"""

from __future__ import annotations

import json
import logging
import os
import select
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO, cast

import structlog
from attrs import define, field, frozen

from kilo_etcd.runtime.log_rate_limiter import LIKE, Line, LogRateLimiter

IDENTIFIER = "kg"
OURS = "kilo_etcd"
PATIENCE = 0.05
"""Seconds that a log call waits for its reader."""
MOST_CHARACTERS = 2000
"""Of one value; the rest is cut, so that a record of 1 MiB does not become a line of 1 MiB."""

MOST_NAMED = 10
"""Conditions of one group that are logged one by one when they come or go together."""

_LEVELS = {"debug": 10, "info": 20, "warning": 30, "error": 40, "none": 50}
_PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
_COLOURS = {"debug": "\x1b[2m", "warning": "\x1b[33m", "error": "\x1b[31m", "critical": "\x1b[31;1m"}


class Logger(Protocol):
    """What the agent's code uses of structlog's bound logger."""

    def bind(self, **fields: Any) -> Logger:
        """A logger that adds these fields to each of its events."""
        ...

    def debug(self, event: str, **fields: Any) -> Any:
        """Log what is of use only to somebody who follows the agent step by step."""
        ...

    def info(self, event: str, **fields: Any) -> Any:
        """Log what an operator may want to know later."""
        ...

    def warning(self, event: str, **fields: Any) -> Any:
        """Log what an operator should look at, although the mesh works."""
        ...

    def error(self, event: str, **fields: Any) -> Any:
        """Log what does not work."""
        ...

    def exception(self, event: str, **fields: Any) -> Any:
        """Log an error with the traceback of the exception that is being handled."""
        ...


def setup_logging(
    level: str = "info",
    *,
    stream: TextIO | None = None,
    journal: Path | None = None,
    clock: Callable[[], float] = time.time,
    monotonic: Callable[[], float] = time.monotonic,
    repeated: bool = False,
) -> None:
    """Send the log of this process to `journal` (journald's socket), else to `stream`, else to where stderr leads.

    `level` is one of debug, info, warning, error and none (only what ends the agent). Warnings of libraries that use
    the standard library's logging come along. With `repeated` what is logged again and again is never left out;
    `monotonic` tells the seconds for that otherwise. May be called again: the last call counts.
    """
    if journal is None and stream is None and _stderr_is_journal():
        journal = JOURNAL_SOCKET
    global _current
    if _current is not None:
        _current.close()
    out: Out = _open_journal(journal) if journal is not None else Lines(stream, clock)
    _current = out if repeated else RateLimitedOutput(out, monotonic)
    out = _current
    structlog.configure(
        processors=[_hand_over],
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=lambda *_: _Last(out),
        cache_logger_on_first_use=False,
    )
    root = logging.getLogger()
    for handler in [handler for handler in root.handlers if isinstance(handler, _FromStandardLibrary)]:
        root.removeHandler(handler)
    root.addHandler(_FromStandardLibrary(out))
    # The layers below the agent may log with the standard library; their events pass at the agent's level.
    logging.getLogger(OURS).setLevel(_LEVELS[level])


def get_logger(**fields: Any) -> Logger:
    """The log, with these fields on every event."""
    return cast(Logger, structlog.get_logger(**fields))


# -- logged once ----------------------------------------------------------------------------------------------------


@frozen
class _LastLine:
    event: str
    fields: Mapping[str, Any]


@define
class Once:
    """Conditions that last: logged when they appear, again when they change, and once more when they are gone.

    The field `revision` says when something was noticed, not what, so it is no change.
    """

    log: Logger
    _last: dict[str, _LastLine] = field(factory=dict)
    _groups: dict[str, tuple[object, ...]] = field(factory=dict)

    def error(self, key: str, event: str, /, *, level: str = "error", **fields: Any) -> bool:
        """Say that the condition `key` holds; whether that was news."""
        last = _LastLine(event, {name: value for name, value in fields.items() if name != "revision"})
        if self._last.get(key) == last:
            return False
        self._last[key] = last
        getattr(self.log, level)(event, **fields)
        return True

    def warning(self, key: str, event: str, /, **fields: Any) -> bool:
        """Like `error`, at the level of a warning."""
        return self.error(key, event, level="warning", **fields)

    def clear(self, key: str, event: str = "", /, **fields: Any) -> bool:
        """Say that `key` holds no longer, where it held; whether that was news."""
        last = self._last.pop(key, None)
        if last is None:
            return False
        self.log.info(event or f"no longer: {last.event}", **fields)
        return True

    def errors(
        self,
        group: str,
        conditions: Iterable[object],
        /,
        *,
        level: str = "error",
        noun: str = "problems",
        **fields: Any,
    ) -> None:
        """Say which conditions of a group are new and which are gone; `conditions` are all that hold now, as text or as
        what has one. Of very many at once `MOST_NAMED` are named and the others counted, as so many `noun`."""
        stated = conditions if isinstance(conditions, tuple) else tuple(conditions)
        before = self._groups.get(group, ())
        if stated is before:
            return
        now = tuple(dict.fromkeys(stated))
        self._groups[group] = stated if len(stated) == len(now) else now
        if now == before:
            return
        former, holding = set(before), set(now)
        new = [condition for condition in now if condition not in former]
        gone = [condition for condition in before if condition not in holding]
        for change, changed, say, prefix in (("new", new, getattr(self.log, level), ""),
                                             ("gone", gone, self.log.info, "no longer: ")):  # fmt: skip
            # Many that come in small parts are as much of a flood as many at once.
            many = max(len(now), len(before)) > MOST_NAMED
            for condition in changed[:MOST_NAMED]:
                say(f"{prefix}{condition}", **({LIKE: f"{group} {change}"} if many else {}), **fields)
            if (rest := len(changed) - MOST_NAMED) > 0:
                say(f"{prefix}{rest} more {noun} ({len(now)} in all now); kgctl status shows them",
                    **{LIKE: f"{group} {change}, counted"}, **fields)  # fmt: skip


# -- an event as text ---------------------------------------------------------------------------------------------


def render(event: Mapping[str, Any]) -> str:
    """The sentence and its fields, `leader elected location=gcp revision=7`; a traceback follows on its own lines."""
    sentence = _printable(_text(event.get("event", "")))
    fields = [f"{name}={_quoted(value)}" for name, value in _fields(event)]
    return "  ".join(part for part in (sentence, " ".join(fields)) if part) + _traceback(event)


def _fields(event: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name, value in event.items():
        if name not in ("event", "exc_info", "stack_info", LIKE) and value is not None:
            yield name, _text(value)


def _text(value: Any) -> str:
    try:
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, tuple | list | set | frozenset):
            text = ",".join(_text(item) for item in value)
        else:
            text = str(value)
    except Exception as error:
        text = f"<{type(value).__name__}: {type(error).__name__} while it was formatted>"
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + "…"


def _quoted(text: str) -> str:
    if not text or any(c in ' "=\\' or not c.isprintable() for c in text):
        return _printable(json.dumps(text, ensure_ascii=False))
    return text


def _printable(text: str) -> str:
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _traceback(event: Mapping[str, Any]) -> str:
    exc_info = event.get("exc_info")
    if not exc_info:
        return ""
    if isinstance(exc_info, BaseException):
        error: BaseException | None = exc_info
    elif isinstance(exc_info, tuple):
        error = exc_info[1]
    else:
        error = sys.exc_info()[1]
    if error is None:
        return ""
    lines = "".join(traceback.format_exception(error)).splitlines()
    return "".join("\n    " + _printable(line) for line in lines)


# -- where it goes ------------------------------------------------------------------------------------------------


class Out(Protocol):
    """Takes one event. Whatever it raises is swallowed by the caller."""

    def write(self, level: str, event: Mapping[str, Any]) -> None:
        """Write one event, with its level: `debug`, `info`, `warning`, `error` or `critical`."""
        ...

    def close(self) -> None:
        """Let go of what this output has opened; nothing is written afterwards."""
        ...


class RateLimitedOutput:
    """Hands on to `out`, but what is logged again and again less often. `monotonic`: seconds of a monotonic clock."""

    def __init__(self, out: Out, monotonic: Callable[[], float]) -> None:
        self._out = out
        self._monotonic = monotonic
        self._limiter = LogRateLimiter()

    def write(self, level: str, event: Mapping[str, Any]) -> None:
        """Hand the event on, now or later, or count it. `debug` and `critical` are never held up."""
        if level in ("debug", "critical"):
            self._out.write(level, event)
            return
        self._write(self._limiter.offer(Line(level, event), self._monotonic()))

    def write_due(self) -> None:
        """Hand on what was left out for long enough."""
        self._write(self._limiter.due(self._monotonic()))

    def write_rest(self) -> None:
        """Hand on the last of each, however short ago the one before it was."""
        self._write(self._limiter.rest())

    def close(self) -> None:
        """Hand on the last of what was left out, and close `out`."""
        self.write_rest()
        self._out.close()

    def _write(self, lines: Iterable[Line]) -> None:
        for line in lines:
            _write_safely(self._out, line.level, line.event)


_current: Out | None = None


def write_due() -> None:
    """Write what was left out because it had been logged so often, if that is long enough ago."""
    if isinstance(_current, RateLimitedOutput):
        _current.write_due()


def write_rest() -> None:
    """Say the last of what was left out: the agent ends."""
    if isinstance(_current, RateLimitedOutput):
        _current.write_rest()


class Lines:
    """Lines on a stream, coloured on a terminal. Without a stream: the sys.stderr of the moment."""

    def __init__(self, stream: TextIO | None, clock: Callable[[], float]) -> None:
        self._stream = stream
        self._clock = clock
        self._dropped = 0

    def write(self, level: str, event: Mapping[str, Any]) -> None:
        """Write one line, with the time in UTC. If nobody reads the stream, the line is dropped after `PATIENCE`, and
        the next one that is written says how many were."""
        stream = self._stream or sys.stderr
        now = self._clock()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
        line = f"{stamp} {level:<7} {render(event)}"
        if stream.isatty():
            colour = _COLOURS.get(level, "")
            line = f"{colour}{line}\x1b[0m" if colour else line
        if self._dropped:
            line = f"{stamp} warning log lines were dropped, since nobody read them  lines={self._dropped}\n{line}"
        if _takes_more(stream):
            stream.write(line + "\n")
            stream.flush()
            self._dropped = 0
        else:
            self._dropped += 1

    def close(self) -> None:
        """The stream is not ours to close."""


def _takes_more(stream: TextIO) -> bool:
    try:
        handle = stream.fileno()
    except (OSError, ValueError):
        return True
    poll = select.poll()
    poll.register(handle, select.POLLOUT)
    # A pipe is writable when it takes PIPE_BUF bytes (4096) at once, which is more than nearly every line.
    return bool(poll.poll(PATIENCE * 1000))


JOURNAL_SOCKET = Path("/run/systemd/journal/socket")


class Journal:
    """Entries in journald's native protocol: the line as MESSAGE, each field as KILO_<FIELD>."""

    def __init__(self, path: Path) -> None:
        # Only where there is a journal: the module costs a uuid and a tempfile that nobody else needs.
        from logging_journald import JournaldTransport

        # Not connected: journald may be restarted, and then only the path leads to it.
        self._transport = JournaldTransport(path, connected=False)
        self._transport.socket.settimeout(PATIENCE)
        self._dropped = 0

    def write(self, level: str, event: Mapping[str, Any]) -> None:
        """Send one entry. An entry is dropped if journald takes nothing for `PATIENCE`, or still takes nothing after
        that; the next one that is sent says how many were."""
        entry = list(self._entry(level, event))
        if self._dropped:
            entry.append(("KILO_DROPPED_BEFORE", str(self._dropped)))
        try:
            self._transport.send(entry)
        except TimeoutError:
            self._dropped += 1
            self._transport.socket.setblocking(False)
            return
        except BlockingIOError:
            self._dropped += 1
            return
        if self._dropped:
            self._dropped = 0
            self._transport.socket.settimeout(PATIENCE)

    def close(self) -> None:
        """Close the socket."""
        self._transport.socket.close()

    def _entry(self, level: str, event: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
        yield "MESSAGE", render(event)
        yield "PRIORITY", str(_PRIORITIES.get(level, 6))
        yield "SYSLOG_IDENTIFIER", IDENTIFIER
        yield "SYSLOG_PID", str(os.getpid())
        yield "KILO_EVENT", _text(event.get("event", ""))
        for name, value in _fields(event):
            yield _field_name(name), value


def _field_name(name: str) -> str:
    # journald drops fields with other characters and those longer than 64 bytes.
    return ("KILO_" + "".join(c if c.isascii() and c.isalnum() else "_" for c in name).upper())[:64]


def _open_journal(path: Path) -> Out:
    try:
        return Journal(path)
    except Exception:
        return Lines(None, time.time)


def _stderr_is_journal() -> bool:
    """systemd's rule (systemd.exec(5), $JOURNAL_STREAM): device and inode of stderr are those in the variable."""
    device, _, inode = os.environ.get("JOURNAL_STREAM", "").partition(":")
    try:
        status = os.fstat(sys.stderr.fileno())
        return (status.st_dev, status.st_ino) == (int(device), int(inode))
    except (OSError, ValueError, AttributeError):
        return False


def _hand_over(_logger: Any, level: str, event: Any) -> tuple[tuple[str, Any], dict[str, Any]]:
    return (level, event), {}


class _Last:
    """The end of structlog's chain: hands the event on, whatever its level."""

    def __init__(self, out: Out) -> None:
        self._out = out

    def _write(self, level: str, event: Mapping[str, Any]) -> None:
        _write_safely(self._out, level, event)

    debug = info = warning = error = critical = exception = fatal = msg = _write


def _write_safely(out: Out, level: str, event: Mapping[str, Any]) -> None:
    try:
        out.write("error" if level == "exception" else level, event)
    except Exception:
        # The journal's socket is gone: stderr is the second place, and there is no third.
        if not isinstance(out, Lines):
            _write_safely(Lines(None, time.time), level, event)


class _FromStandardLibrary(logging.Handler):
    """Warnings and worse of libraries, as events with the logger's name."""

    def __init__(self, out: Out) -> None:
        super().__init__()
        self._out = out

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.WARNING or record.name.partition(".")[0] == OURS

    def emit(self, record: logging.LogRecord) -> None:
        try:
            event = {"event": record.getMessage(), "logger": record.name, "exc_info": record.exc_info}
        except Exception:
            event = {"event": str(record.msg), "logger": record.name}
        _write_safely(self._out, record.levelname.lower(), event)
