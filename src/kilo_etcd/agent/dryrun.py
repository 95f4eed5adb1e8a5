"""`kg --dry-run`: what would the agent change on this host now? Printed as `ip` and `wg` commands, and not carried out.

Nothing is written, neither to the kernel nor to etcd nor to the disk. A host that is not registered yet is added to
the snapshot as it would register, with the first free mesh address; where no key exists yet, a temporary key
is used instead.
"""

from __future__ import annotations

from collections.abc import Callable

import click
from attrs import evolve

from kilo_etcd import kernel
from kilo_etcd.agent import discover
from kilo_etcd.agent.config import AgentConfig, too_small_for
from kilo_etcd.agent.encrypting import concerns, outside
from kilo_etcd.agent.etcd_listeners import read_members
from kilo_etcd.etcd import api as etcd
from kilo_etcd.model import InternalIPs, Node, Snapshot
from kilo_etcd.planning.pipeline import EncryptionInputs, host_plans
from kilo_etcd.planning.plan import host_plan
from kilo_etcd.runtime import key_file
from kilo_etcd.runtime.hostnames import known_names
from kilo_etcd.runtime.logs import MOST_NAMED
from kilo_etcd.runtime.resolve import etcd_networks, known_endpoints, resolve_once
from kilo_etcd.store import operator
from kilo_etcd.store.claims import candidates
from kilo_etcd.store.keys import Keys
from kilo_etcd.topology.forced_addresses import missing_addresses
from kilo_etcd.topology.segments import UnknownNode, build_topology


async def dry_run(config: AgentConfig, client: etcd.Client, setup: Callable[[AgentConfig, str], kernel.Setup]) -> None:
    """Print the changes, one command a line, and remarks as comments (`#`)."""
    private = key_file.peek(config.state_dir)
    if private is None:
        click.echo(f"# no key in {config.state_dir} yet: the agent will make one")
        private = key_file.generate()
    facts = await discover.gather(config)
    chosen = discover.choose(facts, config)
    for reason in chosen.reasons:
        click.echo(f"# {reason}")
    keys = Keys(config.prefix)
    snapshot, view = await operator.snapshot(client, keys)
    # The client knows discovered endpoints as soon as it has connected.
    etcd_at = await etcd_networks(known_endpoints(config.etcd.endpoints, client))
    if not snapshot.subnets:
        click.echo(f"# no mesh in etcd under {config.prefix} yet: the agent will make one")
        snapshot = evolve(
            snapshot,
            subnets=config.subnets,
            granularity=config.mesh_granularity or snapshot.granularity,
            internal_ips=config.internal_ips or InternalIPs.ROUTED,
        )
    if too_small := too_small_for(config.mtu, snapshot.subnets):
        click.echo(f"# the agent would not start: {too_small}")
    public = key_file.public_key(private)
    former = next((node for node in snapshot.nodes.values() if node.public_key == public), None)
    if former is not None and former.name != config.hostname:
        click.echo(
            f"# {former.name} has this host's key: shown as if that were its former name, and no agent ran there"
        )
        label = operator.labels(keys, view.kvs(keys.location(config.hostname))).get(config.hostname)
        location = former.default_location if label is None else label
        rest = {name: node for name, node in snapshot.nodes.items() if name != former.name}
        snapshot = _with(evolve(snapshot, nodes=rest), evolve(former, name=config.hostname, location=location))
    if config.hostname not in snapshot.nodes:
        click.echo(f"# {config.hostname} is not registered yet: shown as if it were")
        snapshot = _with(snapshot, _prospect(config, chosen, snapshot, public))
        own = evolve(snapshot.nodes[config.hostname], underlay=facts.reached(etcd_at).stated())
        snapshot = _with(snapshot, own)
    try:
        topology = build_topology(snapshot)
        table, failed = await resolve_once(host_plan(topology, config.hostname))
    except UnknownNode:
        click.echo(f"# {config.hostname} would not be among the mesh's nodes, so nothing would be changed")
        for aside in snapshot.rejected[:MOST_NAMED]:
            click.echo(f"# {aside}")
        if (more := len(snapshot.rejected) - MOST_NAMED) > 0:
            click.echo(f"# {more} more rejected records; kgctl status -o json lists all")
        return
    surroundings = facts.surroundings(etcd_at, table, failed)
    addresses = surroundings.addresses
    if concerns(topology, config.hostname):
        members = read_members(config.state_dir)
        around = outside(config, members, facts.sources(), table, addresses=addresses)
        surroundings = evolve(surroundings, encryption=EncryptionInputs(outside=around))
    plans = host_plans(topology, config.hostname, surroundings)
    for problem in plans.final.problems:
        click.echo(f"# {problem.text}")
    if view.kv(keys.annotation(config.hostname, "force-internal-ip")) is not None:
        for text in missing_addresses(topology, config.hostname, addresses, facts.underlay()):
            click.echo(f"# {text}")
    async with kernel.open_kernel(setup(config, private)) as device:
        changes = await device.preview(plans.final)
    if config.dns_hosts:
        for line in known_names(topology, plans.filtered, config.prefix).described():
            click.echo(f"# {line}")
    for change in changes:
        click.echo(str(change))
    if not changes:
        click.echo("# nothing to change")


def _prospect(config: AgentConfig, chosen: discover.Chosen, snapshot: Snapshot, public_key: str) -> Node:
    location = config.location or discover.location_from_cloud_init()[0] or ""
    taken = {address for node in snapshot.nodes.values() for address in node.mesh_addresses}
    addresses = []
    for subnet in snapshot.subnets:
        try:
            addresses.append(next(candidates(config.hostname, subnet, lambda address: address not in taken)))
        except StopIteration:
            click.echo(f"# no address is left for {config.hostname} in {subnet}: the agent would not start")
    return Node(
        name=config.hostname,
        public_key=public_key,
        location=location,
        endpoint=chosen.endpoint,
        more_endpoints=chosen.more_endpoints,
        internal_ips=chosen.internal_ips,
        mesh_addresses=tuple(addresses),
        port=config.port,
        persistent_keepalive=config.persistent_keepalive,
        encapsulate=config.encapsulate,
        default_location=location,
        registered_revision=snapshot.revision + 1,
    )


def _with(snapshot: Snapshot, node: Node) -> Snapshot:
    return evolve(snapshot, nodes={**snapshot.nodes, node.name: node})
