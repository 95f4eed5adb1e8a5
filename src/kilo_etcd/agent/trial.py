"""Trying the code that is installed now, before a reload replaces the agent that runs by it.

`try_installed` runs the agent's own command line with `trial` behind it, in a process of its own, and tells why that
does not succeed. `trial` is what that process does: it imports all that an agent may import, has read its settings, and
reads the key, the kernel and etcd as an agent does that starts, up to the plan. Nothing is changed anywhere.
"""

from __future__ import annotations

import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from importlib import import_module

import trio

import kilo_etcd
from kilo_etcd import kernel
from kilo_etcd.agent.config import AgentConfig
from kilo_etcd.etcd import api as etcd
from kilo_etcd.planning.plan import host_plan
from kilo_etcd.runtime import key_file
from kilo_etcd.store import operator
from kilo_etcd.store.keys import Keys
from kilo_etcd.topology.segments import UnknownNode, build_topology

COMMAND = "trial"
TRIAL_SECONDS = 30.0
"""An agent starts within a second; a machine may do other work, and etcd may take its time."""

ROOMS = ("agent", "base", "etcd", "kernel", "model", "planning", "runtime", "store", "topology")
"""Packages whose modules an agent may import; `kgctl` and the lab are not its concern."""

_PLACE = re.compile(r'File "(.+?)", line (\d+)')


async def trial(
    config: AgentConfig,
    setup: Callable[[AgentConfig, str], kernel.Setup],
    client: Callable[[AgentConfig], AbstractAsyncContextManager[etcd.Client]],
    *,
    etcd_answers: bool,
) -> None:
    """Do what an agent does at its start, without a change. Raises whatever fails; EtcdError only if `etcd_answers`:
    else etcd is no test."""
    for room in ROOMS:
        package = import_module(f"{kilo_etcd.__name__}.{room}")
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            import_module(module.name)
    private = key_file.peek(config.state_dir) or key_file.generate()
    async with client(config) as connected, kernel.open_kernel(setup(config, private)) as device:
        await device.observe()
        try:
            snapshot, _ = await operator.snapshot(connected, Keys(config.prefix))
        except etcd.EtcdError:
            if etcd_answers:
                raise
            return
        try:
            plan = host_plan(build_topology(snapshot), config.hostname)
        except UnknownNode:
            return
        await device.preview(plan)


async def try_installed(*, etcd_answers: bool) -> str | None:
    """Why the installed code does not run with this process's command line, as a clause; None: it does."""
    command = [sys.executable, *sys.orig_argv[1:], COMMAND, *(["--etcd-answers"] if etcd_answers else [])]
    # systemd must not take the trial's messages for the agent's.
    environment = {name: value for name, value in os.environ.items() if name not in ("NOTIFY_SOCKET", "WATCHDOG_USEC")}
    try:
        with trio.move_on_after(TRIAL_SECONDS):
            done = await trio.run_process(
                command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, capture_stderr=True, check=False,
                env=environment,
            )  # fmt: skip
            return None if done.returncode == 0 else reason(done.stderr.decode(errors="replace"), done.returncode)
    except OSError as error:
        return f"{sys.executable} cannot be run: {error.strerror}"
    return f"it has not come to an end within {TRIAL_SECONDS:g} s"


def reason(errors: str, status: int) -> str:
    """What `errors`, the standard error of a process that has failed, says in the end, in one line; with the place if
    that is a traceback."""
    lines = errors.strip().splitlines()
    if not lines:
        return f"it ended with exit status {status} and without a word"
    message = re.sub(r"^(kg|Error): ", "", lines[-1].strip())
    places = _PLACE.findall(errors)
    return f"{message} ({places[-1][0]}, line {places[-1][1]})" if places else message
