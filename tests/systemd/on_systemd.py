"""The service as README installs it, under systemd as process 1. Run by `test_systemd_guest.py`, in a guest.

The tests are one story and run in the order in which they stand here: each finds the host as the one before left it.
What the guest cannot do, having no network but loopback, is fetch packages: `pip install` takes what it needs from the
environment that runs the tests.
"""

from __future__ import annotations

import base64
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_interface
from pathlib import Path
from typing import Any

import pytest

from helpers_packages import copy_requirements
from kilo_etcd.model import Endpoint
from kilo_etcd.store.keys import Keys
from kilo_etcd.store.records import NodeRecord, encode

ROOT = Path(__file__).resolve().parents[2]
ENVIRONMENT = Path("/etc/kilo-etcd/kilo-etcd.env")
UNIT = Path("/etc/systemd/system/kilo-etcd.service")
SCORE = 2.8
"""What docs/systemd.md says of `systemd-analyze security`; 0 is best, 10 is worst."""


def run(command: str, *, check: bool = True, **more: Any) -> subprocess.CompletedProcess[str]:
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command, shell=True, capture_output=True, text=True, check=False, **more
    )
    if check:
        assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
    return done


def shown(*names: str) -> dict[str, str]:
    """Properties of the unit."""
    lines = run(f"systemctl show kilo-etcd {' '.join('-p ' + name for name in names)}").stdout.splitlines()
    return dict(line.split("=", 1) for line in lines)


def started() -> float:
    """When the service's process was started, in seconds since some time."""
    return int(shown("ExecMainStartTimestampMonotonic")["ExecMainStartTimestampMonotonic"]) / 1e6


def main_pid() -> int:
    return int(shown("MainPID")["MainPID"])


def journal(*, fields: str = "") -> str:
    return run(f"journalctl -u kilo-etcd {fields} --no-pager -o cat").stdout


def wait(condition: Callable[[], object], seconds: float, what: str) -> None:
    """Until it holds. (`eventually` is for trio; here is none.)"""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            pytest.fail(
                f"waited {seconds} s for {what}\n{run('systemctl status kilo-etcd', check=False).stdout}{journal()}"
            )
        time.sleep(0.1)


def active() -> bool:
    return shown("ActiveState", "SubState") == {"ActiveState": "active", "SubState": "running"}


def joined() -> bool:
    """Whether the service is active, and its agent has applied a revision."""
    return active() and "revision" in shown("StatusText")["StatusText"]


def interface() -> dict[str, object]:
    """kilo0: its index, addresses and peers; what has to survive whatever happens to the agent."""
    link = json.loads(run("ip -j address show kilo0").stdout)[0]
    return {
        "index": link["ifindex"],
        "addresses": [a["local"] for a in link["addr_info"]],
        "key": run("wg show kilo0 public-key").stdout,
        "peers": sorted(run("wg show kilo0 allowed-ips").stdout.splitlines()),
        "routes": sorted(run("ip route show proto 107").stdout.splitlines()),
    }


def etcdctl(*arguments: str) -> str:
    done = subprocess.run(
        ["etcdctl", *arguments], capture_output=True, text=True, check=True, env={**os.environ, "ETCDCTL_API": "3"}
    )  # fmt: skip
    return done.stdout


def settings(**variables: str) -> None:
    """Set variables in the installed environment file, as an operator would: in place of their commented lines."""
    text = ENVIRONMENT.read_text()
    for name, value in variables.items():
        text, count = re.subn(rf"^#?{name}=.*$", f"{name}={value}", text, flags=re.MULTILINE)
        assert count == 1, f"{name} is not in the environment file"
    ENVIRONMENT.write_text(text)


@pytest.fixture(scope="module", autouse=True)
def host() -> None:
    """A host with nothing of ours on it."""
    assert Path("/proc/1/comm").read_text().strip() == "systemd"
    assert not UNIT.exists()


