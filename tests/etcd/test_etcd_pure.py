"""What decides in the etcd client, without etcd: endpoints, framing, statuses, backoff, and where a watch resumes."""

from __future__ import annotations

import itertools
import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import examples
from kilo_etcd.etcd.api import (
    BadRequest,
    Compacted,
    Config,
    EtcdError,
    Full,
    LeaseNotFound,
    PermissionDenied,
    Unauthenticated,
    Unavailable,
    prefix_end,
)
from kilo_etcd.etcd.balancer import BACKOFF_MOST, Balancer, backoff
from kilo_etcd.etcd.endpoint import parse_endpoint
from kilo_etcd.etcd.grpc import Deframer, Doing, StatusError, TransportFailed, frame, status_of, to_error
from kilo_etcd.etcd.lease import NextKeepalive, next_keepalive
from kilo_etcd.etcd.pb import etcd_pb2 as pb
from kilo_etcd.etcd.values import prefix_range
from kilo_etcd.etcd.watch import Progress, trustworthy

# -- endpoints


@pytest.mark.parametrize(
    ("text", "tls", "expected", "authority"),
    [
        ("127.0.0.1:2379", False, "http://127.0.0.1:2379", "127.0.0.1:2379"),
        ("127.0.0.1:2379", True, "https://127.0.0.1:2379", "127.0.0.1:2379"),
        ("http://etcd.example:2379", True, "http://etcd.example:2379", "etcd.example:2379"),
        ("https://etcd.example:2379/", False, "https://etcd.example:2379", "etcd.example:2379"),
        (" [::1]:2379 ", False, "http://[::1]:2379", "[::1]:2379"),
        ("https://[fd00::7]:4001", False, "https://[fd00::7]:4001", "[fd00::7]:4001"),
        ("etcd-1", False, "http://etcd-1:2379", "etcd-1:2379"),
    ],
)
def test_endpoints_are_read_as_etcdctl_does(text: str, tls: bool, expected: str, authority: str) -> None:
    endpoint = parse_endpoint(text, tls=tls)
    assert (str(endpoint), endpoint.authority) == (expected, authority)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a..b:1",
        ".b:1",
        "x" * 64 + ":1",
        "http://",
        "unix:///run/etcd",
        "a b:2379",
        "host:port",
        "host:99999",
        "http://h:1/path",
        "http://u@h:1",
    ],
)
def test_what_is_no_endpoint_is_refused_by_name(text: str) -> None:
    with pytest.raises(BadRequest, match="is not an etcd endpoint"):
        parse_endpoint(text, tls=False)


# -- framing


@settings(max_examples=examples(50), deadline=None)
@given(messages=st.lists(st.binary(max_size=50)), cuts=st.lists(st.integers(1, 20), min_size=1))
def test_messages_survive_any_cutting(messages: list[bytes], cuts: list[int]) -> None:
    wire = b"".join(map(frame, messages))
    deframer, got, place = Deframer(), list[bytes](), 0
    while wire:
        size = cuts[place % len(cuts)]
        got += deframer.feed(wire[:size])
        wire, place = wire[size:], place + 1
    assert got == messages
    assert deframer.pending == 0


@pytest.mark.parametrize("wire", [b"\x01\0\0\0\x01x", b"\0\xff\xff\xff\xff"])
def test_compressed_or_absurd_frames_are_refused(wire: bytes) -> None:
    with pytest.raises(TransportFailed):
        Deframer().feed(wire)


# -- statuses


def test_status_is_read_from_trailers() -> None:
    assert status_of([(b"grpc-status", b"0")]) is None
    status = status_of([(b"grpc-status", b"14"), (b"grpc-message", b"no%20leader%3A %E2%9C%93")])
    assert status
    assert (status.code, status.message) == (14, "no leader: ✓")
    assert status_of([]) is not None


