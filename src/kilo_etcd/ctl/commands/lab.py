"""`kgctl lab`: build a small internet on this machine, and operate it.

`run` and `demo` build a lab and have it as long as they run; the other commands talk to one that runs,
the only one unless `--name` says which. Exit status: that of the program run inside where there is one; else 0, and
1 with one sentence when the lab could not do what was asked.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterable, Iterator
from enum import StrEnum
from importlib.resources import as_file, files
from pathlib import Path
from typing import TypeVar

import click
import trio
from rich.console import Console

from kilo_etcd.base.quoting import sentence
from kilo_etcd.ctl.context import Failure
from kilo_etcd.ctl.group import Group
from kilo_etcd.lab import Lab, LabError, Spec, SpecError, attach, demo, read_spec, running_lab
from kilo_etcd.lab.addressing import CUTS, SITE_CUTS
from kilo_etcd.lab.capture import Flow
from kilo_etcd.lab.terminal import SHELL, SHELL_ENVIRONMENT, run_here
from kilo_etcd.model import Granularity, InternalIPs
from kilo_etcd.runtime.parsing import one_of

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., object])

_DEFAULT = "six-hosts"
_DEMO = "three-sites"

name_option = click.option("--name", metavar="NAME", default=None, help="Which lab, where several run.")


@click.group(cls=Group)
def lab_group() -> None:
    """Build a small internet on this machine: sites, routers, hosts, a real etcd, an agent on every host."""


def _do(work: Callable[[], Awaitable[T]]) -> T:
    """Run `work`; SIGTERM and SIGHUP end it as Ctrl-C does, so that nothing is left; mistakes become a Failure."""

    async def bounded() -> T:
        with trio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, signal.SIGHUP) as signals:
            async with trio.open_nursery() as nursery:

                async def watch() -> None:
                    async for _ in signals:
                        stopped.append(True)
                        nursery.cancel_scope.cancel()
                        return

                nursery.start_soon(watch)
                result = await work()
                nursery.cancel_scope.cancel()
                return result
        raise click.exceptions.Exit(130)

    stopped: list[bool] = []
    try:
        return trio.run(bounded)
    except BaseExceptionGroup as group:
        lone: BaseException = group
        while isinstance(lone, BaseExceptionGroup) and len(lone.exceptions) == 1:
            lone = lone.exceptions[0]
        if isinstance(lone, (LabError, SpecError)):
            raise Failure(str(lone)) from None
        raise lone from None
    except (LabError, SpecError) as error:
        raise Failure(str(error)) from None


def _with_lab(name: str | None, work: Callable[[Lab], Awaitable[T]]) -> T:
    async def attached() -> T:
        return await work(attach(name))

    return _do(attached)


def load(source: str) -> Spec:
    """The spec in a file, or an example that ships, by name. SpecError with a sentence."""
    folder = files("kilo_etcd.lab") / "examples"
    example = folder / f"{source}.toml"
    if not Path(source).exists() and example.is_file():
        with as_file(example) as path:
            return read_spec(path)
    if not Path(source).exists():
        shipped = ", ".join(sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir()))
        raise SpecError(f"{source}: there is no such file; name one, or an example: {shipped}")
    return read_spec(Path(source))


def _setting_option(name: str, kind: type[StrEnum], help_text: str) -> Callable[[F], F]:
    """An option for one of the mesh's settings, read as everywhere else."""
    choice = click.Choice(tuple(member.value for member in kind))

    def parse(context: click.Context, parameter: click.Parameter, text: str | None) -> StrEnum | None:
        try:
            return None if text is None else one_of(kind, text)
        except ValueError as error:
            raise click.BadParameter(sentence(error), context, parameter) from None

    return click.option(
        name,
        metavar=f"[{'|'.join(kind)}]",
        callback=parse,
        shell_complete=choice.shell_complete,
        help=help_text,
    )


def _adjusted(source: str, etcd: str | None, granularity: Granularity | None, internal_ips: InternalIPs | None) -> Spec:
    spec = load(source)
    if etcd:
        spec = spec.evolve(etcd=int(etcd))
    if granularity:
        spec = spec.evolve(granularity=granularity)
    if internal_ips:
        spec = spec.evolve(internal_ips=internal_ips)
    return spec


