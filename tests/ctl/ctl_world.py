"""What the tests of kgctl share: an etcd in memory in place of the real one, and time that does not pass."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
import trio.testing

from kilo_etcd.etcd.api import Client, Config
from kilo_etcd.testing.fake_etcd import FakeEtcd


@pytest.fixture
def virtual_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each kgctl of the test runs in virtual time: it waits in no time for what does not come, agents and etcd."""
    on_real_clock = trio.run

    def run(*arguments: Any, **options: Any) -> Any:
        return on_real_clock(*arguments, **{"clock": trio.testing.MockClock(autojump_threshold=0)} | options)

    monkeypatch.setattr(trio, "run", run)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch, virtual_time: None) -> FakeEtcd:
    """An etcd in memory, empty, that every kgctl of the test finds, whatever endpoint it is given."""
    fake = FakeEtcd()

    @asynccontextmanager
    async def opened(config: Config, **_: object) -> AsyncIterator[Client]:
        yield fake.client()

    monkeypatch.setattr("kilo_etcd.etcd.client.open_client", opened)
    return fake
