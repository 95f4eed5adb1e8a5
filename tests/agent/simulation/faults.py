"""What goes wrong in a schedule, and what the operator does meanwhile: one function for each kind.

A kind belongs to a family; a schedule draws the families that it has, so that each kind of trouble comes alone as well
as with any other. Where a fault has an end of its own it sees to that (`world.later`); what is left is mended when the
schedule heals.
"""

from __future__ import annotations

import json
from base64 import b64encode
from collections.abc import Callable
from functools import partial
from hashlib import sha256
from typing import TYPE_CHECKING

from attrs import evolve, frozen

from kilo_etcd.etcd.api import ConnectionRefusedByTls
from kilo_etcd.kernel.state import (
    AddRoute,
    Change,
    DeleteAddress,
    DeleteLink,
    DeleteRoute,
    RemovePeer,
    Route,
    SetPeer,
)
from kilo_etcd.model import IPNetwork
from kilo_etcd.store.keys import Keys

if TYPE_CHECKING:
    from simulation.host import SimulatedHost
    from simulation.world import World

KEYS = Keys()

BRIEF = (0.05, 0.5, 2.0, 4.8, 5.0, 5.2, 8.0, 20.0)
"""Seconds that troubles last: to both sides of a lease's TTL of 5 s, and of three keepalives of it."""

WITHIN_THE_LEASE = (0.05, 0.5, 2.0)
"""In steady schedules."""

Act = Callable[["World", "SimulatedHost"], str]


@frozen
class Fault:
    """A kind of it. `act` does it, mostly to one host, and returns what to say of it besides; `weight`: how often."""

    family: str
    name: str
    weight: int
    act: Act


FAULTS: list[Fault] = []


def _fault(family: str, weight: int = 1) -> Callable[[Act], Act]:
    def register(act: Act) -> Act:
        FAULTS.append(Fault(family, act.__name__.replace("_", " ").strip(), weight, act))
        return act

    return register


# -- agents ---------------------------------------------------------------------------------------------------------


@_fault("agents", 3)
def crash(world: World, host: SimulatedHost) -> str:
    """systemd starts it again."""
    seconds = world.random.choice((0.1, 1.0, 6.0))
    host.kill()
    world.later(seconds, lambda: world.start(host))
    return f"for {seconds} s"


@_fault("agents")
def kill(world: World, host: SimulatedHost) -> str:
    host.kill()
    return ""


@_fault("agents", 2)
def stop(world: World, host: SimulatedHost) -> str:
    host.stop()
    return ""


@_fault("agents", 2)
def start(world: World, host: SimulatedHost) -> str:
    world.start(host)
    return ""


@_fault("agents")
def reload(world: World, host: SimulatedHost) -> str:
    host.reload()
    return ""


@_fault("agents", 2)
def freeze(world: World, host: SimulatedHost) -> str:
    seconds = world.brief()
    host.freezer.freeze()
    world.later(seconds, host.freezer.thaw)
    return f"for {seconds} s"


@_fault("agents")
def all_restarted(world: World, host: SimulatedHost) -> str:
    for member in world.members():
        member.kill()
        world.later(0.1, partial(world.start, member))
    return ""


@_fault("restarts", 5)
def restart(world: World, host: SimulatedHost) -> str:
    """`systemctl restart`: what is under its short lease goes at once."""
    seconds = world.random.choice((0.1, 1.0, 3.0))
    host.stop()
    world.later(seconds, lambda: world.start(host))
    return f"for {seconds} s"


# -- machines -------------------------------------------------------------------------------------------------------


@_fault("machines", 2)
def power_cut(world: World, host: SimulatedHost) -> str:
    seconds = world.brief()
    host.power_off()
    world.later(seconds, lambda: world.start(host))
    return f"for {seconds} s"


@_fault("machines")
def power_off(world: World, host: SimulatedHost) -> str:
    host.power_off()
    return ""


