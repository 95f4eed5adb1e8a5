"""Etcd's endpoints as the plan of this host needs them: what reaches them never goes through the mesh."""

from __future__ import annotations

from collections.abc import Callable

from kilo_etcd.agent.config import AgentConfig
from kilo_etcd.etcd import api as etcd
from kilo_etcd.model import IPNetwork
from kilo_etcd.runtime.resolve import Resolver, known_endpoints


class EtcdEndpoints:
    """Those of `client`, whose names `resolver` looks up."""

    def __init__(self, config: AgentConfig, client: etcd.Client, resolver: Resolver) -> None:
        self._config, self._client, self._resolver = config, client, resolver
        self._served_by: str | None = None
        """The endpoint of the connection to etcd, or of the last one."""

    def known(self) -> tuple[str, ...]:
        """Those that are known, and the one of the connection in use or of the last one, which may not be among them
        any more."""
        self._served_by = self._client.endpoint or self._served_by
        served_by = (self._served_by,) if self._served_by else ()
        return tuple(dict.fromkeys((*known_endpoints(self._config.etcd.endpoints, self._client), *served_by)))

    def networks(self) -> tuple[IPNetwork, ...]:
        """Their addresses, as far as they are known."""
        return self._resolver.networks(self.known())

    def needed(self) -> tuple[str, ...]:
        """Those that must be known before anything is routed."""
        # Before the first connection it is not known which of them serves.
        return (self._served_by,) if self._served_by else self._config.etcd.endpoints or self._client.endpoints

    async def follow(self, nudge: Callable[[], None]) -> None:
        """Call `nudge` when there are others, until cancelled: what is discovered, or by the member list, bypasses the
        exit node too."""
        seen = self._client.endpoints
        while True:
            seen = await self._client.wait_endpoints(seen)
            nudge()
