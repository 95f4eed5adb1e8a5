"""What a change needs, and what is left of changes if some are known to fail. Pure."""

from __future__ import annotations

from kernel_worlds import TARGET, lines, plan, tunnel, via

from kilo_etcd.kernel.diff import diff
from kilo_etcd.kernel.needs import possible
from kilo_etcd.kernel.state import AddAddress, CreateLink, Link, Memory, Observed
from kilo_etcd.model.hostplan import Via

ENCAPSULATED = plan(
    tunnel("10.5.0.0/16"),
    via("10.4.0.0/16", "192.168.9.2", Via.IPIP, "10.4.0.1"),
    ipip=("192.168.9.2",),
    ipip_local="192.168.9.1",
)


def test_what_is_on_a_device_that_cannot_be_made_is_left_out() -> None:
    changes = diff(ENCAPSULATED, Observed(), Memory(), TARGET)
    assert possible(changes, ()) == changes
    created = next(change for change in changes if isinstance(change, CreateLink) and change.kind == "ipip")
    left = lines(possible(changes, {created}))
    assert [line for line in lines(changes) if line not in left] == [
        "ip link add kilo-ipip type ipip local 192.168.9.1",
        "ip link set kilo-ipip mtu 1480",
        "ip link set kilo-ipip up",
        "ip route add 10.4.0.0/16 via 192.168.9.2 dev kilo-ipip proto 107 src 10.4.0.1 onlink",
    ]


def test_what_sends_from_an_address_that_the_device_cannot_have_is_left_out() -> None:
    changes = diff(ENCAPSULATED, Observed(), Memory(), TARGET)
    (added,) = [change for change in changes if isinstance(change, AddAddress)]
    left = lines(possible(changes, {added}))
    needing = [line for line in lines(changes) if f" src {added.address.ip}" in line]
    assert needing
    assert [line for line in lines(changes) if line not in left] == [str(added), *needing]


def test_a_device_that_is_there_by_now_is_looked_at_again() -> None:
    created = CreateLink(TARGET.ipip, "ipip", ENCAPSULATED.ipip_local)
    there = Observed(ipip=Link(name=TARGET.ipip, index=7, kind="ipip", mtu=1400), ipip_local=ENCAPSULATED.ipip_local)
    changes = diff(ENCAPSULATED, there, Memory(), TARGET)
    assert possible(changes, {created}) == changes
    assert "ip link set kilo-ipip mtu 1480" in lines(changes)
