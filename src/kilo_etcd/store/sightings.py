"""Where this host sees others, as it says at `/kilo/endpoints/<node or peer>/<this host>`.

Values only; `store.session` writes them.
"""

from __future__ import annotations

from collections.abc import Mapping

from kilo_etcd.store.keys import EndpointKey, Keys
from kilo_etcd.store.records import RecordError, SightingRecord, decode_sighting, encode


class Sightings:
    """All that `observer` has to say; `values` is the same as keys and bytes, encoded once however often asked for."""

    def __init__(self, keys: Keys, observer: str) -> None:
        self._keys = keys
        self._observer = observer
        self.records: Mapping[str, SightingRecord] = {}
        self.values: Mapping[str, bytes] = {}

    def concern(self, key: str) -> bool:
        """Whether a key is one of those where such things are said."""
        return key.startswith(self._keys.endpoints_root)

    def replace(self, records: Mapping[str, SightingRecord]) -> None:
        """Say this, and nothing else."""
        self.records = dict(records)
        self.values = {self._keys.endpoint(name, self._observer): encode(record) for name, record in records.items()}

    def adopt(self, key: EndpointKey, value: bytes) -> None:
        """Go on saying what an earlier run said, if it can be read."""
        try:
            self.replace({key.name: decode_sighting(value), **self.records})
        except RecordError:
            return
