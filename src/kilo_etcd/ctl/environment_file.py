"""Reads how etcd is reached from the environment file of the agent's unit, so that `kgctl` on a host asks the etcd that
its agent follows.

It counts only if neither a flag nor a variable says anything about etcd: half of one configuration and half of another
could send a password to a stranger.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import click
from click.core import ParameterSource

from kilo_etcd.etcd.api import Config
from kilo_etcd.model import DEFAULT_STATE_DIR
from kilo_etcd.runtime.options import etcd_and_prefix, etcd_flags, refuse_variables

PATH = Path("/etc/kilo-etcd/kilo-etcd.env")
"""The file that `kilo-etcd.service` names in EnvironmentFile."""

_PREFIX = "_prefix_prefix"
"""The parameter of `runtime.options.prefix_option`."""


def parse(text: str) -> dict[str, str]:
    """The variables of an environment file, as systemd.exec(5) describes it. Lines that assign nothing are left out."""
    variables = {}
    for line in text.replace("\\\n", "").splitlines():
        name, assigned, value = line.strip().partition("=")
        if assigned and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            variables[name] = _unquoted(value.strip())
    return variables


def _unquoted(value: str) -> str:
    if len(value) > 1 and value[0] == value[-1] == "'":
        return value[1:-1]
    if len(value) > 1 and value[0] == value[-1] == '"':
        return re.sub(r'\\(["\\`$])', r"\1", value[1:-1])
    return re.sub(r"\\(.)", r"\1", value)


def use_environment_file(context: click.Context) -> None:
    """Take etcd's flags and the prefix from the file, in a context that has parsed its own command line, if nothing
    about etcd was given and the command asks etcd. A file that this user cannot read is named on standard error.
    click.UsageError, which begins with the file's path."""
    names = {f"_etcd_{flag.parameter}": flag for flag in etcd_flags()}
    if any(context.get_parameter_source(name) is not ParameterSource.DEFAULT for name in names):
        return
    try:
        variables = parse(PATH.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return
    except (OSError, UnicodeDecodeError) as error:
        if not context.resilient_parsing:
            why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
            click.echo(
                f"kgctl: {PATH} cannot be read ({why}), so etcd is looked for at {context.params['_etcd_endpoints']}; "
                "run kgctl as root, or set ETCDCTL_ENDPOINTS",
                err=True,
            )
        return
    before = context.params.copy()
    try:
        refuse_variables("kgctl", variables)
        _set_parameters(context, variables, {name: flag.env for name, flag in names.items()})
        etcd_and_prefix(context)
    except (click.UsageError, ValueError) as error:
        context.params.clear()
        context.params.update(before)
        if context.resilient_parsing:
            # The shell completes a word.
            return
        text = error.format_message() if isinstance(error, click.UsageError) else str(error)
        raise click.UsageError(f"{PATH}: {text}", context) from None
    context.meta[_USED] = True
    if _is_on(variables.get("KILO_ENDPOINTS_FROM_CLUSTER", "")):
        context.meta[_STATE_DIR] = Path(variables.get("KILO_STATE_DIR") or DEFAULT_STATE_DIR)


def _is_on(value: str) -> bool:
    """Whether a variable of `kg` switches something on. What it does not understand `kg` refuses itself."""
    try:
        return bool(value and click.BOOL(value))
    except click.BadParameter:
        return False


_USED, _STATE_DIR = "kilo_etcd.environment_file", "kilo_etcd.state_dir"


def with_agents_endpoints(context: click.Context, etcd: Config) -> Config:
    """`etcd`, with the endpoints at which the agent of the file has found etcd's members, if it follows them."""
    state_dir: Path | None = context.find_root().meta.get(_STATE_DIR)
    if state_dir is None:
        return etcd
    from kilo_etcd.runtime.etcd_members import with_known_members

    return with_known_members(etcd, state_dir)


def used(context: click.Context) -> bool:
    """Whether etcd's flags are from the file."""
    return bool(context.find_root().meta.get(_USED))


def _set_parameters(context: click.Context, variables: Mapping[str, str], names: Mapping[str, str]) -> None:
    variable_names = dict(names)
    if context.get_parameter_source(_PREFIX) is ParameterSource.DEFAULT:
        variable_names[_PREFIX] = "KILO_PREFIX"
    for parameter in context.command.get_params(context):
        # An empty value is as good as none.
        if (value := variables.get(variable_names.get(parameter.name or "", ""), "")) and parameter.name is not None:
            context.params[parameter.name] = parameter.type_cast_value(context, value)
