"""What the tests of kgctl share: an etcd in memory in place of the real one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from kilo_etcd.ctl.reports.live import gather
from kilo_etcd.etcd.api import Client, Config
from kilo_etcd.store.diagnostics import ask_why_untrusted
from kilo_etcd.testing.fake_etcd import FakeEtcd


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeEtcd:
    """An etcd in memory, empty, that every kgctl of the test finds, whatever endpoint it is given."""
    fake = FakeEtcd()

    @asynccontextmanager
    async def opened(config: Config) -> AsyncIterator[Client]:
        yield fake.client()

    monkeypatch.setattr("kilo_etcd.etcd.client.open_client", opened)
    # Agents that are not there are not waited for as long as real ones.
    monkeypatch.setitem(ask_why_untrusted.__kwdefaults__ or {}, "patience", 0.2)
    monkeypatch.setitem(gather.__kwdefaults__ or {}, "patience", 2.0)
    return fake