@_fault("machines")
def site_off(world: World, host: SimulatedHost) -> str:
    seconds = world.brief()
    for one in world.site_of(host):
        one.power_off()
        world.later(seconds, partial(world.start, one))
    return f"for {seconds} s"


@_fault("machines")
def clock_jumps(world: World, host: SimulatedHost) -> str:
    seconds = world.random.choice((-86400.0, -3600.0, -10.0, 10.0, 3600.0, 86400.0))
    host.wall += seconds
    return f"by {seconds} s"


# -- the way to etcd ------------------------------------------------------------------------------------------------


@_fault("path", 3)
def cut_off(world: World, host: SimulatedHost) -> str:
    seconds = world.brief()
    host.client.cut()
    world.later(seconds, host.client.mend)
    return f"for {seconds} s"


@_fault("path")
def site_cut_off(world: World, host: SimulatedHost) -> str:
    seconds = world.brief()
    for one in world.site_of(host):
        one.client.cut()
        world.later(seconds, one.client.mend)
    return f"for {seconds} s"


@_fault("path")
def deaf(world: World, host: SimulatedHost) -> str:
    """Its requests are carried out, and it does not learn of that."""
    seconds = world.brief()
    host.client.cut(requests=False)
    world.later(seconds, host.client.mend)
    return f"for {seconds} s"


@_fault("path")
def dumb(world: World, host: SimulatedHost) -> str:
    """It receives all changes, and can make none."""
    seconds = world.brief()
    host.client.cut(answers=False)
    world.later(seconds, host.client.mend)
    return f"for {seconds} s"


@_fault("path")
def refused(world: World, host: SimulatedHost) -> str:
    """etcd answers it with an error: all that it asks, or what it writes alone."""
    seconds, reads = world.brief(), world.random.random() < 0.5
    host.client.refuse(ConnectionRefusedByTls("it refuses the client certificate"), reads=reads)
    world.later(seconds, host.client.mend)
    return f"{'all' if reads else 'writes'} for {seconds} s"


@_fault("path", 2)
def answer_lost(world: World, host: SimulatedHost) -> str:
    host.client.lose_answer(world.random.choice((1, 1, 2, 5)))
    return ""


@_fault("path", 2)
def slow(world: World, host: SimulatedHost) -> str:
    mean, seconds = world.random.choice((0.001, 0.02, 0.2, 1.0)), world.brief()
    host.client.lag = lambda: world.random.expovariate(1 / mean)

    def mend() -> None:
        host.client.lag = None

    world.later(seconds, mend)
    return f"by {mean} s for {seconds} s"


@_fault("path")
def watches_late(world: World, host: SimulatedHost) -> str:
    seconds = world.brief()
    host.client.stall(seconds)
    return f"for {seconds} s"


@_fault("path")
def events_twice(world: World, host: SimulatedHost) -> str:
    host.client.repeat_batches(world.random.choice((1, 3)))
    return ""


@_fault("lossy")
def events_lost(world: World, host: SimulatedHost) -> str:
    """What etcd promises not to do; agents list again now and then all the same."""
    world.watchman.lossy = True
    host.client.lose_batches()
    return ""


# -- etcd -----------------------------------------------------------------------------------------------------------


@_fault("etcd", 2)
def etcd_down(world: World, host: SimulatedHost) -> str:
    seconds = world.brief()
    if world.etcd.available:
        world.etcd.down()
        world.later(seconds, world.etcd_up)
    return f"for {seconds} s"


@_fault("etcd")
def watches_dropped(world: World, host: SimulatedHost) -> str:
    world.etcd.drop_watches()
    return ""


@_fault("etcd")
def compacted(world: World, host: SimulatedHost) -> str:
    world.etcd.compact()
    return ""


@_fault("etcd")
def etcd_slow(world: World, host: SimulatedHost) -> str:
    seconds = world.brief()
    usual, world.etcd.delay = world.usual_delay, 0.2

    def mend() -> None:
        world.etcd.delay = usual

    world.later(seconds, mend)
    return f"for {seconds} s"


