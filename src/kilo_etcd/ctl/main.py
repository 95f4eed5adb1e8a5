"""`kgctl`: the command line itself. It finds the subcommand, and turns what goes wrong into one sentence.

A subcommand's module is imported when that subcommand is asked for, so that `kgctl --version` and help do not wait
for the lab or for the mesh's machinery. Exit status: 0 done, 1 etcd or the mesh said no, 2 the command
line is wrong, 130 interrupted. A traceback means that kilo-etcd is at fault, never the operator.
"""

from __future__ import annotations

from importlib import import_module

import click
from click.shell_completion import CompletionItem

from kilo_etcd import __version__
from kilo_etcd.ctl.context import Mesh
from kilo_etcd.ctl.environment_file import use_environment_file, with_agents_endpoints
from kilo_etcd.etcd.api import Config
from kilo_etcd.runtime.options import etcd_options, prefix_option, refuse_variables

_COMMANDS = {
    "annotate": (
        "kilo_etcd.ctl.commands.annotate",
        "annotate_command",
        "Set or remove annotations of a node: endpoint, leader, networks.",
    ),
    "check": ("kilo_etcd.ctl.commands.check", "check_command", "Find everything that is wrong, and say what to do."),
    "connect": ("kilo_etcd.connect.command", "connect_command", "Make this machine a peer while the command runs."),
    "connection": (
        "kilo_etcd.connect.disconnect",
        "connection_group",
        "Show the connections of this machine, without etcd.",
    ),
    "completion": ("kilo_etcd.ctl.commands.complete", "completion_command", "Print the completion script of a shell."),
    "disconnect": (
        "kilo_etcd.connect.disconnect",
        "disconnect_command",
        "End a connection of this machine, without etcd.",
    ),
    "explain": ("kilo_etcd.ctl.commands.explain", "explain_command", "Trace a packet through the mesh, hop by hop."),
    "graph": (
        "kilo_etcd.ctl.commands.graph",
        "graph_command",
        "Print the mesh as a graph: DOT, SVG, PNG, Mermaid, JSON.",
    ),
    "lab": ("kilo_etcd.ctl.commands.lab", "lab_group", "Build a small internet on this machine and try things out."),
    "location": (
        "kilo_etcd.ctl.commands.location",
        "location_group",
        "Set, list and unset the labels that shape the mesh.",
    ),
    "man": ("kilo_etcd.ctl.commands.man", "man_command", "Write the manual pages."),
    "mesh": ("kilo_etcd.ctl.commands.mesh", "mesh_group", "Show and change the settings of the mesh; join two meshes."),
    "node": (
        "kilo_etcd.ctl.commands.node",
        "node_group",
        "List the nodes, show one, forget one that is gone for good, rename one.",
    ),
    "peer": (
        "kilo_etcd.ctl.commands.peer",
        "peer_group",
        "Add, list, show and remove laptops, phones, routers, other meshes.",
    ),
    "showconf": (
        "kilo_etcd.ctl.commands.showconf",
        "showconf_group",
        "Print the WireGuard configuration of a node or a peer.",
    ),
    "status": ("kilo_etcd.ctl.commands.status", "status_command", "Show nodes, locations, leaders and what is wrong."),
    "wait": (
        "kilo_etcd.ctl.commands.wait",
        "wait_command",
        "Wait until every living agent has applied what is in etcd.",
    ),
}
"""Name -> the module that has it, its name there, and its line in the help."""


_WITHOUT_ETCD = frozenset({"completion", "connection", "disconnect", "man", "lab", "-h", "--help"})
"""Commands, and options of any, that ask no etcd."""


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        module, name, _ = _COMMANDS[cmd_name]
        command: click.Command = getattr(import_module(module), name)
        return command

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        return [
            CompletionItem(name, help=text)
            for name, (_, _, text) in sorted(_COMMANDS.items())
            if name.startswith(incomplete)
        ]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, _, text) in sorted(_COMMANDS.items())])

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        given = tuple(args)
        rest = super().parse_args(ctx, args)
        # click keeps the name of the command apart from its arguments.
        command = getattr(ctx, "_protected_args", rest)[:1]
        if _WITHOUT_ETCD.isdisjoint((*command, *(word for word in given if word in ("-h", "--help")))):
            if not ctx.resilient_parsing:
                refuse_variables("kgctl")
            use_environment_file(ctx)
        return rest

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:  # fmt: skip
        try:
            return super().resolve_command(ctx, args)
        except click.exceptions.NoSuchCommand as error:
            # click knows only commands that are imported already.
            raise click.exceptions.NoSuchCommand(error.command_name, possibilities=_COMMANDS, ctx=ctx) from None

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            raise click.exceptions.Exit(130) from None


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"]})
@etcd_options
@prefix_option
@click.version_option(__version__, prog_name="kgctl")
@click.pass_context
def main(context: click.Context, etcd: Config, prefix: str) -> None:
    """Inspect and change the WireGuard mesh that etcd describes.

    The options of etcd are etcdctl's, and so are their environment variables. If none is given, those in
    /etc/kilo-etcd/kilo-etcd.env count, which the agent on this host uses.
    """
    context.obj = Mesh(with_agents_endpoints(context, etcd), prefix)


if __name__ == "__main__":
    main(prog_name="kgctl")
