"""The package of `make deb` and the archive beside it, from the installation to the purge, on hosts with systemd."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import kilo_etcd
from helpers import require
from helpers_nspawn import Host, hosts, wait

pytestmark = [pytest.mark.root, pytest.mark.etcd, pytest.mark.lab, pytest.mark.beside, pytest.mark.deadline(600)]

ROOT = Path(__file__).resolve().parents[2]
UNIT = "usr/lib/systemd/system/kilo-etcd.service"
ENVIRONMENT = "/etc/kilo-etcd/kilo-etcd.env"
ETCD = "http://203.0.113.1:23790"
"""Not etcd's own port, which that of Debian's package may have on the host."""
APT = (
    "DEBIAN_FRONTEND=noninteractive apt-get -q -y -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts=/dev/null"
)
"""Nothing can be fetched, so that apt need not read lists of packages."""


def run(*command: str | Path) -> str:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL)
    if done.returncode:
        pytest.fail(f"{command[0]} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The package and the archive."""
    directory = tmp_path_factory.mktemp("built")
    run("scripts/package", directory)
    (package,), (archive,) = directory.glob("*.deb"), directory.glob("*.tar.gz")
    return package, archive


def next_version(package: Path, version: str, *, unit: tuple[str, str] | None = None) -> Path:
    """The same package with another version of the agent, and with something in its unit replaced."""
    tree = package.with_suffix(f".{version}")
    run("dpkg-deb", "--raw-extract", package, tree)
    (source,) = tree.glob("opt/kilo-etcd/lib/python3.*/site-packages/kilo_etcd/__init__.py")
    (bytecode,) = (source.parent / "__pycache__").glob("__init__.*.pyc")
    bytecode.unlink()
    for file, old, new in (
        (tree / "DEBIAN/control", f"Version: {kilo_etcd.__version__}\n", f"Version: {version}\n"),
        (source, f'"{kilo_etcd.__version__}"', f'"{version}"'),
        *([(tree / UNIT, *unit)] if unit else ()),
    ):
        text = file.read_text()
        assert text.count(old) == 1
        file.write_text(text.replace(old, new))
    result = package.with_name(f"kilo-etcd_{version}_{package.stem.rpartition('_')[2]}.deb")
    run("dpkg-deb", "--root-owner-group", "-Znone", "--build", tree, result)
    return result


def test_it_names_no_file_of_the_machine_that_built_it(built: tuple[Path, Path], tmp_path: Path) -> None:
    package, archive = built
    run("dpkg-deb", "--raw-extract", package, tmp_path / "package")
    (tmp_path / "archive").mkdir()
    run("tar", "-C", tmp_path / "archive", "-xf", archive)
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    assert len(files) > 1000
    needles = [str(path).encode() for path in (ROOT, package.parent, ROOT / "build")]
    assert [str(path) for path in files if any(needle in path.read_bytes() for needle in needles)] == []


