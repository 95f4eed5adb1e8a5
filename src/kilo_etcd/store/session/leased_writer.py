"""Brings etcd to hold what is wanted under the short lease, in as few writes as it takes.

What is known to stand there is in `store.session.leased_keys`. A write is conditional on the host's registration
(`store.session.registration`) while that is known to stand. All of it happens under the session's lock.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

import structlog

from kilo_etcd.etcd.api import Delete, Op, PermissionDenied, Put
from kilo_etcd.store.session.leased_keys import LeasedKeys
from kilo_etcd.store.session.registration import Registration


class LeasedWriter:
    """`lease` gives the ID of the lease under which keys are put. `replaceable` says whether a key may be overwritten;
    others are deleted before they are put again. `apart` says which keys are written apart from the others; `beside`
    gives what else goes into a write of some keys."""

    def __init__(
        self,
        name: str,
        leased: LeasedKeys,
        registration: Registration,
        *,
        lease: Callable[[], int],
        replaceable: Callable[[str], bool],
        apart: Callable[[str], bool],
        beside: Callable[[Collection[str]], list[Op]],
    ) -> None:
        self._leased = leased
        self._registration = registration
        self._lease = lease
        self._replaceable = replaceable
        self._apart = apart
        self._beside = beside
        self._log = structlog.get_logger().bind(node=name)

    async def bring(self, desired: Mapping[str, bytes], apart: Mapping[str, bytes]) -> None:
        """Make etcd hold `desired` and, last, `apart`, and delete what else stands in the host's name. EtcdError,
        RecordChanged."""
        own = self._leased.values.keys() - (self._leased.foreign - desired.keys() - apart.keys())
        await self._bring(desired, {key for key in own if not self._apart(key)})
        # In writes of their own, and last: where etcd does not let this host say something of others, it stands for
        # leader and reports all the same.
        await self._bring(apart, {key for key in own if self._apart(key)})
        await self._delete_foreign()

    async def _delete_foreign(self) -> None:
        """Delete what others have written in this host's name, as it was found: what was written since is found again
        if it is not this host's own. What etcd denies here hinders nothing of this host's own, and no other kind of
        key."""
        denied: PermissionDenied | None = None
        for apart in (False, True):
            foreign = self._leased.foreign_revisions
            revisions = {key: foreign[key] for key in foreign if self._apart(key) is apart}
            try:
                if revisions:
                    await self._registration.delete_unchanged(revisions)
            except PermissionDenied as error:
                denied = error
                continue
            for key in revisions:
                self._leased.remove(key, revisions[key])
        if denied is not None:
            raise denied

    async def _bring(self, desired: Mapping[str, bytes], held: Collection[str]) -> None:
        """Make etcd hold `desired`, and nothing else of `held`, but for what is to be restored later."""
        # What has to queue anew must go before it comes again.
        removals = [
            key
            for key in held
            if desired.get(key) != self._leased.values[key] and not (key in desired and self._replaceable(key))
        ]
        if removals:
            for key in removals:
                self._leased.may_remove(key)
            revision = await self._registration.write([*map(Delete, removals), *self._beside(removals)])
            for key in removals:
                self._leased.remove(key, revision)
        new = {
            key: value
            for key, value in desired.items()
            if not (self._leased.confirmed(key, value) or self._leased.waits(key, value))
        }
        if new:
            changed = set(self._leased.changed)
            fresh = [key for key in new if key not in self._leased.values]
            for key, value in new.items():
                # Should the answer be lost, it may stand there: then it is for us to put again, or to take away.
                self._leased.may_put(key, value, self._registration.seen)
            try:
                puts = [Put(key, value, lease=self._lease()) for key, value in new.items()]
                revision = await self._registration.write([*puts, *self._beside([*new])])
            except PermissionDenied:
                for key in fresh:
                    self._leased.remove(key)
                raise
            for key, value in new.items():
                self._leased.put(key, value, revision)
            for key in new:
                # Once for a row of changes: if it goes on, `contested` tells.
                if key in changed and self._leased.changes(key) == 1:
                    self._log.warning("key restored after another writer changed it", key=key, revision=revision)