@_fault("clusters")
def backed_up(world: World, host: SimulatedHost) -> str:
    if world.genuine:
        world.saved = world.etcd.backup()
    return ""


@_fault("clusters")
def replaced(world: World, host: SimulatedHost) -> str:
    """Another etcd is put in its place: an empty one, or what was backed up. It is put right later, or adopted."""
    if not world.genuine or not world.etcd.available:
        return "not now"
    world.genuine = False
    world.watchman.disturbed = True
    before = world.etcd.backup()
    world.clusters += 1
    restored = world.saved is not None and world.random.random() < 0.6
    if restored:
        assert world.saved is not None
        world.etcd.restore(world.saved, cluster_id=0xC1 + world.clusters)
    else:
        world.etcd.replace_cluster(0xC1 + world.clusters)
    seconds = world.random.choice((0.5, 8.0, 20.0))
    if world.random.random() < 0.5:
        world.put_right = lambda: world.etcd.restore(before)
    else:
        world.put_right = world.adopt
    world.later(seconds, world.settle_cluster)
    return f"by {'a backup' if restored else 'an empty one'} for {seconds} s"


# -- the operator ---------------------------------------------------------------------------------------------------


@_fault("labels", 3)
def label(world: World, host: SimulatedHost) -> str:
    value = world.random.choice("abcd")
    world.put(KEYS.location(host.name), value)
    return value


@_fault("labels")
def unlabel(world: World, host: SimulatedHost) -> str:
    world.delete(KEYS.location(host.name))
    return ""


@_fault("labels")
def granularity(world: World, host: SimulatedHost) -> str:
    value = world.random.choice(("location", "location", "full", "cross"))
    world.put(KEYS.granularity, value)
    return value


@_fault("switch", 2)
def internal_ips(world: World, host: SimulatedHost) -> str:
    value = world.random.choice(world.shape.modes)
    world.put(KEYS.internal_ips, value)
    return value


@_fault("internal", 2)
def moves(world: World, host: SimulatedHost) -> str:
    """It gets another internal IP, or its own again."""
    base = world.random.choice((0, 50, 60))
    number = base and base + int(host.name.partition("-")[2])
    host.move(number)
    return str(number)


@_fault("internal")
def other_links(world: World, host: SimulatedHost) -> str:
    """It stands in more networks, or fewer: perhaps one with the numbers of another site."""
    host.links = world.random.choice(((), ("192.168.97.0/24",), ("192.168.98.0/30", "172.18.0.0/16")))
    return ",".join(host.links)


@_fault("labels")
def leader_wanted(world: World, host: SimulatedHost) -> str:
    world.put(KEYS.annotation(host.name, "leader"), "true")
    return ""


@_fault("labels")
def leader_not_wanted(world: World, host: SimulatedHost) -> str:
    world.delete(KEYS.annotation(host.name, "leader"))
    return ""


@_fault("labels")
def nonsense(world: World, host: SimulatedHost) -> str:
    world.put(KEYS.location(host.name), "\x00")
    return ""


@_fault("annotations", 4)
def annotation(world: World, host: SimulatedHost) -> str:
    inside, outside = host.home.inside[0].ip, host.place.outside[0].ip
    name, values = world.random.choice(
        [
            ("force-endpoint", (f"{inside}:51820", f"{outside}:51820", "nowhere at all")),
            ("force-internal-ip", ("-", f"{inside}/24", f"{inside}/32", "1.2.3")),
            ("persistent-keepalive", ("25", "0", "often")),
            ("allowed-location-ips", ("192.168.50.0/24", "192.168.50.50/32", "172.20.0.0/16,172.21.0.1", "0.0.0.0/0")),
            ("subnets", ("172.20.1.0/24", "172.20.0.0/16", "172.20.1.128/25,172.22.0.0/24", "10.4.0.0/16", "?")),
            ("advertise-exit-node", ("true", "false", "perhaps")),
        ]
    )
    value = world.random.choice(values)
    world.put(KEYS.annotation(host.name, name), value)
    return f"{name}={value}"


