"""The table of annotations: what each sets of a node, and what `kgctl` says of it."""

from __future__ import annotations

from ipaddress import ip_address, ip_interface, ip_network

import pytest
from attrs import evolve, fields, fields_dict
from store_world import wg_key

from kilo_etcd.model import Encapsulate, EncryptionStage, Endpoint, Node
from kilo_etcd.model.node import StatedNode
from kilo_etcd.store.annotations import ANNOTATIONS, Registered, join
from kilo_etcd.store.records import NodeRecord

RECORD = NodeRecord(
    public_key=wg_key("a"),
    endpoint=Endpoint.parse("203.0.113.1:51820"),
    more_endpoints=(Endpoint.parse("[2001:db8::1]:51820"),),
    internal_ips=(ip_interface("10.1.0.1/24"),),
    underlay=(ip_network("10.9.0.0/24"),),
    encryption=EncryptionStage.SENDS,
    accepts_since=7,
    subnets=(ip_network("172.20.0.0/16"),),
    location="home",
    port=4711,
    persistent_keepalive=25,
    handshake_epoch=2,
    clock_epoch=3,
    encapsulate=Encapsulate.ALWAYS,
    version="1.2",
    mesh_addresses=(ip_interface("10.4.0.9/16"),),
)


def joined(annotations: dict[str, str], label: str | None = None) -> Node:
    registered = Registered(RECORD, 3)
    values, wrong = registered.annotated(annotations)
    assert not wrong
    return join("a", registered, values, label=label, addresses=(ip_address("10.4.0.1"),))


PLAIN = joined({})


def test_a_node_has_all_that_it_states_itself() -> None:
    for each in fields(StatedNode):
        assert getattr(RECORD, each.name) != each.default, f"{each.name}: this test is to show more than the default"
        assert getattr(PLAIN, each.name) == getattr(RECORD, each.name), each.name
    assert (PLAIN.name, PLAIN.mesh_addresses, PLAIN.accepts_since) == ("a", (ip_address("10.4.0.1"),), 7)
    assert (PLAIN.default_location, PLAIN.registered_revision) == ("home", 3)
    moved = joined({}, label="gcp")
    assert (moved.location, moved.default_location) == ("gcp", "home")


TRIED = [
    ("force-endpoint", "198.51.100.1:1", "is reached at 198.51.100.1:1 instead of 203.0.113.1:51820"),
    ("force-internal-ip", "", "has internal IP none instead of 10.1.0.1/24"),
    ("force-internal-ip", "-", "has internal IP none instead of 10.1.0.1/24"),
    ("force-internal-ip", "10.1.0.2", "has internal IP 10.1.0.2/24 instead of 10.1.0.1/24"),
    ("persistent-keepalive", "5", "sends keepalives every 5 s instead of 25 s (0: none)"),
    ("leader", "yes", "is now preferred as its location's leader"),
    ("advertise-exit-node", "true", "advertises itself as an exit node"),
    ("exit-node", "exit-1", "leaves for the internet by exit-1, through the tunnel"),
    ("subnets", "172.21.0.0/16", "leads to networks behind it: 172.21.0.0/16 instead of 172.20.0.0/16"),
    ("allowed-location-ips", "10.7.0.0/24", "leads to networks of its location: 10.7.0.0/24 instead of none"),
]


@pytest.mark.parametrize(("name", "text", "becomes"), TRIED)
def test_an_annotation_sets_its_field_alone_and_its_row_says_what_changes(name: str, text: str, becomes: str) -> None:
    node, field = joined({name: text}), ANNOTATIONS[name].field
    assert evolve(node, **{field: getattr(PLAIN, field)}) == PLAIN
    assert {row: list(annotation.impact(PLAIN, node)) for row, annotation in ANNOTATIONS.items()} == {
        row: [becomes] if row == name else [] for row in ANNOTATIONS
    }


def test_each_row_is_of_a_field_of_the_node_and_is_tried_here() -> None:
    assert [row for row, annotation in ANNOTATIONS.items() if annotation.field not in fields_dict(Node)] == []
    assert {name for name, _, _ in TRIED} == ANNOTATIONS.keys()