@lab_group.command()
@click.argument("file", default=_DEFAULT)
@click.option("--name", default="default", show_default=True, help="The lab's name, for the other commands.")
@click.option("--etcd", type=click.Choice(["1", "3"]), help="How many etcd members.")
@_setting_option("--granularity", Granularity, "How segments are formed.")
@_setting_option("--internal-ips", InternalIPs, "Which traffic to internal IPs travels in the tunnels.")
@click.option("--command", metavar="CMD", help="Run this in the operator's shell once all hosts ping, then end.")
@click.option(
    "--deadline",
    type=float,
    default=60.0,
    show_default=True,
    help="Seconds until all hosts must ping, else the lab ends.",
)
def run(
    file: str,
    name: str,
    etcd: str | None,
    granularity: Granularity | None,
    internal_ips: InternalIPs | None,
    command: str | None,
    deadline: float,
) -> None:
    """Build the lab of FILE (TOML, or an example's name) and keep it until Ctrl-C."""

    async def work() -> int:
        spec = _adjusted(file, etcd, granularity, internal_ips)
        async with running_lab(spec, name, say=lambda line: click.echo(line, err=True)) as lab:
            if spec.agents:
                try:
                    await lab.all_pairs_ping(deadline)
                except LabError as error:
                    raise LabError(
                        f"{error}; so the lab ends: with --deadline {10 * deadline:g} it waits longer, and meanwhile "
                        "kgctl lab shell and kgctl lab logs HOST in another terminal show why"
                    ) from None
                click.echo(f"all {sum(host.agent for host in spec.hosts)} hosts ping each other", err=True)
            if command is not None:
                return await run_here(lab, "operator", ["sh", "-c", command])
            console = Console()
            console.print(await demo.host_table(lab, console))
            if spec.next_steps:
                click.echo(f"To try in another terminal, after kgctl lab shell{_named(name)}:")
                for line in spec.next_steps:
                    click.echo(f"  {line}")
            click.echo(f"lab {name} runs; in another terminal: kgctl lab shell{_named(name)} (Ctrl-C here ends it)")
            await trio.sleep_forever()
        return 0

    sys.exit(_do(work))


def _named(name: str) -> str:
    """How the other commands say which lab, if it is not the one that they take by themselves."""
    return "" if name == "default" else f" --name {name}"


@lab_group.command("demo")
@click.argument("file", default=_DEMO)
@click.option("--name", default="demo", show_default=True, help="The lab's name, for the other commands.")
@click.option("--picture", default="mesh.svg", show_default=True, type=click.Path(path_type=Path), help="The SVG.")
def demo_command(file: str, name: str, picture: Path) -> None:
    """Show hosts at three sites register, elect leaders and reach each other; then it is yours to try."""

    async def work() -> int:
        spec = load(file)
        console = Console()
        async with running_lab(spec, name, say=lambda line: console.print(line, style="dim", highlight=False)) as lab:
            await demo.show(lab, console, picture)
            if not (os.isatty(0) and os.isatty(1)):
                console.print("\nOn a terminal there would be a shell in it now, to try more; here the lab ends.")
            else:
                console.print("\n[bold]Try next[/], for instance with kgctl status or kgctl lab pings after each:")
                for line in demo.suggestions(lab):
                    console.print(f"  {line}", style="cyan", highlight=False, markup=False)
                console.print("\nThis is the operator's shell; leave it (exit, Ctrl-D) and the lab is gone.\n")
                await run_here(lab, "operator", SHELL, SHELL_ENVIRONMENT)
        return 0

    sys.exit(_do(work))


@lab_group.command()
@click.argument("machine", default="operator")
@name_option
def shell(machine: str, name: str | None) -> None:
    """Open a shell in the operator's machine, a host, router:SITE or etcd:MEMBER."""
    sys.exit(_with_lab(name, lambda lab: run_here(lab, machine, SHELL, SHELL_ENVIRONMENT)))


