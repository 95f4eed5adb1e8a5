"""The command-line flags that `kg` and `kgctl` share, and how tables of flags become options of a click command.

The table here holds etcd's flags, named and read as etcdctl does; the agent's is in `agent.options`. Checking is done
by `etcd_config`. Passwords are never shown in help or errors.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar
from urllib.parse import urlsplit

import click
from attrs import frozen
from click.core import ParameterSource

from kilo_etcd.base.quoting import shown_path
from kilo_etcd.etcd.api import Config, Discovery, Tls
from kilo_etcd.model import DEFAULT_PREFIX
from kilo_etcd.runtime.etcdctl_variables import refusal, unknown
from kilo_etcd.runtime.parsing import environment_name, parse_duration, parse_prefix, read

F = TypeVar("F", bound=Callable[..., Any])


@frozen(kw_only=True)
class Flag:
    """One flag: its name, its environment variable, its default as an operator would write it, and its help."""

    name: str
    env: str
    default: str
    help: str
    switch: bool = False
    """It takes no value; in the environment write true or false."""
    negative: str = ""
    """The name that turns a switch off."""
    several: bool = False
    """It may be given several times."""
    choices: tuple[str, ...] = ()
    secret: bool = False

    @property
    def parameter(self) -> str:
        """The name under which click passes it on."""
        return self.name.removeprefix("--").replace("-", "_")


def kilo_flag(name: str, default: str, help: str, **rest: Any) -> Flag:
    """A flag whose environment variable is `KILO_` and its name."""
    return Flag(name=name, env=environment_name(name), default=default, help=help, **rest)


PREFIX = kilo_flag("--prefix", DEFAULT_PREFIX, "The prefix in etcd under which the mesh lives.")


DEFAULT_ENDPOINTS = "127.0.0.1:2379"
_DOMAIN = re.compile(r"[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")
_LABEL = re.compile(r"[A-Za-z0-9_-]{1,40}")


def _variable(flag: str) -> str:
    return "ETCDCTL_" + flag.removeprefix("--").replace("-", "_").upper()


def _etcd(name: str, default: str, help: str, **rest: Any) -> Flag:
    return Flag(name=name, env=_variable(name), default=default, help=help, **rest)


_ETCD = (
    _etcd("--endpoints", DEFAULT_ENDPOINTS, "etcd's endpoints, comma-separated: host:port, http://... or https://..."),
    kilo_flag(
        "--prefer-first-endpoint",
        "false",
        "Try the first of --endpoints before the others, such as an etcd grpc-proxy of this location. Those are tried "
        "in random order, as all are without this flag.",
        switch=True,
    ),
    _etcd("--discovery-srv", "", "The domain whose SRV records name etcd's endpoints, instead of --endpoints."),
    _etcd("--discovery-srv-name", "", "The service name in these records: _etcd-client-ssl-NAME._tcp."),
    _etcd(
        "--insecure-discovery",
        "false",
        "Take endpoints without TLS from these records too, and certificates that are good for an endpoint's own name "
        "and not for the domain.",
        switch=True,
    ),
    _etcd("--cacert", "", "The CA that signed etcd's certificates, PEM (default: the system's)."),
    _etcd("--cert", "", "The client certificate, PEM."),
    _etcd("--key", "", "The private key of the client certificate, PEM."),
    _etcd("--user", "", "The etcd user, as name[:password].", secret=True),
    _etcd("--password", "", "The etcd user's password; better given in the environment.", secret=True),
    _etcd(
        "--insecure-transport",
        "true",
        "Speak to endpoints that are given as host:port without TLS, if no certificate is given.",
        switch=True,
        negative="--no-insecure-transport",
    ),
    _etcd("--insecure-skip-tls-verify", "false", "Do not verify etcd's certificate (for tests only).", switch=True),
    _etcd("--dial-timeout", "2s", "How long one attempt to connect may take."),
    _etcd("--command-timeout", "5s", "How long one call may take, all attempts together."),
)  # fmt: skip


def etcd_flags() -> Iterator[Flag]:
    """etcd's flags, in the order of the help."""
    yield from _ETCD


def etcd_options(command: F) -> F:
    """Give a click command etcd's flags; it is called with `etcd`, an `etcd.Config`."""
    return with_flags(command, _ETCD, "etcd", lambda values: etcd_config(**values))


def refuse_variables(program: str, environment: Mapping[str, str] | None = None) -> None:
    """click.UsageError if the environment (None: this process's) has variables of etcdctl's that are not taken."""
    if sentence := refusal(os.environ if environment is None else environment, program):
        raise click.UsageError(sentence)


def unknown_variables() -> tuple[str, ...]:
    """The variables of this process that look like etcdctl's and are none."""
    return unknown(os.environ, {flag.env for flag in _ETCD})


