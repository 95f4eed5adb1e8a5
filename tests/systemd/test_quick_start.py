"""The README's quick start, line by line, on three hosts with systemd as process 1."""

from __future__ import annotations

import json
import re
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from helpers import require
from helpers_nspawn import Host, hosts, wait

pytestmark = [pytest.mark.root, pytest.mark.etcd, pytest.mark.lab, pytest.mark.beside]

ROOT = Path(__file__).resolve().parents[2]
STEPS = ("install", "etcd", "hand out", "start", "look")


def blocks() -> dict[str, str]:
    """The shell blocks of the quick start, by step."""
    section = (ROOT / "README.md").read_text().partition("## Quick start: three real hosts")[2].partition("\n## ")[0]
    found = re.findall(r"^```sh\n(.*?)^```", section, re.MULTILINE | re.DOTALL)
    return dict(zip(STEPS, found, strict=True))


def install(host: Host, lines: str) -> None:
    """Nothing can be fetched: apt has all of it, and what pip would fetch comes from the environment of the tests."""
    script = (
        "import sys; from pathlib import Path; sys.path.insert(0, 'tests'); "
        "from helpers_packages import copy_requirements; copy_requirements(Path(sys.argv[1]))"
    )
    site, python = "/opt/kilo-etcd/lib/python3.*/site-packages", shlex.quote(sys.executable)
    offline = (
        "mkdir -p /var/tmp/source && cp -r pyproject.toml README.md LICENSE src systemd /var/tmp/source && "
        f'{python} -c "{script}" $(echo {site}) && '
        f"echo $({python} -c 'import sysconfig; print(sysconfig.get_paths()[\"purelib\"])') > "
        f"$(echo {site})/tests.pth && /opt/kilo-etcd/bin/pip install --no-index --no-deps --no-build-isolation "
        f"--disable-pip-version-check -q /var/tmp/source && rm $(echo {site})/tests.pth"
    )
    lines = lines.replace("python3 -m venv", f"{python} -m venv")
    assert "/opt/kilo-etcd/bin/pip install .\n" in lines
    host.run(lines.replace("/opt/kilo-etcd/bin/pip install .\n", f"{offline}\n"), cwd=str(ROOT))


@pytest.mark.deadline(600)
def test_three_hosts_by_the_readmes_own_lines(tmp_path: Path) -> None:
    require("etcd", "etcdctl", "wireguard-go", "wg", "openssl")
    scratch = tmp_path / "hosts"
    scratch.mkdir()
    steps = blocks()
    seen = {ROOT, Path(sys.prefix), Path(sys.base_prefix)}
    with hosts(("node-1", "node-2", "node-3"), scratch, seen) as every, ThreadPoolExecutor(3) as pool:
        first = every[0]
        list(pool.map(lambda host: install(host, steps["install"]), every))
        first.run(steps["etcd"])
        hand_out(first, every, steps["hand out"])
        list(pool.map(lambda host: host.run(steps["start"]), every))

        def rows() -> list[dict[str, object]]:
            done = first.run("kgctl status -o json", check=False)
            return list(json.loads(done.stdout)["nodes"]) if done.returncode == 0 else []

        wait(lambda: [row["alive"] for row in rows()] == [True] * 3, 120, lambda: first.run("kgctl status").stdout)
        wait(lambda: first.run("kgctl check", check=False).returncode == 0, 60, lambda: first.run("kgctl check").stdout)
        for line in steps["look"].splitlines():
            said = first.run(line).stdout
        assert "and packets arrive" in said
        addresses = [str(row["meshAddresses"][0]) for row in rows()]  # type: ignore[index]
        for host in every:
            for address in addresses:
                host.run(f"ping -c 1 -w 30 {address}")
        assert {row["location"] for row in rows()} == {f"site-of-{host.name}" for host in every}


def hand_out(first: Host, every: tuple[Host, ...], lines: str) -> None:
    """`scp` reaches no other host here: a program of that name writes down what it was asked for."""
    first.run("printf '#!/bin/sh\\necho \"$@\" >> /root/scp.log\\n' > /usr/local/bin/scp; chmod 755 /usr/local/bin/scp")
    first.run(lines, cwd="/root/mesh-tls")
    asked = [line.split() for line in (first.root / "root/scp.log").read_text().splitlines()]
    targets = {f"root@{host.address}:/etc/kilo-etcd/": host for host in every[1:]}
    assert {words[-1] for words in asked} == targets.keys()
    for *files, target in asked:
        for file in files:
            content = (first.root / "root/mesh-tls" / file).read_bytes()
            copy = targets[target].root / "etc/kilo-etcd" / file
            copy.write_bytes(content)
            copy.chmod(0o600)