@lab_group.command("exec", context_settings={"allow_interspersed_args": False})
@click.argument("machine")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
@name_option
def exec_command(machine: str, command: tuple[str, ...], name: str | None) -> None:
    """Run a command in a host, router:SITE, etcd:MEMBER, or operator. Options of kgctl's come before MACHINE; what
    follows it is the command's."""
    program = command[1:] if command[0] == "--" else command
    if not program:
        raise click.UsageError("Missing the command to run after MACHINE.")
    sys.exit(_with_lab(name, lambda lab: run_here(lab, machine, program)))


@lab_group.command()
@name_option
def status(name: str | None) -> None:
    """List the hosts, their addresses and their agents."""

    async def work(lab: Lab) -> None:
        console = Console()
        console.print(await demo.host_table(lab, console))

    _with_lab(name, work)


@lab_group.command()
@click.argument("machine")
@click.option("-f", "--follow", is_flag=True, help="Go on printing as it grows.")
@name_option
def logs(machine: str, follow: bool, name: str | None) -> None:
    """Print the log of a host's agent, or of an etcd member."""
    path = f"/run/kilo-lab/logs/{machine.removeprefix('etcd:')}.log"
    command = ["tail", "-n", "+1", *(["-F"] if follow else []), path]
    sys.exit(_with_lab(name, lambda lab: run_here(lab, "operator", command)))


def _agent_command(action: str, text: str) -> None:
    @lab_group.command(action, help=text)
    @click.argument("host")
    @name_option
    def command(host: str, name: str | None) -> None:
        async def work(lab: Lab) -> None:
            await getattr(lab, action)(host)

        _with_lab(name, work)


_agent_command("stop", "Stop a host's agent with SIGTERM.")
_agent_command("kill", "Kill a host's agent with SIGKILL.")
_agent_command("start", "Start a host's agent.")
_agent_command("reload", "Have a host's agent run its code anew (SIGHUP).")
_agent_command("freeze", "Freeze a host's agent with SIGSTOP.")
_agent_command("thaw", "Let a frozen agent go on.")


@lab_group.command("power-off")
@click.argument("host")
@name_option
def power_off(host: str, name: str | None) -> None:
    """Crash a host: all its processes and interfaces are gone at once; its state directory stays."""
    _with_lab(name, lambda lab: lab.power_off(host))


@lab_group.command("power-on")
@click.argument("host")
@click.option("--no-agent", is_flag=True, help="Do not start its agent.")
@name_option
def power_on(host: str, no_agent: bool, name: str | None) -> None:
    """Boot a host again and start its agent."""
    _with_lab(name, lambda lab: lab.power_on(host, agent=False if no_agent else None))


@lab_group.command()
@click.argument("host")
@click.option("--from", "kind", type=click.Choice(CUTS), default="all", show_default=True)
@name_option
def cut(host: str, kind: str, name: str | None) -> None:
    """Silently drop what a host exchanges with etcd, its location's hosts, all others, or everything; or what it
    forwards, what goes to its WireGuard port, or a fifth of that."""
    _with_lab(name, lambda lab: lab.cut(host, kind))


@lab_group.command()
@click.argument("host")
@name_option
def heal(host: str, name: str | None) -> None:
    """Undo all cuts of a host."""
    _with_lab(name, lambda lab: lab.heal(host))


@lab_group.command("cut-site")
@click.argument("site")
@click.option("--from", "kind", type=click.Choice(SITE_CUTS), default="all", show_default=True)
@name_option
def cut_site(site: str, kind: str, name: str | None) -> None:
    """Silently drop at a site's router what it exchanges with etcd, all others, or everything."""
    _with_lab(name, lambda lab: lab.cut_site(site, kind))


@lab_group.command("heal-site")
@click.argument("site")
@name_option
def heal_site(site: str, name: str | None) -> None:
    """Undo all cuts of a site."""
    _with_lab(name, lambda lab: lab.heal_site(site))


@lab_group.command()
@click.argument("host")
@click.argument("label")
@name_option
def label(host: str, label: str, name: str | None) -> None:
    """Label a host (etcdctl put /kilo/locations/HOST LABEL)."""
    _with_lab(name, lambda lab: lab.label(host, label))