@_fault("annotations", 2)
def annotation_removed(world: World, host: SimulatedHost) -> str:
    root = KEYS.annotation(host.name, "leader").rpartition("/")[0]
    found = [key for key in world.etcd.keys(root + "/") if not key.endswith("/leader")]
    if not found:
        return "none"
    key = world.random.choice(found)
    world.delete(key)
    return key


@_fault("annotations")
def peer_added(world: World, host: SimulatedHost) -> str:
    name = world.random.choice(("laptop", "phone", "router"))
    networks = world.random.choice((["10.9.0.2/32"], ["10.9.0.0/24", "172.20.0.0/16"], ["10.4.0.0/16"], ["fd99::/64"]))
    record = {"publicKey": b64encode(sha256(name.encode()).digest()).decode(), "allowedIPs": networks}
    if world.random.random() < 0.3:
        record["publicKey"] = host.public_key
    world.put(KEYS.peer(name), json.dumps(record))
    return f"{name} {networks}"


@_fault("annotations")
def peer_removed(world: World, host: SimulatedHost) -> str:
    name = world.random.choice(("laptop", "phone", "router"))
    world.delete(KEYS.peer(name))
    return name


@_fault("keys")
def record_deleted(world: World, host: SimulatedHost) -> str:
    world.delete(KEYS.node(host.name))
    return ""


@_fault("keys")
def status_deleted(world: World, host: SimulatedHost) -> str:
    world.delete(KEYS.status(host.name))
    return ""


@_fault("keys")
def candidacy_deleted(world: World, host: SimulatedHost) -> str:
    found = world.etcd.keys(KEYS.by(host.name) + "elections/")
    for key in found:
        world.delete(key)
    return str(len(found))


@_fault("keys")
def claim_deleted(world: World, host: SimulatedHost) -> str:
    world.forget_claims(host.name)
    return ""


@_fault("keys", 3)
def key_overwritten(world: World, host: SimulatedHost) -> str:
    """As by `etcdctl put`: another value or the same, under no lease or another host's; or the key is a new one."""
    rng, name = world.random, host.name
    held = [
        KEYS.node(name),
        KEYS.status(name),
        *(
            key
            for kind in ("elections", "leaders", "probe-reports", "endpoints")
            for key in world.etcd.keys(KEYS.by(name) + kind)
        ),
    ]
    made = [make(rng.choice("abcd"), name) for make in (KEYS.election, KEYS.leader, KEYS.probe_report)]
    key = rng.choice([*held, *made])
    values = ["{}", '{"rank":0}', '{"candidacy":1,"leader":"a-1","reaches":true,"targets":["b-1"],"answers":true}']
    if (before := world.etcd.get(key)) is not None:
        values += [before.decode()] * 2
    lease = rng.choice([0, 0, *sorted(world.etcd.leases())]) if key in held else 0
    world.put(key, rng.choice(values), lease=lease)
    return f"{key} under {lease:x}"


# -- coming and going -----------------------------------------------------------------------------------------------


@_fault("members", 2)
def leaves(world: World, host: SimulatedHost) -> str:
    """With --clean-up: all of it goes."""
    if host.agent is None or host.agent.state.plan is None or len(list(world.members())) <= 2:
        return "not now"
    host.agent.config = evolve(host.agent.config, clean_up=True)
    world.gone.add(host.name)
    host.stop()
    return ""


@_fault("members", 3)
def joins(world: World, host: SimulatedHost) -> str:
    """One that has never been there, or has left."""
    away = sorted(name for name in world.gone if not world.hosts[name].lives)
    if not away:
        return "nobody"
    name = world.random.choice(away)
    world.gone.discard(name)
    world.watchman.left(world.hosts[name])
    world.start(world.hosts[name])
    return name


