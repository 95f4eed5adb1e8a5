"""Where what a command has to say goes: `-o table` (the default) or `-o json`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click

from kilo_etcd.ctl.reports.render import Table, framed, plain

F = TypeVar("F", bound=Callable[..., Any])


def output_option(command: F) -> F:
    """Give a command `-o`; it is called with `output`, "table" or "json"."""
    decorate: Callable[[F], F] = click.option(
        "-o", "--output", type=click.Choice(("table", "json")), default="table", help="The output format."
    )
    return decorate(command)


def show(tables: Iterable[Table], heading: str = "") -> None:
    """Print tables: with a frame on a terminal, as aligned text elsewhere."""
    click.echo(framed(tables, heading) if sys.stdout.isatty() else plain(tables, heading))
