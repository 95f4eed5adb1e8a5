"""A watch that outlives its connections.

`Progress` is the part that decides, sans-io: it eats etcd's answers and gives batches, and knows the revision at
which to resume. It promises that each event is given once, in order, and that the events of one revision are in one
batch. `Watcher` is the part that waits; it has no task of its own, so a slow reader holds etcd back by HTTP/2's
windows and no buffer grows. A read that is cancelled loses nothing.

A progress notice that was asked for is not to be trusted from etcd before 3.4.25 and 3.5.8: it may overtake events
(etcd issue 15220). From those the batch's `revision` is what has certainly been seen, and `header.revision` what the
member said.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import trio

from .api import Compacted, Config, EtcdError, Event, Unavailable, WatchBatch
from .calls import Call, Caller
from .channel import EndpointsUnreachable
from .grpc import PERMISSION_DENIED, UNAUTHENTICATED, UNAVAILABLE, Doing, StatusError, TransportFailed
from .pb import etcd_pb2 as pb
from .values import event, header

PATH = "/etcdserverpb.Watch/Watch"
TOKEN_PAUSE = 1.0
"""Seconds at most before a token is asked for again."""


class Progress:
    """How far a watch has come, from answer to answer: joins fragments, drops what was given already, and says where to
    resume."""

    def __init__(self, start_revision: int) -> None:
        self.next_revision = start_revision
        """Where to (re)start; 0: at the revision after now."""
        self.created = False
        self.trusted = False
        """Whether notices that were asked for tell the truth."""
        self.pieces = 0
        """Answers with events, fragments counted one by one."""
        self._fragments: list[Event] = []

    def disconnected(self) -> None:
        """The call ended: the next one makes the watch anew, and fragments that were not complete come again."""
        self.created = False
        self.trusted = False
        self._fragments.clear()

    def feed(self, answer: pb.WatchResponse) -> WatchBatch | None:
        """Raises Compacted, and StatusError when etcd ends the watch."""
        if answer.canceled:
            if answer.compact_revision:
                raise Compacted(answer.compact_revision)
            reason = answer.cancel_reason
            if "permission denied" in reason:
                raise StatusError(PERMISSION_DENIED, reason)
            about_token = any(words in reason for words in ("auth token", "auth store", "user name is empty"))
            raise StatusError(UNAUTHENTICATED if about_token else UNAVAILABLE, reason)
        if answer.created:
            self.created = True
            if self.next_revision == 0:
                self.next_revision = answer.header.revision + 1
            return None
        self.pieces += bool(answer.events)
        # Below the resume point is what was given already.
        self._fragments.extend(event(e) for e in answer.events if e.kv.mod_revision >= self.next_revision)
        if answer.fragment:
            return None
        events, self._fragments = tuple(self._fragments), []
        if events:
            self.next_revision = events[-1].kv.mod_revision + 1
            return WatchBatch(events=events, revision=self.next_revision - 1, header=header(answer.header))
        if answer.events:
            return None
        if answer.watch_id >= 0 or self.trusted:
            self.next_revision = max(self.next_revision, answer.header.revision + 1)
        return WatchBatch(events=(), revision=self.next_revision - 1, header=header(answer.header))


def trustworthy(version: str) -> bool:
    """Whether an etcd of this version sends a requested progress notice behind the events before it."""
    match = re.match(r"(\d+)\.(\d+)\.(\d+)", version)
    numbers = tuple(map(int, match.groups())) if match else (0, 0, 0)
    return (3, 4, 25) <= numbers < (3, 5, 0) or numbers >= (3, 5, 8)


class Watcher:
    """Implements `api.Watch`; iterated by one task at a time."""

    def __init__(
        self, caller: Caller, key: bytes, range_end: bytes, start_revision: int, progress_notify: bool
    ) -> None:
        self.reconnects = -1
        self._caller = caller
        self._key = key
        self._range_end = range_end
        self._progress_notify = progress_notify
        self._progress = Progress(start_revision)
        self._progress_wanted = False
        self._call: Call | None = None
        self._doing = Doing("watch", key)
        self._token_refused = False
        self._last_failure: EtcdError | None = None

    def __aiter__(self) -> Watcher:
        return self

    async def __anext__(self) -> WatchBatch:
        while True:
            batch = await self._step()
            if batch is not None:
                return batch

    @property
    def pieces(self) -> int:
        """Answers with events so far, fragments counted one by one."""
        return self._progress.pieces

    async def start(self) -> None:
        """Wait until etcd has made the watch: "from now". Raises Unavailable after `call_timeout`."""
        config: Config = self._caller.config
        with trio.move_on_after(config.call_timeout):
            while not self._progress.created:
                await self._step()
            return
        raise self._last_failure or Unavailable(
            f"no etcd endpoint began to {self._doing} within {config.call_timeout:g} s; retry"
        )

    async def request_progress(self) -> None:
        """Implements `api.Watch.request_progress`. If the watch is about to connect again, it asks after that."""
        self._progress_wanted = True
        if self._progress.created:
            # The caller that iterates sees the same failure, connects again, and asks again.
            with suppress(TransportFailed, StatusError):
                await self._ask_progress()

    def close(self) -> None:
        """End the watch at etcd. Closing twice is allowed."""
        self._progress.disconnected()
        if self._call:
            self._call.close()
            self._call = None

    async def _step(self) -> WatchBatch | None:
        """Take one step: connect, or take one answer. Raises EtcdError when the watch cannot go on."""
        call = self._call
        try:
            if call is None:
                call = await self._open()
            with trio.move_on_after(math.inf if self._progress.created else self._caller.config.attempt_timeout):
                raw = await call.receive()
                if raw is None:
                    raise TransportFailed("etcd ended the watch")
                batch = self._progress.feed(pb.WatchResponse.FromString(raw))
                if self._progress.created:
                    self._token_refused = False
                    self._caller.channel.succeeded(call.connection)
                    if self._progress_wanted and batch is None:
                        await self._ask_progress()
                return batch
            raise TransportFailed("etcd did not make the watch in time")
        except EndpointsUnreachable as error:
            if error.permanent:
                raise error.to_error() from None
            self._last_failure = error.to_error()
        except Compacted:
            self.close()
            raise
        except Unavailable as error:
            # A token could not be had: etcd is there, but can decide nothing at present.
            self._last_failure = error
            await trio.sleep(random.uniform(0.5, 1.0) * TOKEN_PAUSE)
        except (TransportFailed, StatusError) as error:
            self.close()
            if call is None:
                return None
            # etcd 3.4 may say "permission denied" where it means that the token is not valid any more.
            about_token = isinstance(error, StatusError) and error.code in (PERMISSION_DENIED, UNAUTHENTICATED)
            if about_token and self._caller.tokens and not self._token_refused:
                self._caller.tokens.refuse(call.token)
                self._token_refused = True
            elif about_token or not self._caller.stream_failed(call, error):
                raise self._caller.explain(error, call.connection, self._doing) from None
            self._last_failure = self._caller.explain(error, call.connection, self._doing)
        return None

    async def _open(self) -> Call:
        call = await self._caller.stream(PATH)
        try:
            await call.send(
                pb.WatchRequest(
                    create_request=pb.WatchCreateRequest(
                        key=self._key,
                        range_end=self._range_end,
                        start_revision=self._progress.next_revision,
                        progress_notify=self._progress_notify,
                        fragment=True,
                    )
                )
            )
        except BaseException:
            call.close()
            raise
        self._call = call
        self.reconnects += 1
        return call

    async def _ask_progress(self) -> None:
        call = self._call
        if call is None:
            return
        if not self._progress.trusted and call.connection.server_version is None:
            with trio.move_on_after(self._caller.config.attempt_timeout):
                try:
                    answer = await self._caller.attempt(
                        call.connection, "/etcdserverpb.Maintenance/Status", pb.StatusRequest(), call.token
                    )
                    call.connection.server_version = pb.StatusResponse.FromString(answer).version
                except StatusError:
                    call.connection.server_version = ""  # It does not tell: then it is not trusted.
        if call is self._call:
            self._progress.trusted = trustworthy(call.connection.server_version or "")
            await call.send(pb.WatchRequest(progress_request=pb.WatchProgressRequest()))
            self._progress_wanted = False

    def __repr__(self) -> str:
        state = "watching" if self._progress.created else "connecting"
        return f"<Watcher of {self._key!r} [{state}, next revision {self._progress.next_revision}]>"


@asynccontextmanager
async def watch(
    caller: Caller, key: bytes, range_end: bytes, start_revision: int, progress_notify: bool
) -> AsyncIterator[Watcher]:
    """Watch a range while the block lasts. If `start_revision` is 0, the block begins when etcd has made the watch."""
    watcher = Watcher(caller, key, range_end, start_revision, progress_notify)
    try:
        if start_revision == 0:
            await watcher.start()
        yield watcher
    finally:
        watcher.close()
