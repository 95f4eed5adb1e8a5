"""`kg`: reads the options, opens what the agent needs, and turns every mistake of the operator's into one sentence.

Exit status: 0 stopped as asked, 1 something is wrong that the operator must mend, 2 the command line or the key file is
wrong, which starting again cannot mend.
"""

from __future__ import annotations

import gc
import linecache
import os
import shlex
import sys
import time
import traceback
from collections.abc import Awaitable, Callable
from contextlib import AbstractAsyncContextManager
from functools import partial

import click
import trio

from kilo_etcd import __version__, kernel
from kilo_etcd.agent import cachefile, snapshot_cache, trial
from kilo_etcd.agent.config import AgentConfig
from kilo_etcd.agent.daemon import Daemon
from kilo_etcd.agent.dnshosts import writer
from kilo_etcd.agent.dryrun import dry_run
from kilo_etcd.agent.endings import Fatal, Reload, StoppedAtOnce
from kilo_etcd.agent.etcd_listeners import remove_members
from kilo_etcd.agent.leader_hints.peer_query import UdpTransport
from kilo_etcd.agent.metrics import Metrics
from kilo_etcd.agent.notify import notify
from kilo_etcd.agent.options import agent_options
from kilo_etcd.agent.restore import REFUSALS
from kilo_etcd.base.descriptors import OutOfDescriptors
from kilo_etcd.etcd import api as etcd
from kilo_etcd.etcd.client import EtcdClient, open_client
from kilo_etcd.runtime import connections, etcd_members, key_file
from kilo_etcd.runtime.hostsfile import HostsFileError
from kilo_etcd.runtime.lock_file import AlreadyRunning, agent_lock, connection_lock
from kilo_etcd.runtime.logs import get_logger, setup_logging
from kilo_etcd.runtime.options import unknown_variables
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.session.session import Session

EXPECTED = (
    Fatal,
    AlreadyRunning,
    OutOfDescriptors,
    etcd.EtcdError,
    kernel.KernelError,
    key_file.KeyFileError,
    *REFUSALS,
)

OBJECTS_BETWEEN_COLLECTIONS, COLLECTIONS_OF_THE_NEW = 5_000, (10, 10)
"""Python's own first is 700. A snapshot from scratch makes many objects for each node, and none of them is garbage."""

PAUSE_SECONDS = 10.0
"""How long an agent that could not go on stays before it ends, where systemd starts it again.

The unit's own RestartSec has to be short, since an agent that crashed is to be back within its lease; but what an
operator has to mend may stay as it is for days, and each start costs a second of CPU and six lines in the journal. The
same holds for an agent that crashes within `SOON_SECONDS`: it is no healthy one that something has befallen.
"""
SOON_SECONDS = 10.0


@click.group(invoke_without_command=True, context_settings={"help_option_names": ["-h", "--help"]})
@agent_options
@click.version_option(__version__, prog_name="kg")
@click.pass_context
def main(context: click.Context, config: AgentConfig) -> None:
    """Join this host to the WireGuard mesh that etcd describes, and keep it joined.

    Every option can be given as an environment variable, KILO_ and its name (KILO_HOSTNAME=...); those of etcd
    are etcdctl's (ETCDCTL_ENDPOINTS=...).
    """
    setup_logging(config.log_level)
    context.obj = config
    if context.invoked_subcommand is None:
        _run(_dry_run if config.dry_run else _agent, config)


@main.command(short_help="Remove everything that the agent has made, and its records in etcd.")
@click.pass_obj
def cleanup(config: AgentConfig) -> None:
    """Remove everything that the agent has made on this host, and its records in etcd."""
    _run(_cleanup, config)


@main.command(trial.COMMAND, hidden=True)
@click.option("--etcd-answers", is_flag=True)
@click.pass_obj
def trial_command(config: AgentConfig, etcd_answers: bool) -> None:
    """Try whether this code runs, and change nothing: what a reload does first."""
    _run(partial(trial.trial, setup=kernel_setup, client=_client, etcd_answers=etcd_answers), config)


def _run(work: Callable[[AgentConfig], Awaitable[None]], config: AgentConfig) -> None:
    began = time.monotonic()
    status, trouble = 0, ""
    # Up to Python 3.11.3 what is raised within `except*` gets out of it in a group, SystemExit too.
    try:
        trio.run(work, config)
    except* EXPECTED as group:
        errors = _leaves(group)
        sentences = list(dict.fromkeys(map(str, errors)))
        for sentence in sentences:
            click.echo(f"kg: {sentence}", err=True)
        status = 2 if any(isinstance(error, key_file.UnusableKey) for error in errors) else 1
        if work is _agent and not any(isinstance(error, StoppedAtOnce) for error in errors):
            trouble = sentences[0]
    except* Reload:
        _run_anew()
        status = 1
    except* KeyboardInterrupt:
        status = 130
    except* Exception as group:
        if work is not _agent or time.monotonic() - began >= SOON_SECONDS:
            raise
        # Started again at once it would most likely crash again.
        traceback.print_exception(group)
        status, trouble = 1, "it crashed as soon as it had started, see the journal"
    if trouble and status == 1:
        _pause(trouble)
    if status:
        sys.exit(status)


