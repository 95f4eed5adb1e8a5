"""Asking living agents what they see on their hosts, through etcd: no port is opened, and it works from any desk.

The requester writes a request under a lease of a few seconds; each agent that it names writes its response under a
lease of its own. Under the requester's lease etcd would refuse it: except in a transaction, nobody may put a key under
a lease that holds keys which that user may not write. When the requester has read enough it ends its lease and deletes
the responses; what it does not delete ends by itself. The keys are outside the watched prefix, so that a request causes
no plan. An agent without a request writes nothing.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress

import trio

from kilo_etcd.etcd.api import Client, Compacted, Delete, EtcdError, Event, EventType, LeaseNotFound, Unavailable
from kilo_etcd.store.keys import Keys, ResponseKey
from kilo_etcd.store.records import (
    DiagnosticsRequest,
    DiagnosticsResponse,
    RecordError,
    decode_diagnostics_request,
    decode_diagnostics_response,
    encode,
)

LEASE_SECONDS = 15
"""How long a request and its responses stay if the requester dies."""

MOST_AT_ONCE = 100
"""Operations in one transaction: etcd takes 128 (--max-txn-ops)."""

PATIENCE_SECONDS = 7.0
"""How long answers are waited for by default. Most come within a tenth of a second, or within four if echo requests are
sent, and six and a half if large ones get lost."""

TRUST_SECONDS, MORE_SECONDS = 1.5, 0.3
"""How long agents have to say that they do not follow an etcd, and after the first answer: nobody knows how many they
are."""


async def request_diagnostics(
    client: Client,
    keys: Keys,
    names: Collection[str],
    *,
    patience: float = PATIENCE_SECONDS,
    tries: int = 0,
    targets: Collection[str] = (),
) -> Mapping[str, DiagnosticsResponse]:
    """The answers of the agents of nodes `names`, by node; who has not answered after `patience` seconds is left out.

    Each is asked to send packets to `tries` nodes of its own choice and to the mesh addresses `targets`, which agents
    of older versions do not do.

    The agents should be known to live. EtcdError: the request could not be written.
    """
    if not names:
        return {}
    request = DiagnosticsRequest(nodes=tuple(sorted(names)), tries=tries, targets=tuple(targets))
    return await _responses(client, keys, request, patience=patience, enough=set(names).issubset)


async def ask_why_untrusted(client: Client, keys: Keys, *, patience: float = TRUST_SECONDS) -> Mapping[str, str]:
    """The nodes whose agents do not follow this etcd, as far as they answer, and each one's reason, a sentence.
    EtcdError: the request could not be written."""
    request = DiagnosticsRequest(trust_only=True)
    responses = await _responses(client, keys, request, patience=patience, more=MORE_SECONDS)
    return {name: response.untrusted for name, response in responses.items() if response.untrusted}


async def _responses(
    client: Client,
    keys: Keys,
    request: DiagnosticsRequest,
    *,
    patience: float,
    more: float = float("inf"),
    enough: Callable[[Collection[str]], bool] = lambda _names: False,
) -> Mapping[str, DiagnosticsResponse]:
    """The answers to `request`, by node, once `enough` says so of the nodes that have answered, `more` seconds after
    the first answer, or after `patience` seconds."""
    responses: dict[str, DiagnosticsResponse] = {}
    answered: set[str] = set()
    lease = (await client.grant_lease(LEASE_SECONDS)).id
    try:
        put = await client.put(keys.request(lease), encode(request), lease=lease)
        with trio.move_on_after(patience) as waiting:
            async with client.watch_prefix(keys.status_by_root, start_revision=put.header.revision + 1) as watch:
                async for batch in watch:
                    for event in batch.events:
                        parsed = keys.parse(event.kv.key)
                        if event.type is not EventType.PUT or not isinstance(parsed, ResponseKey):
                            continue
                        if parsed.lease != lease:
                            continue
                        if not answered:
                            waiting.deadline = min(waiting.deadline, trio.current_time() + more)
                        answered.add(parsed.node)
                        try:
                            responses[parsed.node] = decode_diagnostics_response(event.kv.value)
                        except RecordError:
                            continue
                    if enough(answered):
                        break
    finally:
        with trio.move_on_after(1, shield=True):
            # The leases end by themselves, if need be.
            with suppress(EtcdError):
                await client.revoke_lease(lease)
            with suppress(EtcdError):
                for first in range(0, len(responses), MOST_AT_ONCE):
                    to_delete = [*responses][first : first + MOST_AT_ONCE]
                    await client.txn([], [Delete(keys.response(lease, name)) for name in to_delete])
    return responses


async def serve(
    client: Client,
    keys: Keys,
    name: str,
    respond: Callable[[DiagnosticsRequest], Awaitable[DiagnosticsResponse | None]],
) -> None:
    """Respond to requests to node `name` that are written from now on, one at a time, until cancelled. With None
    nothing is written.

    EtcdError; it is for the caller to begin again.
    """
    while True:
        try:
            async with client.watch_prefix(keys.requests_root) as watch:
                async for batch in watch:
                    for event in batch.events:
                        await _serve(client, keys, name, event, respond)
        except Compacted:
            continue


async def _serve(
    client: Client,
    keys: Keys,
    name: str,
    event: Event,
    respond: Callable[[DiagnosticsRequest], Awaitable[DiagnosticsResponse | None]],
) -> None:
    if event.type is not EventType.PUT or not event.kv.lease:
        return
    try:
        request = decode_diagnostics_request(event.kv.value)
    except RecordError:
        return
    if request.nodes and name not in request.nodes:
        return
    try:
        if await client.get(event.kv.key) is None:
            return  # Its lease has ended while others were answered, of which there may be very many.
        response = await respond(request)
        if response is None:
            return
        own = (await client.grant_lease(LEASE_SECONDS)).id
        await client.put(keys.response(event.kv.lease, name), encode(response), lease=own)
    except (LeaseNotFound, Unavailable):
        return  # The requester waits no longer, or cannot be reached; the next may be.