def prefix_option(command: F) -> F:
    """Give a click command `--prefix`; it is called with `prefix`, checked. `kg` has it in its own table."""
    return with_flags(
        command, (PREFIX,), "prefix", lambda values: read("--prefix", lambda: parse_prefix(values["prefix"]))
    )


def etcd_config(
    *,
    endpoints: str = DEFAULT_ENDPOINTS,
    prefer_first_endpoint: bool = False,
    discovery_srv: str = "",
    discovery_srv_name: str = "",
    insecure_discovery: bool = False,
    cacert: str = "",
    cert: str = "",
    key: str = "",
    user: str = "",
    password: str = "",
    insecure_transport: bool = True,
    insecure_skip_tls_verify: bool = False,
    dial_timeout: str = "2s",
    command_timeout: str = "5s",
) -> Config:
    """How to reach etcd, from the flags' texts. click.BadParameter with one sentence where one is wrong."""
    discovery = _discovery(endpoints, discovery_srv.strip(), discovery_srv_name.strip(), insecure_discovery)
    if prefer_first_endpoint and discovery is not None:
        raise click.UsageError(
            "--prefer-first-endpoint (KILO_PREFER_FIRST_ENDPOINT) needs --endpoints: those that --discovery-srv "
            "(ETCDCTL_DISCOVERY_SRV) finds have no order; give one of the two."
        )
    urls = () if discovery is not None else _read("--endpoints", lambda: _endpoints(endpoints))
    for flag, path in (("--cacert", cacert), ("--cert", cert), ("--key", key)):
        _read(flag, functools.partial(_check_file, path))
    if bool(cert) != bool(key):
        given, missing = ("--cert", "--key") if cert else ("--key", "--cert")
        raise click.UsageError(f"{given} is given but {missing} is not; a client certificate needs both.")
    if not insecure_transport and (plain := next((url for url in urls if url.startswith("http://")), None)):
        raise click.UsageError(f"{plain} is without TLS, which --no-insecure-transport refuses; write https://.")
    if not insecure_transport and discovery is not None and discovery.insecure:
        raise click.UsageError(
            "--insecure-discovery takes endpoints without TLS; --no-insecure-transport refuses them."
        )
    tls_wanted = (
        cacert or cert or insecure_skip_tls_verify or not insecure_transport
        or any(url.startswith("https://") for url in urls)
    )  # fmt: skip
    call_timeout = _read("--command-timeout", lambda: _positive(command_timeout))
    name, secret = _user(user, password)
    return Config(
        endpoints=urls,
        prefer_first=prefer_first_endpoint,
        discovery=discovery,
        tls=Tls(ca=cacert or None, cert=cert or None, key=key or None, insecure_skip_verify=insecure_skip_tls_verify)
        if tls_wanted
        else None,
        user=name,
        password=secret,
        dial_timeout=_read("--dial-timeout", lambda: _positive(dial_timeout)),
        call_timeout=call_timeout,
        attempt_timeout=min(Config().attempt_timeout, call_timeout),
    )


def etcd_and_prefix(context: click.Context) -> tuple[Config, str]:
    """What `etcd_options` and `prefix_option` would call a command with, from a context that has parsed its flags only,
    as for shell completion. click.UsageError."""
    return etcd_config(**etcd_values(context)), parse_prefix(context.params[f"_prefix_{PREFIX.parameter}"])


def etcd_values(context: click.Context) -> dict[str, Any]:
    """What was given for etcd's flags, as `etcd_config` takes it, from the context of a command with `etcd_options`."""
    return _settled(context, "etcd", {flag.parameter: context.params[f"_etcd_{flag.parameter}"] for flag in _ETCD})


_GIVEN: dict[str, str | bool] = {"endpoints": DEFAULT_ENDPOINTS, "prefer_first_endpoint": False}
_DISCOVERY: dict[str, str | bool] = {"discovery_srv": "", "discovery_srv_name": "", "insecure_discovery": False}


def _settled(context: click.Context, argument: str, values: dict[str, Any]) -> dict[str, Any]:
    """`values`, without variables that say where etcd is in another way than a flag of the command line does."""

    def given(parameter: str, source: ParameterSource) -> bool:
        return context.get_parameter_source(f"_{argument}_{parameter}") is source

    for flag, others in (("endpoints", _DISCOVERY), ("discovery_srv", _GIVEN)):
        if given(flag, ParameterSource.COMMANDLINE):
            overridden = {name: default for name, default in others.items() if given(name, ParameterSource.ENVIRONMENT)}
            values = {**values, **overridden}
    return values


