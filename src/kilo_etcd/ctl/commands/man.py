"""`kgctl man DIRECTORY`: manual pages for kgctl and kg, made from their `--help`.

One page for each program, all subcommands in it, so that `/` in the pager searches everything.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import date
from importlib import import_module
from pathlib import Path

import click

from kilo_etcd import __version__
from kilo_etcd.base.wholefile import write_whole
from kilo_etcd.ctl.context import Failure

_EXIT = {
    "0": "Done, and well.",
    "1": "It could not be done, or what was asked about does not work.",
    "2": "The command line, a setting or a key file is wrong.",
    "130": "Interrupted.",
}
_PROGRAMS = ((1, "kgctl", "kilo_etcd.ctl.main"), (8, "kg", "kilo_etcd.agent.main"))
"""Section, name, and the module whose `main` is the program's command line. Nothing else of the agent is used here."""


@click.command("man", epilog="Example:\n\n\b\n  kgctl man /usr/local/share/man && man kgctl")
@click.argument("directory", type=click.Path(file_okay=False, path_type=Path))
def man_command(directory: Path) -> None:
    """Write the manual pages kgctl(1) and kg(8) below DIRECTORY."""
    for section, name, module in _PROGRAMS:
        command: click.Command = import_module(module).main
        file = directory / f"man{section}" / f"{name}.{section}"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(file, page(command, name, section, date.today()).encode())
        except OSError as error:
            raise Failure(f"{file} cannot be written: {error.strerror}; choose a directory of yours") from None
        click.echo(str(file))


def page(command: click.Command, name: str, section: int, day: date) -> str:
    """The manual page of a program, in roff with man's macros."""
    context = click.Context(command, info_name=name)
    lines = [
        f'.TH {name.upper()} {section} {day} "kilo-etcd {__version__}" "kilo-etcd"',
        ".SH NAME",
        f"{name} \\- {_escaped(_summary(command))}",
        ".SH SYNOPSIS",
        *_synopsis(context),
        ".SH DESCRIPTION",
        *_text(command.help or ""),
        *_options(context, ".SH OPTIONS"),
        *_examples(command),
    ]
    parts = list(_subcommands(context))
    if parts:
        lines.append(".SH COMMANDS")
    for below in parts:
        lines += [
            f'.SS "{_escaped(below.command_path)}"',
            *_synopsis(below),
            ".PP",
            *_text(below.command.help or ""),
            *_options(below, ""),
            *_examples(below.command),
        ]
    lines.append(".SH EXIT STATUS")
    for status, meaning in _EXIT.items():
        lines += [".TP", f".B {status}", _escaped(meaning)]
    return "\n".join(lines) + "\n"


def _subcommands(context: click.Context) -> Iterator[click.Context]:
    """The leaves below, in the order of their names."""
    group = context.command
    if not isinstance(group, click.Group):
        return
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        if command is None or command.hidden:
            continue
        below = click.Context(command, info_name=name, parent=context)
        if isinstance(command, click.Group):
            yield from _subcommands(below)
            if not command.invoke_without_command:
                continue
        yield below


def _summary(command: click.Command) -> str:
    return (command.help or "").strip().partition("\n\n")[0].replace("\n", " ").rstrip(".")


def _synopsis(context: click.Context) -> Iterator[str]:
    # The path without the parents' arguments, which there are none of.
    pieces = " ".join(context.command.collect_usage_pieces(context))
    yield f"\\fB{_escaped(context.command_path)}\\fP {_escaped(pieces)}"


def _options(context: click.Context, heading: str) -> Iterator[str]:
    records = [
        record
        for parameter in context.command.get_params(context)
        if isinstance(parameter, click.Option)
        and (context.parent is None or "--help" not in parameter.opts)
        and (record := parameter.get_help_record(context)) is not None
    ]
    if records and heading:
        yield heading
    for flags, words in records:
        yield ".TP"
        yield f".B {_escaped(flags)}"
        yield _escaped(words)


def _examples(command: click.Command) -> Iterator[str]:
    if command.epilog:
        yield ".PP"
        yield from _text(command.epilog)


def _text(text: str) -> Iterator[str]:
    """Paragraphs; one that begins with a backspace is kept line by line, as click does it."""
    for number, paragraph in enumerate(re.split(r"\n\s*\n", text.strip())):
        if number:
            yield ".PP"
        if paragraph.lstrip().startswith("\b"):
            yield ".nf"
            yield from (_escaped(line) for line in paragraph.strip().splitlines() if line.strip("\b "))
            yield ".fi"
        else:
            yield _escaped(" ".join(paragraph.split()))


def _escaped(text: str) -> str:
    """Text as roff takes it literally: a point or quote at a line's beginning is no request."""
    escaped = (
        text.replace("\b", "").replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("`", "\\(ga")
    )
    return f"\\&{escaped}" if escaped.startswith(".") else escaped