# -- the network ----------------------------------------------------------------------------------------------------


def _network(world: World, host: SimulatedHost, **condition: bool) -> str:
    seconds = world.random.choice((0.5, 3.0, 10.0, 30.0))
    for name, value in condition.items():
        setattr(host.condition, name, value)
    world.later(seconds, host.condition.mend)
    return f"for {seconds} s"


@_fault("network", 2)
def does_not_forward(world: World, host: SimulatedHost) -> str:
    return _network(world, host, forwards=False)


@_fault("network")
def leader_that_never_forwarded(world: World, host: SimulatedHost) -> str:
    """The operator chooses a host that does not forward, so nobody has ever been reached through it."""
    world.put(KEYS.annotation(host.name, "leader"), "true")
    return _network(world, host, forwards=False)


@_fault("network")
def port_blocked(world: World, host: SimulatedHost) -> str:
    return _network(world, host, tunnels=False)


@_fault("network")
def lan_cut(world: World, host: SimulatedHost) -> str:
    return _network(world, host, lan=False)


@_fault("network")
def wan_cut(world: World, host: SimulatedHost) -> str:
    return _network(world, host, wan=False)


@_fault("network")
def wan_of_site_cut(world: World, host: SimulatedHost) -> str:
    return ", ".join(_network(world, one, wan=False) for one in world.site_of(host))


# -- the kernel -----------------------------------------------------------------------------------------------------


@_fault("kernel", 2)
def tampered(world: World, host: SimulatedHost) -> str:
    observed = host.machine.observed
    changes: list[Change] = [
        *(DeleteRoute(route) for route in observed.routes.values()),
        *(DeleteAddress("kilo0", address) for address in observed.addresses),
        *(RemovePeer("kilo0", key) for key in observed.peers),
    ]
    if observed.link is not None:
        changes.append(DeleteLink("kilo0"))
        stranger = b64encode(b"somebody else's public key 32 b.").decode()
        changes.append(SetPeer(name="kilo0", public_key=stranger, new=True, replace_allowed_ips=True))
        stray: IPNetwork = next(iter(observed.routes), None) or world.stray
        changes.append(AddRoute(Route(destination=world.stray, device="kilo0", source=None)))
        changes.append(AddRoute(Route(destination=stray, device="kilo0", source=None, metric=7)))
    if not changes:
        return "nothing is there"
    change = world.random.choice(changes)
    host.tamper([change])
    return str(change)


@_fault("kernel")
def refuses(world: World, host: SimulatedHost) -> str:
    """Some changes fail."""
    seconds, share = world.brief(), world.random.choice((0.1, 0.5, 1.0))
    host.machine.refuse = lambda _: "the kernel is not in the mood" if world.random.random() < share else None
    world.later(seconds, host.mend_kernel)
    return f"for {seconds} s"


@_fault("kernel")
def unprogrammable(world: World, host: SimulatedHost) -> str:
    """Nothing can be programmed; an agent that has never done so gives up, and is started again by systemd."""
    if host.agent is None or host.agent.state.plan is None:
        return "not now"
    seconds = world.brief()
    host.machine.broken = "netlink is out of buffers"
    world.later(seconds, host.mend_kernel)
    return f"for {seconds} s"


@_fault("kernel")
def unreadable(world: World, host: SimulatedHost) -> str:
    """Nobody knows what the kernel holds; changes that need no look are made."""
    if host.agent is None or host.agent.state.plan is None:
        return "not now"
    seconds = world.brief()
    host.machine.unreadable = "netlink is out of buffers"
    world.later(seconds, host.mend_kernel)
    return f"for {seconds} s"


def addresses_of(world: World, name: str) -> list[str]:
    """The keys of a node's address claims."""
    return world.etcd.keys(KEYS.addresses(name))
