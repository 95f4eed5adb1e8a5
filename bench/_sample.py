"""Run inside a host of the lab: what its agent costs over so many seconds, as one JSON object on standard output.

    python bench/_sample.py 60

CPU time comes in clock ticks (10 ms), which is 0.02 % of a minute. Route, link, address and rule events are counted by
`ip monitor`, so that the kernel confirms what the agent says of itself.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

PROC = Path("/proc")


def find(program: str) -> int | None:
    """The pid of the process that runs `program` (its own name, or the script that an interpreter runs)."""
    for entry in PROC.iterdir():
        with suppress(OSError, ValueError):
            words = (entry / "cmdline").read_bytes().split(b"\0")[:2]
            if program in {os.path.basename(word.decode()) for word in words}:
                return int(entry.name)
    return None


def cpu(pid: int) -> float:
    """Seconds on a core, all threads, those that have ended too."""
    fields = (PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory(pid: int) -> dict[str, float]:
    """Rss, Pss and what is private, in MiB."""
    text = (PROC / str(pid) / "smaps_rollup").read_text()
    kib = {name: int(value) for name, value in re.findall(r"^(\w+):\s+(\d+) kB", text, re.MULTILINE)}
    private = kib["Private_Clean"] + kib["Private_Dirty"]
    return {"rss": kib["Rss"] / 1024, "pss": kib["Pss"] / 1024, "private": private / 1024}


def metrics() -> dict[str, float]:
    """The agent's own counters."""
    with urllib.request.urlopen("http://127.0.0.1:1107/metrics", timeout=5) as answer:
        text = answer.read().decode()
    return {name: float(value) for name, value in re.findall(r"^(kilo_\w+) (\S+)$", text, re.MULTILINE)}


def main() -> None:
    seconds = float(sys.argv[1])
    agent, device = find("kg"), find("wireguard-go")
    assert agent is not None, "no agent runs here"
    counted = metrics()
    with subprocess.Popen(["ip", "monitor", "link", "address", "route", "rule"], stdout=subprocess.PIPE) as monitor:
        began, spent = time.monotonic(), cpu(agent)
        device_spent = cpu(device) if device else 0.0
        time.sleep(seconds)
        spent, took = cpu(agent) - spent, time.monotonic() - began
        device_spent = cpu(device) - device_spent if device else 0.0
        monitor.terminate()
        assert monitor.stdout is not None
        events = len(monitor.stdout.read().splitlines())
    now = metrics()
    print(
        json.dumps(
            {
                **memory(agent),
                "seconds": took,
                "cpu": spent,
                "threads": len(list((PROC / str(agent) / "task").iterdir())),
                "device_rss": memory(device)["rss"] if device else 0.0,
                "device_cpu": device_spent,
                "kernel_events": events,
                "netlink_writes": now["kilo_netlink_writes_total"] - counted["kilo_netlink_writes_total"],
                "nodes": now["kilo_nodes"],
                "problems": now["kilo_problems"],
            }
        )
    )


if __name__ == "__main__":
    main()