def test_it_holds_the_locked_packages_and_the_bytecode_of_all(built: tuple[Path, Path], tmp_path: Path) -> None:
    run("dpkg-deb", "--raw-extract", built[0], tmp_path / "package")
    (site,) = (tmp_path / "package/opt/kilo-etcd/lib").glob("python3.*/site-packages")
    pinned = set(re.findall(r"^([\w.-]+==[^\s;]+)", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    held = {path.name.removesuffix(".dist-info").replace("-", "==") for path in site.glob("*.dist-info")}
    ours = f"kilo_etcd=={kilo_etcd.__version__}"
    assert {name.replace("_", "-").lower() for name in held - {ours}} <= {name.lower() for name in pinned}
    assert {ours, *(name for name in pinned if name.partition("==")[0] in ("trio", "h2", "idna"))} <= held
    assert not {name for name in held if name.startswith(("pytest", "ruff", "mypy", "hatchling"))}
    sources = {path for path in site.rglob("*.py") if "/kilo_etcd/" in str(path)}
    compiled = {path for path in site.rglob("*.pyc") if "/kilo_etcd/" in str(path)}
    assert len(sources) == len(compiled) > 100


# --- on hosts --------------------------------------------------------------------------------------------------------


def left(host: Host) -> set[str]:
    """All that has a name of ours, but for what is on this machine, which the host sees as well."""
    found = host.run(
        "find /etc /opt /root /run /usr /var -xdev \\( -path /var/tmp -o -path /var/cache -o -path /run/systemd \\) "
        "-prune -o \\( -name '*kilo*' -o -name 'kg' -o -name 'kg.*' -o -name '*kgctl*' \\) -print"
    ).stdout
    return {path for path in found.splitlines() if not Path(path).exists()}


def service(host: Host, *names: str) -> dict[str, str]:
    lines = host.run(f"systemctl show kilo-etcd {' '.join('-p ' + name for name in names)}").stdout.splitlines()
    return dict(line.split("=", 1) for line in lines)


def configure(host: Host) -> None:
    host.run(
        f"sed -i 's/^KILO_LOCATION=.*/KILO_LOCATION=site-of-{host.name}/' {ENVIRONMENT}\n"
        f"echo ETCDCTL_ENDPOINTS={ETCD} >> {ENVIRONMENT}\nsystemctl enable --now kilo-etcd"
    )


def keys(host: Host, prefix: str) -> str:
    return host.run(f"ETCDCTL_API=3 etcdctl --endpoints {ETCD} get --prefix --keys-only {prefix}").stdout


def status(host: Host, name: str) -> dict[str, str]:
    """What the agent of node `name` says of itself in etcd, among it its `version`."""
    command = f"ETCDCTL_API=3 etcdctl --endpoints {ETCD} get --print-value-only /kilo-status/by/{name}/status"
    text = host.run(command, check=False).stdout
    return dict(json.loads(text)) if text else {}


def wait_for_version(one: Host, two: Host, version: str) -> dict[str, str]:
    """What the agent of node-1 says of itself as soon as it is of that version, as node-2 sees it."""
    seen: list[dict[str, str]] = []

    def is_there() -> bool:
        seen.append(status(two, "node-1"))
        # The first record of a session does not say yet since when the agent runs.
        return seen[-1].get("version") == version and "since" in seen[-1]

    wait(is_there, 60, lambda: one.run("systemctl status kilo-etcd; journalctl -u kilo-etcd", check=False).stdout)
    return seen[-1]


def mesh_address(host: Host, name: str) -> str:
    nodes = json.loads(host.run("kgctl status -o json").stdout)["nodes"]
    (address,) = (node["meshAddresses"][0] for node in nodes if node["name"] == name)
    return str(address)


@contextmanager
def none_lost(host: Host, address: str) -> Iterator[None]:
    """Pings to `address`, 100 a second, before, during and after the block; no answer may be missing."""
    unit = f"pings-{time.monotonic_ns()}"  # systemd knows a unit that has ended for a while
    host.run(f"systemd-run --quiet --unit {unit} -p StandardOutput=file:/run/pings ping -n -i 0.01 {address}")
    output = host.root / "run/pings"

    def answered() -> set[int]:
        return set(map(int, re.findall(r"icmp_seq=(\d+) ttl", output.read_text())))

    def more(than: int) -> None:
        wait(lambda: len(answered()) > than + 100, 60, output.read_text)

    try:
        wait(output.exists, 30, lambda: "no pings")
        more(0)
        yield
        more(len(answered()))
    finally:
        host.run(f"systemctl stop {unit}", check=False)
    received = answered()
    # The last one may be on its way yet.
    assert set(range(1, max(received) + 1)) - received == set()
    output.unlink()


def nothing_in_the_kernel(host: Host) -> None:
    assert "kilo" not in host.run("ip -br link; nft list tables").stdout
    assert host.run("ip route show table all proto 107; ip -6 route show table all proto 107").stdout == ""
    assert host.run("pgrep -x 'kg|wireguard-go'", check=False).stdout == ""


def test_from_the_installation_to_the_purge(built: tuple[Path, Path], tmp_path: Path) -> None:
    require("etcd", "etcdctl", "wireguard-go", "wg", "nft", "ping", "pgrep", "strace")
    package, archive = built
    version = kilo_etcd.__version__
    second = next_version(package, f"{version}+second")
    third = next_version(package, f"{version}+third", unit=("RestartSec=1\n", "RestartSec=2\n"))
    scratch = tmp_path / "hosts"
    scratch.mkdir()
    with hosts(("node-1", "node-2"), scratch, {package.parent}) as (one, two):
        for host in (one, two):
            host.run("rm -f /var/lib/man-db/auto-update")  # to index all manual pages takes long
        install_as_the_readme_has_it(one, package)
        two.run(f"dpkg -i {package}")
        for host in (one, two):
            it_is_installed_and_waits_for_its_settings(host)
        one.run(
            "systemd-run --quiet --unit test-etcd etcd --data-dir /var/tmp/etcd "
            f"--listen-client-urls {ETCD} --advertise-client-urls {ETCD} --listen-peer-urls http://127.0.0.1:23800 "
            "--initial-advertise-peer-urls http://127.0.0.1:23800 --initial-cluster default=http://127.0.0.1:23800"
        )
        for host in (one, two):
            configure(host)

        def check() -> subprocess.CompletedProcess[str]:
            return two.run("kgctl check", check=False)

        wait(lambda: all(status(two, host.name) for host in (one, two)), 120, lambda: check().stdout)
        address = mesh_address(two, "node-1")
        wait(lambda: two.run(f"ping -c 1 -w 1 {address}", check=False).returncode == 0, 60, lambda: check().stdout)
        it_is_upgraded_without_a_packet_lost(one, two, address, second, third)
        assert {"/usr/bin/kg", "/var/lib/kilo-etcd", "/etc/kilo-etcd", f"/{UNIT}"} < left(one)
        it_leaves_on_removal_and_keeps_its_key(one, two)
        one.run(f"{APT} purge kilo-etcd")
        assert left(one) == set()
        the_archive_installs_and_upgrades(one, two, archive)
        the_package_follows_the_archive(one, two, package)
        one.run(f"{APT} purge kilo-etcd")
        assert left(one) == set()
        # Etcd is away: the host is cleaned up all the same, and the operator is told what is left where.
        one.run("systemctl stop test-etcd")
        said = two.run("dpkg --purge kilo-etcd 2>&1").stdout
        assert "kgctl node forget" in said
        nothing_in_the_kernel(two)
        assert not (two.root / "var/lib/kilo-etcd").exists()


def install_as_the_readme_has_it(host: Host, package: Path) -> None:
    (line,) = set(re.findall(r"`sudo (apt install \./kilo-etcd_VERSION_amd64\.deb)`", (ROOT / "README.md").read_text()))
    line = line.replace("kilo-etcd_VERSION_amd64.deb", package.name).replace("apt ", f"{APT} ")
    host.run(f"{line} --no-install-recommends", cwd=str(package.parent))


def it_is_installed_and_waits_for_its_settings(host: Host) -> None:
    assert host.run("kg --version").stdout == f"kg, version {kilo_etcd.__version__}\n"
    assert host.run(f"stat -c '%a %U' {ENVIRONMENT}").stdout == "600 root\n"
    assert (host.root / ENVIRONMENT[1:]).read_bytes() == (ROOT / "systemd/kilo-etcd.env").read_bytes()
    assert service(host, "ActiveState", "UnitFileState") == {"ActiveState": "inactive", "UnitFileState": "disabled"}
    verified = host.run("systemd-analyze verify kilo-etcd.service 2>&1", check=False).stdout
    assert "kilo-etcd" not in verified
    host.run("dpkg --verify kilo-etcd")
    for page, word in (("man1/kgctl.1", "kgctl"), ("man8/kg.8", "KILO_LOCATION")):
        assert word in host.run(f"zcat /usr/share/man/{page}.gz").stdout
    assert "complete" in host.run(
        "source /usr/share/bash-completion/completions/kgctl; complete -p kgctl\n"
        "test -s /usr/share/zsh/vendor-completions/_kgctl -a -s /usr/share/fish/vendor_completions.d/kgctl.fish"
    ).stdout  # fmt: skip
    # One interpreter is started, with bytecode that is all there.
    assert host.run("strace -f -e trace=execve -e signal=none kgctl --version 2>&1").stdout.count("execve(") == 1
    count = "find /opt/kilo-etcd -name '*.pyc' | wc -l"
    assert (
        host.run(f"{count}; kgctl graph --help >/dev/null; {count}").stdout.split()[0] == host.run(count).stdout.strip()
    )


def it_is_upgraded_without_a_packet_lost(one: Host, two: Host, address: str, second: Path, third: Path) -> None:
    process, link = service(one, "MainPID"), one.run("ip -o link show kilo0").stdout
    with none_lost(two, address):
        one.run(f"dpkg -i {second}")
        wait_for_version(one, two, f"{kilo_etcd.__version__}+second")
    assert service(one, "MainPID") == process  # which runs the new code
    with none_lost(two, address):
        one.run(f"dpkg -i {third}")
        wait_for_version(one, two, f"{kilo_etcd.__version__}+third")
    assert service(one, "MainPID") != process  # since the unit is another one
    assert service(one, "RestartUSec", "ActiveState") == {"RestartUSec": "2s", "ActiveState": "active"}
    assert one.run("ip -o link show kilo0").stdout == link
    assert "site-of-node-1" in (one.root / ENVIRONMENT[1:]).read_text()


def it_leaves_on_removal_and_keeps_its_key(one: Host, two: Host) -> None:
    assert "/kilo/by/node-1/" in keys(two, "/kilo/by/")
    key = (one.root / "var/lib/kilo-etcd/key").read_text()
    one.run(f"{APT} remove kilo-etcd")
    nothing_in_the_kernel(one)
    assert keys(two, "/kilo/by/node-1/") == ""
    assert (one.root / "var/lib/kilo-etcd/key").read_text() == key
    assert (one.root / ENVIRONMENT[1:]).exists()
    for path in ("opt/kilo-etcd", "usr/bin/kg", UNIT, "etc/systemd/system/multi-user.target.wants/kilo-etcd.service"):
        assert not (one.root / path).is_symlink()
        assert not (one.root / path).exists()
    assert one.run("systemctl status kilo-etcd", check=False).returncode == 4  # no such unit


def the_archive_installs_and_upgrades(one: Host, two: Host, archive: Path) -> None:
    one.run(f"tar -C /var/tmp -xf {archive}")
    two.run(f"tar -C /var/tmp --strip-components 1 -xf {archive}")
    install = f"/var/tmp/{archive.name.removesuffix('.tar.gz')}/install"
    one.run(install)
    configure(one)
    since = wait_for_version(one, two, kilo_etcd.__version__)["since"]
    process = service(one, "MainPID", "ActiveState")
    one.run(install)
    wait(
        lambda: status(two, "node-1").get("since", since) != since,
        60,
        lambda: one.run("journalctl -u kilo-etcd").stdout,
    )
    assert service(one, "MainPID", "ActiveState") == process


def the_package_follows_the_archive(one: Host, two: Host, package: Path) -> None:
    """It refuses to be mixed with what is there, says what to do, and then takes over while the agent runs."""
    process = service(one, "MainPID")
    refused = one.run(f"dpkg -i {package}", check=False)
    assert refused.returncode != 0
    lines = re.findall(r"^  (rm .*)$", refused.stderr, re.MULTILINE)
    one.run("kg --version")
    one.run("\n".join([*lines, f"dpkg --force-confold -i {package}"]))
    assert service(one, "MainPID") == process
    one.run("systemctl restart kilo-etcd")
    assert service(one, "MainPID") != process
    assert service(one, "UnitFileState") == {"UnitFileState": "enabled"}
    assert Path(service(one, "FragmentPath")["FragmentPath"]).parts[-4:-1] == ("lib", "systemd", "system")
    wait_for_version(one, two, kilo_etcd.__version__)
    assert "the Debian package is installed" in two.run("/var/tmp/install 2>&1", check=False).stdout