def with_flags(command: F, flags: tuple[Flag, ...], argument: str, build: Callable[[dict[str, Any]], Any]) -> F:
    """Give a click command these flags; it is called with `argument`, which `build` makes of the flags' values."""
    # Parameters travel under names of their own, so that a command may have an argument called `key` or `prefix`.
    own = {f"_{argument}_{flag.parameter}": flag.parameter for flag in flags}

    @functools.wraps(command)
    def folded(*args: Any, **kwargs: Any) -> Any:
        values = {parameter: kwargs.pop(passed) for passed, parameter in own.items()}
        kwargs[argument] = build(_settled(click.get_current_context(), argument, values))
        return command(*args, **kwargs)

    decorated: Any = folded
    for flag in reversed(flags):
        decorated = _option(flag, f"_{argument}_{flag.parameter}")(decorated)
    result: F = decorated
    return result


def _option(flag: Flag, passed_as: str) -> Callable[[Any], Any]:
    common: dict[str, Any] = {"envvar": flag.env, "show_envvar": True, "help": flag.help}
    if flag.switch:
        names = f"{flag.name}/{flag.negative}" if flag.negative else flag.name
        return click.option(names, passed_as, is_flag=True, default=flag.default == "true", **common)
    if flag.several:
        return click.option(flag.name, passed_as, multiple=True, **common)
    # The choices are not click's own: an environment's bad value gets the same one sentence as every other flag.
    if flag.choices:
        common["metavar"] = "|".join(flag.choices)
    shown = bool(flag.default) and not flag.secret
    return click.option(flag.name, passed_as, default=flag.default, show_default=shown, **common)


def _read(flag: str, parse: Callable[[], Any]) -> Any:
    return read(flag, parse, env=_variable(flag))


def _refuse(flag: str, reason: str) -> NoReturn:
    raise click.BadParameter(reason, param_hint=f"{flag} ({_variable(flag)})")


def _endpoints(text: str) -> tuple[str, ...]:
    urls = tuple(item.strip().rstrip("/") for item in text.split(",") if item.strip())
    if not urls:
        raise ValueError("no endpoint is given; write for instance 127.0.0.1:2379")
    write = "write host:port, http://host:port or https://host:port"
    if "@" in text:
        # Nothing of it is repeated: a password may have commas and slashes in it.
        raise ValueError(f"an etcd endpoint has no user and no password in it, which --user is for; {write}")
    for url in urls:
        try:
            parts = urlsplit(url if "://" in url else f"//{url}")
            sound = bool(parts.hostname) and parts.scheme in ("", "http", "https") and parts.port != 0
            sound = sound and not (parts.path or parts.query or parts.fragment)
        except ValueError:
            sound = False
        if not sound:
            raise ValueError(f"{url!r} is no etcd endpoint; {write}")
    return urls


def _discovery(endpoints: str, domain: str, service_name: str, insecure: bool) -> Discovery | None:
    """Where endpoints are discovered; None: they are given."""
    if not domain:
        if service_name:
            raise click.UsageError("--discovery-srv-name is given without --discovery-srv.")
        return None
    if endpoints != DEFAULT_ENDPOINTS:
        raise click.UsageError(
            "--endpoints (ETCDCTL_ENDPOINTS) and --discovery-srv (ETCDCTL_DISCOVERY_SRV) are both given; give one."
        )
    if len(domain) > 200 or not _DOMAIN.fullmatch(domain):
        _refuse("--discovery-srv", f"{_shown(domain)} is no domain; write for instance example.com")
    if service_name and not _LABEL.fullmatch(service_name):
        _refuse(
            "--discovery-srv-name", f"{_shown(service_name)} is no part of a name in DNS; write letters, digits and -"
        )
    return Discovery(domain=domain, service_name=service_name, insecure=insecure)


def _shown(text: str) -> str:
    """`text` in a sentence. Nothing of it is repeated if it may have a user and a password in it."""
    return "it" if "@" in text else repr(text)


def _check_file(path: str) -> None:
    if not path:
        return
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise ValueError(f"{shown_path(path)!r} cannot be read: {error.strerror}") from None


def _positive(text: str) -> float:
    seconds = parse_duration(text)
    if seconds <= 0:
        raise ValueError(f"{text!r} is no timeout; give more than 0s")
    return seconds


def _user(user: str, password: str) -> tuple[str | None, str | None]:
    """etcdctl's rule: with a password of its own the user is taken whole, else it is split at the first colon."""
    if not user:
        if password:
            raise click.UsageError("--password (ETCDCTL_PASSWORD) is given without --user (ETCDCTL_USER).")
        return None, None
    if password:
        return user, password
    name, colon, secret = user.partition(":")
    if not colon or not secret or not name:
        raise click.UsageError(
            "the etcd user has no password; give --user name:password or set ETCDCTL_PASSWORD in the environment."
        )
    return name, secret