def _run_anew() -> None:
    """The same command line in this very process, with the code that is installed now. Returns only if it fails."""
    try:
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    except OSError as error:
        click.echo(
            f"kg: {sys.executable} cannot be run again: {error.strerror}; is the new version installed?", err=True
        )


def _pause(sentence: str) -> None:
    """As a service, let some time pass. SIGTERM ends it, as it ends any process that does not handle it."""
    if notify(f"STATUS=cannot run, will try again: {sentence}"):
        time.sleep(PAUSE_SECONDS)


def _leaves(group: BaseException) -> list[BaseException]:
    if isinstance(group, BaseExceptionGroup):
        return [leaf for part in group.exceptions for leaf in _leaves(part)]
    return [group]


async def _agent(config: AgentConfig) -> None:
    with agent_lock():
        await _only_agent(config)


async def _only_agent(config: AgentConfig) -> None:
    log = get_logger()
    private = key_file.load_or_create(config.state_dir)
    log.info("starting", version=__version__, node=config.hostname, interface=config.interface)
    if names := unknown_variables():
        log.warning("variables that etcdctl does not have are without effect", names=",".join(names))
    if not config.endpoints_from_cluster:
        _forget_members(config)
    async with (
        _client(config) as client,
        kernel.open_kernel(kernel_setup(config, private)) as device,
    ):
        metrics = Metrics()
        async with metrics.serve(config.listen):
            public = key_file.public_key(private)
            disk = snapshot_cache.Disk(config.state_dir, private_key=private)
            _all_is_loaded()
            await Daemon(
                config,
                client,
                device,
                public,
                metrics=metrics,
                disk=disk,
                secret=lambda key: key_file.agreed(private, key),
                transport=UdpTransport(config.peer_query_port),
                write_names=writer(config),
            ).run()


def _forget_members(config: AgentConfig) -> None:
    """The copy of former days must not count if the members are followed again some day."""
    try:
        etcd_members.remove(config.state_dir)
    except OSError as error:
        get_logger().warning("the copy of etcd's endpoints cannot be removed", error=error.strerror)


def _all_is_loaded() -> None:
    """What exists now stays as long as the process."""
    # attrs keeps the sources of the methods that it wrote, for debuggers: 0.5 MiB.
    linecache.clearcache()
    # From here on the collector of cyclic garbage has only to go through what is made later, and less often.
    gc.freeze()
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS, *COLLECTIONS_OF_THE_NEW)


async def _dry_run(config: AgentConfig) -> None:
    async with _client(config) as client:
        await dry_run(config, client, kernel_setup)


async def _cleanup(config: AgentConfig) -> None:
    with agent_lock(), connection_lock("interface", config.interface, f"the interface {config.interface}"):
        unusable: key_file.KeyFileError | None = None
        try:
            public = key_file.peek_public_key(config.state_dir)
        except key_file.KeyFileError as error:
            public, unusable = None, error
        another = await kernel.other_agent(config.interface, public_key=public)
        # A connection may have had the interface.
        for protocol in (kernel.ROUTE_PROTOCOL, kernel.PEER_PROTOCOL):
            for change in await kernel.cleanup(config.interface, public_key=public, protocol=protocol):
                click.echo(str(change))
        connections.remove(config.interface)
        try:
            if await writer(config)(None):
                click.echo("the names of the mesh are removed from /etc/hosts")
        except HostsFileError as error:
            click.echo(f"kg: the names of the mesh stay in the hosts file: {error}", err=True)
        if another:
            raise Fatal(
                f"the agent of this host has the interface {another}, so its files and its records in etcd stay: "
                f"kg --interface {another} cleanup removes them"
            )
        try:
            cachefile.remove(config.state_dir)
            remove_members(config.state_dir)
            etcd_members.remove(config.state_dir)
        except OSError as error:
            click.echo(f"kg: the cached snapshot stays in {config.state_dir}: {error.strerror}", err=True)
        if unusable is not None:
            raise unusable
        if public is None:
            return
        async with _client(config) as client:
            session = Session(client, Keys(config.prefix), config.hostname, public)
            try:
                await session.forget()
            except etcd.EtcdError as error:
                raise Fatal(
                    f"the host is cleaned up, but the records of {config.hostname} are still in etcd: {error}; "
                    "run kg cleanup again when etcd can be reached"
                ) from None
            click.echo(f"the records of {config.hostname} are removed from etcd")


def _client(config: AgentConfig) -> AbstractAsyncContextManager[EtcdClient]:
    """A client of etcd, also if none of its members is left at the endpoints that were given."""
    known = (
        etcd_members.with_known_members(config.etcd, config.state_dir) if config.endpoints_from_cluster else config.etcd
    )
    return open_client(known, on_remark=lambda sentence: get_logger().warning(sentence))


def kernel_setup(config: AgentConfig, private: str) -> kernel.Setup:
    """The flags that the kernel layer needs, with the host's WireGuard key `private`."""
    return kernel.Setup(
        interface=config.interface,
        private_key=private,
        mtu=config.mtu,
        wireguard=config.wireguard.value,
        forward_rules=config.forward_rules,
        clamp_mss=config.clamp_mss,
        userspace_command=shlex.join(config.userspace_command),
    )


if __name__ == "__main__":
    main()