@lab_group.command()
@click.argument("host")
@name_option
def unlabel(host: str, name: str | None) -> None:
    """Remove a host's label."""
    _with_lab(name, lambda lab: lab.unlabel(host))


@lab_group.command("etcd")
@click.argument("action", type=click.Choice(["kill", "stop", "start", "freeze", "thaw", "cut", "heal"]))
@click.argument("member", default="etcd1")
@name_option
def etcd_command(action: str, member: str, name: str | None) -> None:
    """Kill, stop, start, freeze or thaw an etcd member (etcd1 unless named); cut it off from the other members, or heal
    that."""
    _with_lab(name, lambda lab: lab.etcd(action, member))


@lab_group.command()
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@name_option
def ping(source: str, target: str, name: str | None) -> None:
    """Ping a host's mesh address (or any address) from another host; exit status 1 when nothing answers."""
    answered = _with_lab(name, lambda lab: lab.ping(source, target))
    click.echo(f"{target} {'answers' if answered else 'does not answer'} {source}")
    sys.exit(0 if answered else 1)


@lab_group.command()
@name_option
def pings(name: str | None) -> None:
    """Ping all ordered pairs of hosts at their mesh addresses; exit status 1 when any is missing."""

    async def work(lab: Lab) -> bool:
        missing = await lab.missing_pings()
        Console().print(await demo.ping_table(lab))
        return not missing

    sys.exit(0 if _with_lab(name, work) else 1)


@lab_group.command()
@click.argument("source", metavar="FROM")
@click.argument("target", metavar="TO")
@click.option("--interval", type=float, default=0.01, show_default=True, help="Seconds between packets.")
@click.option("--seconds", type=float, default=10.0, show_default=True, help="How long.")
@name_option
def gap(source: str, target: str, interval: float, seconds: float, name: str | None) -> None:
    """Measure loss from one host to another's mesh address, and how long it lasted at most."""

    async def work(lab: Lab) -> None:
        async with lab.probe(source, target, interval) as probe:
            await trio.sleep(seconds)
        click.echo(f"{probe.sent} sent, {probe.lost} lost, longest gap {probe.longest_gap * 1000:.0f} ms")

    _with_lab(name, work)


@lab_group.command()
@click.argument("site")
@name_option
def counters(site: str, name: str | None) -> None:
    """Show what a site's router has seen go to and from other sites: WireGuard, etcd, and anything else.

    Anything else (`other`; `stray` between the subnets of a strict site) is dropped, unless the lab is open: with
    `open = true` at the top of its file everything is delivered, so that what leaves its host although it must not is
    seen where it arrives.
    """

    async def work(lab: Lab) -> None:
        for kind, count in (await lab.counters(site)).items():
            click.echo(f"{kind:10} {count.packets:10} packets {count.bytes:12} bytes")

    _with_lab(name, work)


@lab_group.command()
@click.argument("machine")
@click.option("--seconds", type=float, default=5.0, show_default=True, help="How long.")
@click.option("--interface", "interfaces", multiple=True, help="Where (default: a router's ports, a host's eth0).")
@name_option
def capture(machine: str, seconds: float, interfaces: tuple[str, ...], name: str | None) -> None:
    """Count the flows on the LANs of router:SITE, or on a host's interface."""

    async def work(lab: Lab) -> None:
        async with lab.capture(machine, interfaces) as captured:
            await trio.sleep(seconds)
        for line in flow_lines(captured.flows):
            click.echo(line)

    _with_lab(name, work)


def flow_lines(flows: Iterable[Flow]) -> Iterator[str]:
    """A line for each flow, in columns as wide as the longest address needs."""
    rows = [
        (flow, _socket(flow.source, flow.source_port), _socket(flow.destination, flow.destination_port))
        for flow in flows
    ]  # fmt: skip
    first = max((len(source) for _, source, _ in rows), default=0)
    second = max((len(target) for _, _, target in rows), default=0)
    for flow, source, target in rows:
        yield f"{flow.protocol:8} {source:{first}} {target:{second}} {flow.packets:8} packets {flow.bytes:10} bytes"


def _socket(address: str, port: int) -> str:
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
