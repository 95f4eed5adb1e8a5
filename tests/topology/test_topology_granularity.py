"""The policy of each granularity, by what it answers."""

from __future__ import annotations

from typing import Any

import pytest
from attrs import asdict, evolve

from kilo_etcd.model import Granularity
from kilo_etcd.topology.granularity import POLICIES
from topology_worlds import node

A1 = node("a1", 1, "a", "10.1.0.1/24")
A2 = node("a2", 2, "a", "10.1.0.2/24")
OTHER_FAMILY = node("a3", 3, "a", "fd00::3/64")
ELSEWHERE = node("b1", 4, "b", "10.2.0.1/24")


def test_each_granularity_has_a_policy_of_its_own() -> None:
    assert POLICIES.keys() == set(Granularity)
    assert len({tuple(asdict(policy).values()) for policy in POLICIES.values()}) == len(Granularity)


@pytest.mark.parametrize(
    ("granularity", "tunnel_in_location", "over_its_network", "apart"),
    [
        (Granularity.LOCATION, True, True, (False, False)),
        (Granularity.FULL, True, False, (False, True)),
        (Granularity.CROSS, False, True, (False, False)),
    ],
)
def test_what_a_policy_says_of_one_location(
    granularity: Granularity, tunnel_in_location: bool, over_its_network: bool, apart: Any
) -> None:
    policy = POLICIES[granularity]
    assert policy.tunnel_between(A1, A2) is tunnel_in_location
    assert policy.tunnel_between(A1, OTHER_FAMILY), "they share no network"
    assert policy.tunnel_between(A1, ELSEWHERE)
    assert policy.location_network_in_use is over_its_network
    assert (policy.share_no_site("a", "a"), policy.share_no_site("", "")) == apart
    assert policy.share_no_site("a", "b")
    assert policy.share_no_site(None, None)
    assert policy.share_no_site("", None)
    assert policy.tunnel_between(evolve(A1, internal_ips=()), A2)
