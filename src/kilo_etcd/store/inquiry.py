"""Asking living agents what they see on their hosts, through etcd: no port is opened, and it works from any desk.

Who asks puts a question under a lease of a few seconds; each agent that is asked puts its answer under the same lease;
when the asker has read enough it ends the lease, and all is gone. All of it stands beside the watched prefix, so that a
question wakes no plan. Nothing is asked by itself: an agent that nobody asks writes nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress

import trio

from kilo_etcd.etcd.api import Client, Compacted, EtcdError, Event, EventType, LeaseNotFound, Unavailable
from kilo_etcd.store.keys import Keys, decode_name
from kilo_etcd.store.records import (
    AnswerRecord,
    QuestionRecord,
    RecordError,
    decode_answer,
    decode_question,
    encode,
)

LEASE_SECONDS = 15
"""How long a question stands if the asker dies."""

PATIENCE_SECONDS = 3.0
"""How long answers are waited for by default; most come within a tenth of a second."""


async def ask(
    client: Client,
    keys: Keys,
    names: Collection[str],
    *,
    patience: float = PATIENCE_SECONDS,
    tries: int = 0,
    targets: Collection[str] = (),
) -> Mapping[str, AnswerRecord]:
    """The answers of the agents of nodes `names`, by node; who has not answered after `patience` seconds is left out.

    Each is asked to send packets to `tries` nodes of its own choice and to the mesh addresses `targets`, which agents
    of older versions do not do.

    Who is asked should be known to live. EtcdError: the question could not be put.
    """
    answers: dict[str, AnswerRecord] = {}
    missing = set(names)
    if not missing:
        return answers
    lease = (await client.grant_lease(LEASE_SECONDS)).id
    try:
        question = QuestionRecord(nodes=tuple(sorted(names)), tries=tries, targets=tuple(targets))
        put = await client.put(keys.question(lease), encode(question), lease=lease)
        root = keys.answers_to(lease)
        with trio.move_on_after(patience):
            async with client.watch_prefix(root, start_revision=put.header.revision + 1) as watch:
                async for batch in watch:
                    for event in batch.events:
                        name = decode_name(event.kv.key.decode(errors="replace").removeprefix(root))
                        if event.type is not EventType.PUT or name is None:
                            continue
                        missing.discard(name)
                        try:
                            answers[name] = decode_answer(event.kv.value)
                        except RecordError:
                            continue
                    if not missing:
                        break
    finally:
        with trio.move_on_after(1, shield=True):
            with suppress(EtcdError):  # The lease ends by itself.
                await client.revoke_lease(lease)
    return answers


async def attend(
    client: Client, keys: Keys, name: str, reply: Callable[[QuestionRecord], Awaitable[AnswerRecord]]
) -> None:
    """Answer the questions to node `name` that are put from now on, one at a time, until cancelled.

    EtcdError; it is for the caller to begin again.
    """
    while True:
        try:
            async with client.watch_prefix(keys.questions_root) as watch:
                async for batch in watch:
                    for event in batch.events:
                        await _attend(client, keys, name, event, reply)
        except Compacted:
            continue


async def _attend(
    client: Client, keys: Keys, name: str, event: Event, reply: Callable[[QuestionRecord], Awaitable[AnswerRecord]]
) -> None:
    if event.type is not EventType.PUT or not event.kv.lease:
        return
    try:
        question = decode_question(event.kv.value)
    except RecordError:
        return
    if question.nodes and name not in question.nodes:
        return
    try:
        if await client.get(event.kv.key) is None:
            return  # Its lease has ended while others were answered, of which there may be very many.
        answer = encode(await reply(question))
        await client.put(keys.answer(event.kv.lease, name), answer, lease=event.kv.lease)
    except (LeaseNotFound, Unavailable):
        return  # Who asked waits no longer, or cannot be told; the next may be.