@pytest.mark.parametrize(
    ("code", "message", "kind", "words"),
    [
        (16, "etcdserver: invalid auth token", Unauthenticated, "token"),
        (3, "etcdserver: authentication failed, invalid user ID or password", Unauthenticated, "wrong password"),
        (3, "etcdserver: user name is empty", Unauthenticated, "--user"),
        (7, "etcdserver: permission denied", PermissionDenied, "/kilo/x"),
        (5, "etcdserver: requested lease not found", LeaseNotFound, "expired"),
        (11, "etcdserver: mvcc: required revision has been compacted", Compacted, "list again"),
        (3, "etcdserver: request is too large", BadRequest, "too large"),
        (3, "etcdserver: too many operations in txn request", BadRequest, "too many operations"),
        (3, "etcdserver: duplicate key given in txn request", BadRequest, "duplicate key"),
        (14, "etcdserver: no leader", Unavailable, "retry"),
        (14, "etcdserver: request timed out", Unavailable, "timed out"),
        (8, "etcdserver: too many requests", Unavailable, "retry"),
        (8, "etcdserver: mvcc: database space exceeded", Full, "defragment"),
        (12, "unknown method", EtcdError, "gRPC status 12"),
    ],
)
def test_each_status_is_one_kind_of_error(code: int, message: str, kind: type[EtcdError], words: str) -> None:
    error = to_error(StatusError(code, message), Doing("write", b"/kilo/x"), endpoint="http://h:1", user="kilo")
    assert type(error) is kind
    assert words in str(error)
    assert "\n" not in str(error)


# -- which endpoint

A, B, C = (parse_endpoint(f"10.0.0.{n}:2379", tls=False) for n in (1, 2, 3))


def test_backoff_grows_to_a_second_and_jitters() -> None:
    assert [backoff(n, 1.0) for n in (1, 2, 3)] == [0.05, 0.1, 0.2]
    assert backoff(1000, 1.0) == BACKOFF_MOST
    assert backoff(3, 0.0) == backoff(3, 1.0) / 2


def test_a_failed_endpoint_is_left_for_another_and_comes_back() -> None:
    balancer = Balancer([A, B, C], random.Random(1))
    first = balancer.order(0.0)[0][1]
    balancer.chosen(first)
    balancer.failed(first, 0.0)
    order = balancer.order(0.0)
    assert order[-1][1] == first
    assert order[0][0] == 0.0
    assert order[-1][0] > 0.0
    # Later it has rested, but who never failed is still better; once it has answered it is like the others.
    assert balancer.order(10.0)[-1] == (0.0, first)
    balancer.succeeded(first)
    assert {rest for rest, _ in balancer.order(0.0)} == {0.0}


@settings(max_examples=examples(30))
@given(seed=st.integers(0, 1000), bad=st.sets(st.sampled_from([A, B, C]), max_size=2))
def test_a_good_endpoint_is_found_however_many_are_bad(seed: int, bad: set[object]) -> None:
    balancer, now = Balancer([A, B, C], random.Random(seed)), 0.0
    for _ in range(3):
        rest, endpoint = balancer.order(now)[0]
        now += rest
        balancer.chosen(endpoint)
        if endpoint not in bad:
            break
        balancer.failed(endpoint, now)
    assert endpoint not in bad


def test_clients_spread_over_the_endpoints() -> None:
    assert {Balancer([A, B, C], random.Random(seed)).order(0)[0][1] for seed in range(20)} == {A, B, C}


# -- a lease


def patience_of(ttl: int) -> float:
    return max(0.25, min(ttl / 3, Config().attempt_timeout))


@pytest.mark.parametrize("ttl", [3, 5, 15])
@pytest.mark.parametrize("slow", [0.0, 0.1, 0.4, 1.1])
def test_a_second_keepalive_has_its_time_before_the_lease_ends(ttl: int, slow: float) -> None:
    """If answers come in time for a proxy's next one to come in time too, and the first one does not come at all."""
    patience = patience_of(ttl)
    if slow + 0.55 < patience:
        then = next_keepalive(0.0, slow, ttl / 3, patience, from_answer=False)
        assert then.at + 2 * patience <= ttl


def pauses(ttl: int, slow: float, count: int = 20) -> list[float]:
    """Seconds from each keepalive to the next one, if all answers are as late as the first."""
    then, times = NextKeepalive(0.0), [0.0]
    for _ in range(count):
        then = next_keepalive(
            then.at, then.at + slow, ttl / 3, patience_of(ttl), from_answer=then.from_answer
        )  # fmt: skip
        times.append(then.at)
    return [later - earlier for earlier, later in itertools.pairwise(times)]


@pytest.mark.parametrize("ttl", [3, 5, 15])
def test_a_slow_etcd_is_not_taken_for_a_proxy_twice(ttl: int) -> None:
    first, *later = pauses(ttl, 0.99 * patience_of(ttl))
    assert first + patience_of(ttl) < ttl
    assert later == pytest.approx([ttl / 3] * len(later))


