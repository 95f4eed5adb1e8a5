"""The index of who has which address, against a dict of sets."""

from __future__ import annotations

from ipaddress import ip_address, ip_network

from hypothesis import given
from hypothesis import strategies as st

from kilo_etcd.model import IPAddress
from kilo_etcd.topology.holders import Holders

ADDRESSES = [
    *map(ip_address, ("0.0.0.0", "10.0.0.0", "10.0.0.255", "10.0.1.0", "10.0.1.7", "10.0.3.1", "255.255.255.255")),
    *map(ip_address, ("::", "fd00::1", "fd00::ffff:ffff:ffff:ffff", "fd00:0:0:1::", "fd00:0:0:3::1")),
]
NETWORKS = [
    *map(ip_network, ("0.0.0.0/0", "10.0.0.0/22", "10.0.0.0/23", "10.0.1.0/29", "10.0.0.255/32", "10.0.2.0/24")),
    *map(ip_network, ("::/0", "fd00::/62", "fd00::/64", "fd00::/65", "fd00:0:0:1::/128", "fd00:0:0:2::/64")),
]
held = st.tuples(st.sampled_from(["a", "b", "c"]), st.sampled_from(ADDRESSES))
steps = st.lists(st.tuples(st.lists(held, max_size=3), st.lists(held, max_size=4)), max_size=12)


@given(steps)
def test_the_index_follows_changes(
    sequence: list[tuple[list[tuple[str, IPAddress]], list[tuple[str, IPAddress]]]],
) -> None:
    expected: dict[IPAddress, set[str]] = {}
    index = Holders()
    for gone, come in sequence:
        before = {address: set(names) for address, names in expected.items()}
        for name, address in gone:
            expected.get(address, set()).discard(name)
        for name, address in come:
            expected.setdefault(address, set()).add(name)
        expected = {address: names for address, names in expected.items() if names}
        former, (index, moved) = index, index.after(gone, come)
        differing = {a for a in {*before, *expected} if before.get(a) != expected.get(a)}
        assert moved == differing
        assert dict(index.items()) == {address: tuple(sorted(names)) for address, names in expected.items()}
        assert dict(former.items()) == {address: tuple(sorted(names)) for address, names in before.items()}
        for address in ADDRESSES:
            assert set(index.of(address)) == expected.get(address, set())
        for network in NETWORKS:
            inside = [address for address in expected if address.version == network.version and address in network]
            assert sorted(index.within([network]), key=int) == sorted(inside, key=int)
