"""Run at the lab's operator: puts records of hosts that do not exist into etcd, ten to a location.

    python bench/_fill.py COUNT PRIVATE_NETWORK

The first nine are in `location-0`, with addresses in PRIVATE_NETWORK (the real host's, whose label that is), and do
not stand for leader, so that the real host leads them. Each claims the mesh address that an agent would.
"""

from __future__ import annotations

import os
import random
import sys
from base64 import b64encode
from ipaddress import ip_address, ip_interface, ip_network

import trio

from kilo_etcd.etcd import api as etcd
from kilo_etcd.etcd.client import open_client
from kilo_etcd.model import CandidateClass, Endpoint, IPAddress
from kilo_etcd.store.claims import candidates
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import CandidateRecord, NodeRecord, encode

PER_LOCATION = 10
KEYS = Keys()
MESH = ip_network("10.4.0.0/16")


LEASE_SECONDS = 24 * 3600
"""Longer than any benchmark takes: what stands under no lease is rejected."""


def records(count: int, private: str, lease: int) -> list[list[etcd.Put]]:
    """The puts of each host, those of candidacies under `lease`."""
    rng = random.Random(7)
    own = ip_interface(private).network
    hosts = []
    taken: set[IPAddress] = set()
    for number in range(1, count + 1):
        place, index = divmod(number, PER_LOCATION)
        name, location = f"node-{number}", f"location-{place}"
        here = f"{own[100 + index]}/{own.prefixlen}"
        internal = f"172.24.{place}.{index + 1}/24" if place else here
        record = NodeRecord(
            public_key=b64encode(rng.randbytes(32)).decode(),
            endpoint=Endpoint(ip_address(f"192.90.{place}.{index + 1}"), 51820),
            internal_ips=(ip_interface(internal),),
            version="0",
        )
        address = next(candidates(name, MESH, lambda address: address not in taken))
        taken.add(address)
        puts = [
            etcd.Put(KEYS.address(name, address), ""),
            etcd.Put(KEYS.location(name), location),
            etcd.Put(KEYS.node(name), encode(record)),
        ]
        if place:
            rank = CandidateClass.PUBLIC
            puts.append(etcd.Put(KEYS.election(location, name), encode(CandidateRecord(rank=rank)), lease))
        hosts.append(puts)
    return hosts


async def main() -> None:
    config = etcd.Config(endpoints=tuple(os.environ["ETCDCTL_ENDPOINTS"].split(",")))
    async with open_client(config) as client:
        hosts = records(int(sys.argv[1]), sys.argv[2], (await client.grant_lease(LEASE_SECONDS)).id)
        for start in range(0, len(hosts), 25):
            await client.txn([], [put for puts in hosts[start : start + 25] for put in puts])


if __name__ == "__main__":
    trio.run(main)