@pytest.mark.parametrize("ttl", range(4, 61))
def test_a_second_keepalive_has_its_time_at_a_slow_etcd_as_if_there_were_no_proxies(ttl: int) -> None:
    """One keepalive of each slowness is not answered; the next is sent when patience is over."""
    patience = patience_of(ttl)
    for slow in (patience * step / 200 for step in range(200)):
        if ttl / 3 + patience + slow <= ttl:
            assert max(pauses(ttl, slow)[1:]) + patience + slow <= ttl + 1e-6, slow


@pytest.mark.parametrize(
    ("ttl", "late"), [*((ttl, 0.0) for ttl in range(1, 30)), *((ttl, 0.25) for ttl in range(4, 30))]
)
def test_keepalives_do_not_miss_the_answer_of_a_proxy_with_a_rhythm_of_its_own(ttl: int, late: float) -> None:
    """Also if one answer is late, to a keepalive that counts from an answer: that looks like a slow etcd's."""
    interval, patience = ttl / 3, patience_of(ttl)
    for rhythm in (math.ceil(interval * 2) / 2 * 1.003, (math.floor(interval * 2) + 1) / 2 * 1.003):
        then, delay = NextKeepalive(rhythm - 0.1), late
        for _ in range(1000):
            answered_at = math.ceil(then.at / rhythm) * rhythm
            if then.from_answer:
                answered_at, delay = answered_at + delay, 0.0
            assert answered_at - then.at < patience
            then = next_keepalive(then.at, answered_at, interval, patience, from_answer=then.from_answer)


# -- a watch


def answer(revision: int, *mods: int, fragment: bool = False, watch_id: int = 0) -> pb.WatchResponse:
    events = [pb.Event(kv=pb.KeyValue(key=b"k", mod_revision=mod)) for mod in mods]
    header = pb.ResponseHeader(revision=revision)
    return pb.WatchResponse(header=header, events=events, fragment=fragment, watch_id=watch_id)


def test_a_watch_from_now_resumes_after_the_revision_at_which_it_was_made() -> None:
    progress = Progress(0)
    assert progress.feed(pb.WatchResponse(created=True, header=pb.ResponseHeader(revision=7))) is None
    assert progress.next_revision == 8


def test_fragments_are_joined_and_half_a_revision_is_dropped_on_disconnect() -> None:
    progress = Progress(5)
    assert progress.feed(answer(5, 5, 5, fragment=True)) is None
    progress.disconnected()
    assert progress.next_revision == 5
    assert progress.feed(answer(5, 5, 5, fragment=True)) is None
    batch = progress.feed(answer(6, 5, 6))
    assert batch
    assert [event.kv.mod_revision for event in batch.events] == [5, 5, 5, 6]
    assert (batch.revision, progress.next_revision) == (6, 7)


def test_events_given_before_are_not_given_again() -> None:
    progress = Progress(5)
    progress.feed(answer(6, 5, 6))
    progress.disconnected()
    assert progress.feed(answer(6, 6)) is None
    batch = progress.feed(answer(7, 6, 7))
    assert batch
    assert [event.kv.mod_revision for event in batch.events] == [7]


def test_a_notice_moves_the_resume_point_only_if_it_cannot_have_overtaken_events() -> None:
    progress = Progress(5)
    periodic = progress.feed(answer(9))
    assert periodic
    assert (periodic.events, periodic.revision, progress.next_revision) == ((), 9, 10)
    asked = progress.feed(answer(20, watch_id=-1))
    assert asked
    assert (asked.revision, asked.header.revision, progress.next_revision) == (9, 20, 10)
    progress.trusted = True
    asked = progress.feed(answer(21, watch_id=-1))
    assert asked
    assert (asked.revision, progress.next_revision) == (21, 22)


@pytest.mark.parametrize(
    ("version", "trusted"),
    [("3.4.23", False), ("3.4.25", True), ("3.5.1", False), ("3.5.8", True), ("3.6.0-rc.1", True), ("", False)],
)
def test_versions_with_true_progress_notices(version: str, trusted: bool) -> None:
    assert trustworthy(version) is trusted


def test_a_compacted_watch_says_from_where_it_can_go_on() -> None:
    with pytest.raises(Compacted) as caught:
        Progress(1).feed(pb.WatchResponse(canceled=True, compact_revision=42))
    assert caught.value.compact_revision == 42


def test_prefixes() -> None:
    assert prefix_end("/kilo/") == b"/kilo0"
    assert prefix_end(b"a\xff") == b"b"
    assert prefix_range("") == (b"\0", b"\0")
    assert prefix_range(b"\xff") == (b"\xff", b"\0")