def readme(marker: str) -> list[str]:
    """The lines of the README's shell block that has `marker` in it."""
    blocks = re.findall(r"^```sh\n(.*?)^```", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    (block,) = (block for block in blocks if marker in block)
    return [line.split("   #")[0].rstrip() for line in block.splitlines()]


@contextmanager
def borrowed_packages() -> Iterator[None]:
    """In the block pip finds what builds the package; after it, what the package requires is there for good.

    It is copied, since the service does not see what lies in /tmp, where this checkout may be.
    """
    asked = run("/opt/kilo-etcd/bin/python -c 'import sysconfig; print(sysconfig.get_paths()[\"purelib\"])'")
    site, ours = Path(asked.stdout.strip()), Path(sysconfig.get_paths()["purelib"])
    (site / "tests.pth").write_text(f"{ours}\n")
    yield
    (site / "tests.pth").unlink()
    copy_requirements(site)


def test_it_installs_by_the_readmes_own_lines() -> None:
    for line in readme("python3 -m venv /opt/kilo-etcd"):
        if line.startswith("apt-get "):
            continue
        if line == "/opt/kilo-etcd/bin/pip install .":
            source = Path("/var/tmp/kilo-etcd")
            run(f"mkdir {source} && cp -r pyproject.toml README.md LICENSE src systemd {source}", cwd=ROOT)
            with borrowed_packages():
                run(f"{line} --no-index --no-deps --no-build-isolation --disable-pip-version-check", cwd=source)
            continue
        run(line.replace("python3 -m venv", f"{shlex.quote(sys.executable)} -m venv"), cwd=ROOT)
    assert run("kg --version").stdout.startswith("kg")
    assert Path("/usr/local/bin/kgctl").resolve().parent == Path("/opt/kilo-etcd/bin")
    assert ENVIRONMENT.stat().st_mode & 0o777 == 0o600
    run("systemctl daemon-reload")
    verified = run("systemd-analyze verify kilo-etcd.service")
    assert "kilo-etcd" not in verified.stdout + verified.stderr


def test_a_wrong_setting_is_said_once_and_not_tried_again() -> None:
    settings(KILO_PORT="70000")
    run("systemctl start kilo-etcd", check=False)
    wait(lambda: shown("ActiveState")["ActiveState"] == "failed", 60, "the refusal")
    state = shown("ExecMainStatus", "NRestarts", "Result")
    assert state == {"ExecMainStatus": "2", "NRestarts": "0", "Result": "exit-code"}
    said = journal()
    assert "KILO_PORT" in said
    assert "Traceback" not in said
    settings(KILO_PORT="51820")
    run("systemctl reset-failed kilo-etcd")


def test_it_waits_for_the_network_and_for_etcd() -> None:
    """A boot in which both come late: systemd has started the service, which is not ready before it can be."""
    settings(KILO_LOCATION="gcp", KILO_HOSTNAME="node-1", KILO_LEASE_TTL="15s")  # a guest may be slow
    after = shown("After", "Wants")
    assert {"network-online.target", "nftables.service", "etcd.service"} <= set(after["After"].split())
    assert "network-online.target" in after["Wants"]
    run("systemctl start kilo-etcd")
    assert active(), "nothing waits for etcd"
    wait(lambda: "etcd" in shown("StatusText")["StatusText"], 60, "a status line about etcd")
    pid = main_pid()

    run("ip link add eth0 type dummy && ip address add 10.9.0.7/24 dev eth0 && ip address add 198.51.100.7/24 dev eth0")
    run("ip link set eth0 up && ip route add default via 198.51.100.1")
    run("systemd-run --unit kilo-test-etcd --property KillMode=control-group etcd --data-dir /var/lib/kilo-test-etcd")
    wait(joined, 60, "a status line about the mesh")
    assert main_pid() == pid  # it has waited, not failed and come again
    assert shown("NRestarts")["NRestarts"] == "0"
    assert " wireguard " in run("ip -d link show kilo0").stdout

    def registered() -> dict[str, object]:
        return dict(json.loads(etcdctl("get", "--print-value-only", "/kilo/by/node-1/node")))

    wait(lambda: "endpoint" in registered(), 60, "the addresses that came late")
    node = registered()
    assert node["endpoint"] == "198.51.100.7:51820"
    assert node["internalIPs"] == ["10.9.0.7/24"]


def test_the_process_may_do_no_more_than_it_has_to() -> None:
    status = Path(f"/proc/{main_pid()}/status").read_text()
    net_admin = 1 << 12
    for name in ("CapEff", "CapPrm", "CapBnd", "CapAmb"):
        value = re.search(rf"^{name}:\s+([0-9a-f]+)$", status, re.MULTILINE)
        assert value is not None
        assert int(value[1], 16) == net_admin, name
    assert re.search(r"^NoNewPrivs:\s+1$", status, re.MULTILINE)
    assert re.search(r"^Seccomp:\s+2$", status, re.MULTILINE)
    answer = run("systemd-analyze security --no-pager kilo-etcd").stdout
    score = re.search(r"exposure level for kilo-etcd\.service: ([0-9.]+)", answer)
    assert score is not None
    assert float(score[1]) <= SCORE
    assert f"score of {SCORE}" in (ROOT / "docs" / "systemd.md").read_text()
    state = Path("/var/lib/kilo-etcd")
    assert state.stat().st_mode & 0o777 == 0o700
    assert (state / "key").stat().st_mode & 0o777 == 0o600


def test_the_status_line_shows_the_role() -> None:
    wait(lambda: "gcp" in shown("StatusText")["StatusText"], 60, "the location in the status line")
    keys = Keys()
    record = NodeRecord(
        public_key=base64.b64encode(bytes([7]) * 32).decode(),
        endpoint=Endpoint.parse("198.51.100.8:51820"),
        internal_ips=(ip_interface("10.9.0.8/24"),),
        location="gcp",
    )
    etcdctl("put", "/kilo/by/node-2/addresses/10.4.0.8", "")
    etcdctl("put", keys.node("node-2"), encode(record).decode())
    wait(lambda: "leader" in shown("StatusText")["StatusText"], 60, "the role in the status line")
    printed = run("systemctl status --no-pager kilo-etcd").stdout
    assert re.search(r'Status: ".*leader.*gcp.*2 nodes', printed), printed


def test_the_journal_has_fields() -> None:
    lines = run("journalctl -u kilo-etcd KILO_LOCATION=gcp --no-pager -o json").stdout.splitlines()
    found = [json.loads(line) for line in lines]
    assert found
    assert {entry["KILO_LOCATION"] for entry in found} == {"gcp"}
    assert {entry["SYSLOG_IDENTIFIER"] for entry in found} == {"kg"}
    assert all(entry["_SYSTEMD_UNIT"] == "kilo-etcd.service" for entry in found)
    assert any("KILO_REVISION" in entry for entry in found)
    assert {entry["PRIORITY"] for entry in found} <= {"3", "4", "5", "6", "7"}


def test_it_may_run_iptables_for_forward_rules() -> None:
    run("iptables -P FORWARD DROP")
    for wanted in ("true", "false"):
        settings(KILO_FORWARD_RULES=wanted)
        run("systemctl restart kilo-etcd")
        wait(active, 60, "an active service")
        wait(lambda: ("kilo-etcd:kilo0" in run("iptables -S").stdout) is (wanted == "true"), 60, f"rules: {wanted}")  # noqa: B023
    assert "--forward-rules" not in journal()


def test_it_writes_names_when_told_to_and_says_when_it_cannot() -> None:
    hosts = Path("/etc/hosts")
    before = hosts.read_text() if hosts.exists() else ""
    settings(KILO_DNS_HOSTS="true")
    run("systemctl restart kilo-etcd")
    wait(lambda: "node-2.mesh node-2\n" in hosts.read_text(), 60, "names in the hosts file")
    assert "10.4.0.8" in run("getent hosts node-2.mesh").stdout
    run("sed -i s/node-2.mesh/node-9.mesh/ /etc/hosts")
    wait(lambda: "systemctl restart kilo-etcd makes good" in journal(), 60, "a sentence on the replaced file")
    run("systemctl restart kilo-etcd")
    wait(lambda: "node-2.mesh node-2\n" in hosts.read_text(), 60, "the names again")
    settings(KILO_DNS_HOSTS="false")
    run("systemctl restart kilo-etcd")
    wait(lambda: "kilo-etcd" not in hosts.read_text(), 60, "the block's end")
    assert hosts.read_text() == before


def test_a_restart_changes_nothing_in_the_kernel() -> None:
    before, pid = interface(), main_pid()
    run("systemctl restart kilo-etcd")
    assert main_pid() != pid
    wait(joined, 60, "an agent that has joined again")
    assert interface() == before


def test_a_reload_runs_the_code_anew_in_the_same_process() -> None:
    before, pid = interface(), main_pid()
    key = etcdctl("get", "--prefix", "/kilo/by/node-1/elections/")
    seen = journal().count("starting")
    run("systemctl reload kilo-etcd")
    wait(lambda: active() and journal().count("starting") > seen, 60, "the agent's second beginning")
    wait(joined, 60, "an agent that has joined again")
    assert main_pid() == pid
    assert shown("NRestarts")["NRestarts"] == "0"
    assert interface() == before
    assert etcdctl("get", "--prefix", "/kilo/by/node-1/elections/") == key


@contextmanager
def broken() -> Iterator[None]:
    """The installed code is no Python while in the block."""
    (daemon,) = Path("/opt/kilo-etcd/lib").glob("python3.*/site-packages/kilo_etcd/agent/daemon.py")
    sound = daemon.read_text()
    daemon.write_text(f"this is no python\n{sound}")
    try:
        yield
    finally:
        daemon.write_text(sound)


def test_a_reload_of_code_that_does_not_run_leaves_the_agent_as_it_is() -> None:
    before, pid = interface(), main_pid()
    seen = journal().count("starting")
    with broken():
        run("systemctl reload kilo-etcd")
        refused = "the agent goes on with the old one: the installed code cannot be loaded: SyntaxError"
        wait(lambda: refused in journal(), 60, "the outcome of the trial")
    assert (main_pid(), interface()) == (pid, before)
    assert active()
    assert shown("NRestarts")["NRestarts"] == "0"
    assert journal().count("starting") == seen
    run("systemctl reload kilo-etcd")
    wait(lambda: active() and journal().count("starting") > seen, 60, "the agent's second beginning")
    wait(joined, 60, "an agent that has joined again")
    assert (main_pid(), interface()) == (pid, before)


def test_a_crashed_agent_is_started_again_and_adopts_what_it_finds() -> None:
    before, pid = interface(), main_pid()
    key = etcdctl("get", "--keys-only", "--prefix", "/kilo/by/node-1/elections/")
    os.kill(pid, signal.SIGKILL)
    wait(lambda: main_pid() not in (0, pid) and joined(), 60, "a new process")
    assert shown("NRestarts")["NRestarts"] == "1"
    assert interface() == before
    assert etcdctl("get", "--keys-only", "--prefix", "/kilo/by/node-1/elections/") == key


def test_an_agent_that_hangs_is_restarted_and_one_whose_etcd_hangs_is_not() -> None:
    seconds = 8
    Path("/etc/systemd/system/kilo-etcd.service.d").mkdir()
    Path("/etc/systemd/system/kilo-etcd.service.d/test.conf").write_text(f"[Service]\nWatchdogSec={seconds}\n")
    run("systemctl daemon-reload && systemctl restart kilo-etcd")
    wait(joined, 60, "an agent that has joined again")
    before, pid = interface(), main_pid()

    etcd = int(run("systemctl show -P MainPID kilo-test-etcd").stdout)
    os.kill(etcd, signal.SIGSTOP)
    stopped = time.monotonic()
    wait(lambda: time.monotonic() > stopped + 2.5 * seconds or main_pid() != pid, 4 * seconds, "two watchdog periods")
    assert main_pid() == pid
    os.kill(etcd, signal.SIGCONT)
    wait(active, 60, "an active service")

    os.kill(pid, signal.SIGSTOP)
    wait(lambda: main_pid() not in (0, pid) and joined(), 4 * seconds + 60, "the watchdog")
    assert "kilo-etcd.service: Watchdog timeout" in run("dmesg").stdout  # where systemd logs to in the guest
    assert interface() == before


def test_stopping_leaves_the_kernel_as_it_is() -> None:
    before = interface()
    run("systemctl stop kilo-etcd")
    assert shown("ActiveState", "Result") == {"ActiveState": "inactive", "Result": "success"}
    assert interface() == before
    assert (
        etcdctl("get", "--keys-only", "--prefix", "/kilo/by/node-1/elections/") == ""
    )  # it has given its candidacy up
    assert "/kilo/by/node-1/node" in etcdctl("get", "--keys-only", "--prefix", "/kilo/by/")  # and is a member


def test_a_key_that_is_none_is_said_once_and_kept() -> None:
    key = Path("/var/lib/kilo-etcd/key")
    good = key.read_text()
    key.write_text("no key at all\n")
    assert run("systemctl start kilo-etcd", check=False).returncode != 0
    wait(lambda: shown("ActiveState")["ActiveState"] == "failed", 60, "the refusal")
    assert shown("ExecMainStatus", "NRestarts") == {"ExecMainStatus": "2", "NRestarts": "0"}
    assert key.read_text() == "no key at all\n"
    assert "/var/lib/kilo-etcd/key holds no WireGuard private key" in journal()
    assert "Traceback" not in journal()
    key.write_text(good)


def test_what_the_operator_has_to_mend_is_in_the_status_line_and_tried_again_now_and_then() -> None:
    before = interface()
    run("ip link del kilo0 && ip link add kilo0 type dummy")
    run("systemctl start --no-block kilo-etcd")
    wait(lambda: "is taken by" in shown("StatusText")["StatusText"], 60, "a status line about the interface's name")
    first = started()
    wait(lambda: started() > first, 60, "the second attempt")
    assert started() - first >= 10
    run("ip link del kilo0")
    wait(joined, 60, "the service, which comes by itself when the name is free")
    assert {**interface(), "index": before["index"]} == before
    run("systemctl stop kilo-etcd")


def test_code_that_cannot_be_loaded_is_tried_again_now_and_then() -> None:
    with broken():
        run("systemctl start --no-block kilo-etcd")
        wait(lambda: "cannot be loaded" in shown("StatusText")["StatusText"], 60, "a status line about the code")
        first = started()
        wait(lambda: started() > first, 60, "the second attempt")
        assert started() - first >= 10
    wait(joined, 60, "the service, which comes by itself when the code is sound")
    run("systemctl stop kilo-etcd")


def test_it_leaves_by_the_docs_own_lines() -> None:
    text = (ROOT / "docs" / "systemd.md").read_text()
    (block,) = re.findall(r"^```sh\n(systemctl disable.*?)^```", text, re.MULTILINE | re.DOTALL)
    for line in block.splitlines():
        run(line.split("   #")[0])
    assert "kilo" not in run("ip -br link").stdout
    assert run("ip route show proto 107").stdout == ""
    assert etcdctl("get", "--keys-only", "--prefix", "/kilo/by/node-1/node") == ""
    for path in (
        UNIT,
        ENVIRONMENT,
        "/opt/kilo-etcd",
        "/var/lib/kilo-etcd",
        "/run/kilo-etcd",
        "/usr/local/bin/kg",
        "/usr/local/bin/kgctl",
    ):
        assert not Path(path).exists(), path
    assert run("systemctl status kilo-etcd", check=False).returncode == 4  # no such unit
