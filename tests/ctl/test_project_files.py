"""The files around the code say what the code says: the unit, its environment file, the lock, the set-up."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from helpers import PACKAGES
from kilo_etcd import __version__
from kilo_etcd.agent.options import all_flags
from kilo_etcd.store.annotations import ANNOTATIONS

ROOT = Path(__file__).parents[2]
UNIT = ROOT / "systemd/kilo-etcd.service"


def test_the_environment_file_names_exactly_the_flags_with_their_defaults() -> None:
    text = (ROOT / "systemd/kilo-etcd.env").read_text()
    assert re.findall(r"^#([A-Z0-9_]+)=(.*)$", text, re.MULTILINE) == [
        (flag.env, flag.default) for flag in all_flags() if flag.name != "--location"
    ], "run scripts/environment-file"
    assert re.findall(r"^[^#\n].*", text, re.MULTILINE) == ["KILO_LOCATION="], "one line is to be filled in"
    assert text.index("KILO_LOCATION=") < text.index("ETCDCTL_"), "before all others"


def test_the_environment_file_explains_every_flag() -> None:
    text = re.sub(r"\n# ", " ", (ROOT / "systemd/kilo-etcd.env").read_text())
    assert [flag.name for flag in all_flags() if f"{flag.name}: {flag.help}" not in text] == []


@pytest.mark.parametrize(
    ("page", "row"), [("README.md", "| `/kilo/annotations/<node>/<name>` |"), ("docs/kgctl.md", "| `kgctl annotate ")]
)
def test_the_pages_name_each_annotation(page: str, row: str) -> None:
    (line,) = (line for line in (ROOT / page).read_text().splitlines() if line.startswith(row))
    names = line.split("|")[2].split(";")[0]
    assert re.findall(r"`([a-z-]+)`", names) == sorted(ANNOTATIONS, key=names.find)


@pytest.fixture(scope="module")
def unit() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(strict=False, interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read(UNIT)
    return parser


def test_the_unit_leaves_the_userspace_device_running_and_its_socket_in_place(unit: configparser.ConfigParser) -> None:
    service = unit["Service"]
    assert service["KillMode"] == "process"
    assert (service["RuntimeDirectory"], service["RuntimeDirectoryPreserve"]) == ("kilo-etcd wireguard", "yes")
    assert service["DeviceAllow"] == "/dev/net/tun rw"


def test_the_unit_lets_the_agent_switch_forwarding_on(unit: configparser.ConfigParser) -> None:
    service = unit["Service"]
    assert "ProtectKernelTunables" not in service
    assert "\nReadWritePaths=/proc/sys/net\n" in UNIT.read_text()
    assert service["CapabilityBoundingSet"] == "CAP_NET_ADMIN"


def test_the_unit_lets_the_agent_write_the_hosts_file_and_nothing_else_of_etc() -> None:
    writable = re.findall(r"^ReadWritePaths=(.*)$", UNIT.read_text(), re.MULTILINE)
    assert writable == ["/proc/sys/net", "-/etc/hosts"]


def test_the_unit_is_told_when_the_agent_is_ready_and_starts_it_again(unit: configparser.ConfigParser) -> None:
    service = unit["Service"]
    assert (service["Type"], service["Restart"]) == ("notify", "always")
    assert (service["StateDirectory"], service["StateDirectoryMode"]) == ("kilo-etcd", "0700")
    assert service["EnvironmentFile"] == "-/etc/kilo-etcd/kilo-etcd.env"


def test_systemd_understands_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.xfail("systemd is not installed here; the other tests read the unit themselves")
    copy = tmp_path / "kilo-etcd.service"
    copy.write_text((ROOT / "systemd/kilo-etcd.service").read_text().replace("/opt/kilo-etcd/bin/kg\n", "/bin/true\n"))
    # What verifies the units of the system makes /run/systemd, if it is not there.
    scope = "--system" if os.geteuid() == 0 else "--user"
    done = subprocess.run([analyze, scope, "verify", str(copy)], capture_output=True, text=True, check=False,
                          env={**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)})  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")


def pinned_in(lock: str) -> dict[str, str]:
    """The version of each package that the text of a lock pins."""
    return {canonicalize_name(name): version for name, version in re.findall(r"^([\w.-]+)==(\S+)", lock, re.MULTILINE)}


@pytest.mark.parametrize(
    ("file", "names"), [("requirements.lock", ("test", "check")), ("requirements-docs.lock", ("docs",))]
)
def test_a_lock_pins_all_that_the_project_asks_for_and_names_no_host(file: str, names: tuple[str, ...]) -> None:
    lock = (ROOT / file).read_text()
    pinned = pinned_in(lock)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    groups = project["dependency-groups"]
    wanted = [text for name in names for text in groups[name]]
    if "docs" not in names:
        wanted += [*project["build-system"]["requires"], *project["project"]["dependencies"]]
    for text in wanted:
        requirement = Requirement(text)
        version = pinned.get(canonicalize_name(requirement.name))
        assert version is not None, f"{text} is not locked: run scripts/lock"
        assert requirement.specifier.contains(version), f"{text} is locked as {version}: run scripts/lock"
    assert "://" not in lock
    assert "--index" not in lock


def test_the_locks_agree_on_what_both_have() -> None:
    one, other = (pinned_in((ROOT / file).read_text()) for file in ("requirements.lock", "requirements-docs.lock"))
    assert {name for name in one.keys() & other.keys() if one[name] != other[name]} == set()


# --- scripts/setup, on systems that are made up of stubs -------------------------------------------------------------

BASICS = ("bash", "env", "dirname", "grep", "id", "cat", "mktemp", "mkdir", "rm", "touch", "chmod", "flock")


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    """A clone whose machine has nothing but a shell; what the script's PATH adds is taken out."""
    tmp_path /= "a home"
    tmp_path.mkdir()
    (tmp_path / "scripts").mkdir()
    (tmp_path / "bin").mkdir()
    text = (ROOT / "scripts/setup").read_text()
    assert "\nPATH=" in text
    text = re.sub(r"\nPATH=.*", "", text).replace("/lib/systemd/system/", "units/")
    (tmp_path / "scripts/setup").write_text(text)
    for name in BASICS:
        found = shutil.which(name)
        assert found is not None, f"needs {name}"
        (tmp_path / "bin" / name).symlink_to(found)
    return tmp_path


def stub(machine: Path, name: str, script: str = "") -> None:
    path = machine / "bin" / name
    path.unlink(missing_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{script}\n")
    path.chmod(0o755)


def setup(machine: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "scripts/setup", "system"],
        cwd=machine,
        env={"PATH": str(machine / "bin"), "TMPDIR": str(machine)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


APT = """
echo "$@" >>apt.log
case "$*" in
    *update*) touch lists ;;
    *install*) [ -e lists ] || { echo "E: Unable to locate package" >&2; exit 100; }
        case "$*" in *--simulate*) echo "Inst etcd-server"; exit ;; esac
        for name in etcd etcdctl wireguard-go wg nft iptables circo ip ping strace pgrep systemctl dbus-daemon \\
            systemd-nspawn openssl python3; do
            printf '#!/usr/bin/env bash\\n' >bin/$name; chmod +x bin/$name
        done
        mkdir -p units; touch units/etcd.service ;;
esac
"""


def test_the_set_up_installs_every_program_that_tests_ask_for() -> None:
    """A new machine has Debian's essential packages and what scripts/setup installs."""
    (listed,) = re.findall(r"^SYSTEM=\($(.*?)^\)", (ROOT / "scripts/setup").read_text(), re.MULTILINE | re.DOTALL)
    packages = {"util-linux", "mount", *re.findall(r"=(\S+)", listed)}
    asked = {
        program
        for path in (ROOT / "tests").rglob("*.py")
        for arguments in re.findall(r"\brequire\(([^()]*)\)", path.read_text())
        for program in re.findall(r'"([\w-]+)"', arguments)
    }
    assert {"etcd", "setpriv", "circo"} <= asked
    assert {program: PACKAGES.get(program) for program in asked if PACKAGES.get(program) not in packages} == {}


def test_without_apt_one_sentence_names_what_is_missing(machine: Path) -> None:
    stub(machine, "nft")
    done = setup(machine)
    assert done.returncode == 1
    assert done.stderr == (
        "kilo-etcd: this system has no apt-get, so install these yourself and try again: "
        "Python 3.11 or later with venv, etcd, etcdctl, wireguard-go, wg, iptables, circo, ip, ping, strace, pgrep, "
        "systemctl, dbus-daemon, systemd-nspawn, openssl, units/etcd.service\n"
    )


def test_apt_installs_what_is_missing_and_updates_only_where_it_must(machine: Path) -> None:
    stub(machine, "apt-get", APT)
    stub(machine, "sudo", 'exec "$@"')
    stub(machine, "wg")
    done = setup(machine)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    log = (machine / "apt.log").read_text().splitlines()
    steps = [re.findall(r"simulate|update|install(?!.*simulate)", line)[0] for line in log]
    assert steps == ["simulate", "update", "simulate", "install"]
    wanted = "--no-install-recommends python3-venv etcd-server etcd-client wireguard-go nftables iptables graphviz"
    assert wanted in log[-1]
    assert "wireguard-tools" not in log[-1]
    assert setup(machine).returncode == 0
    assert len((machine / "apt.log").read_text().splitlines()) == 4, "where all is there apt is not run"


def test_apts_own_words_are_shown_when_it_fails(machine: Path) -> None:
    stub(machine, "apt-get", "echo 'E: no network'; exit 100")
    stub(machine, "sudo", 'exec "$@"')
    done = setup(machine)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-2:] == [
        "E: no network",
        "kilo-etcd: apt-get could not install python3-venv etcd-server etcd-client wireguard-go wireguard-tools "
        "nftables iptables graphviz iproute2 iputils-ping strace procps systemd dbus systemd-container openssl; "
        "its output is above",
    ]


def test_without_sudo_an_ordinary_user_is_told_what_root_has_to_run(machine: Path) -> None:
    stub(machine, "apt-get", APT)
    stub(machine, "id", "echo 1000")
    done = setup(machine)
    assert done.returncode == 1
    assert "become root (there is no sudo here) and run: apt-get install python3-venv etcd-server" in done.stderr
    assert not (machine / "apt.log").exists()


def test_make_clean_removes_nothing_of_another_directory(tmp_path: Path) -> None:
    for name in ("build", "dist", ".venv", "src"):
        (tmp_path / name).mkdir()
    done = subprocess.run(
        ["make", "-f", ROOT / "Makefile", "clean"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode != 0
    assert "this directory is not a checkout of kilo-etcd" in done.stderr
    assert len(list(tmp_path.iterdir())) == 4


def test_what_the_troubleshooting_page_quotes_is_what_the_program_says() -> None:
    sources = "\n".join(path.read_text() for path in sorted((ROOT / "src").rglob("*.py")))
    # Sentences are written over several lines, as adjacent literals.
    sources = re.sub(r'"\s*\n\s*f?"', "", sources)
    page = (ROOT / "docs" / "troubleshooting.md").read_text()
    quoted = [
        text
        for line in page.splitlines()
        if line.startswith("| `")
        for text in re.findall(r"`(.+?)`", line.split(" | ")[0])
    ]
    assert len(quoted) > 30
    for text in quoted:
        # What stands for a value, or is one.
        for part in re.split(r"\.\.\.|51820|kilo0|wireguard-go|net\.ipv4\.ip_forward|/dev/net/tun|'/kilo/", text):
            assert part.strip() in sources, part


def test_the_reference_page_is_made_from_the_code() -> None:
    done = subprocess.run([ROOT / "scripts/reference", "-"], capture_output=True, text=True, check=True)
    assert done.stdout == (ROOT / "docs/reference.md").read_text(), "run scripts/reference"


def test_the_pictures_of_the_shapes_are_as_the_code_draws_them() -> None:
    done = subprocess.run([ROOT / "scripts/pictures", "--check"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_a_release_is_a_version_a_changelog_a_wheel_a_commit_and_a_tag(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", *arguments]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    for name in ("pyproject.toml", "CHANGELOG.md", "README.md", "LICENSE", ".gitignore", "scripts/release"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    package = tmp_path / "src/kilo_etcd"
    package.mkdir(parents=True)
    shutil.copy(ROOT / "src/kilo_etcd/__init__.py", package)
    shutil.copytree(ROOT / "systemd", tmp_path / "systemd")
    # The real one is tested by tests/systemd/test_package.py. A file named `broken` makes this one fail.
    (tmp_path / "scripts/package").write_text("#!/bin/sh\n[ ! -e broken ] && touch dist/package.deb\n")
    (tmp_path / "scripts/package").chmod(0o755)
    (tmp_path / ".venv").symlink_to(sys.prefix)
    git("init", "-q")
    git("add", "-A", ":!.venv")
    git("commit", "-qm", "before")
    (tmp_path / ".git/info/exclude").write_text(".venv\ndist\nbroken\n")
    environment = {**os.environ, **{f"GIT_{who}_{what}": "a@example.org" for who in ("AUTHOR", "COMMITTER")
                                    for what in ("NAME", "EMAIL")}}  # fmt: skip

    def release(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(["scripts/release", *arguments], cwd=tmp_path, env=environment, capture_output=True,
                              text=True, check=False)  # fmt: skip

    for wrong, says in (((), "give the version"), (("v1",), "give the version")):
        done = release(*wrong)
        assert (done.returncode, says in done.stderr) == (1, True)
    (tmp_path / "broken").touch()
    assert release("7.8.9").returncode != 0
    assert (git("status", "--porcelain"), git("tag"), git("log", "--format=%s")) == ("", "", "before\n")
    (tmp_path / "broken").unlink()
    done = release("7.8.9")
    assert done.returncode == 0, done.stdout + done.stderr
    assert sorted(path.name for path in (tmp_path / "dist").iterdir()) == [
        "kilo_etcd-7.8.9-py3-none-any.whl", "kilo_etcd-7.8.9.tar.gz", "package.deb",
    ]  # fmt: skip
    assert git("describe", "--tags").strip() == "v7.8.9"
    assert git("status", "--porcelain") == ""
    assert re.search(
        r"^## \[Unreleased\]\n\n## \[7\.8\.9\] - 20..-..-..$", (tmp_path / "CHANGELOG.md").read_text(), re.M
    )
    assert "there is a tag v7.8.9 already" in release("7.8.9").stderr
    assert "says nothing under [Unreleased]" in release("7.8.10").stderr


def test_the_wheel_has_the_package_and_the_source_archive_all_that_makes_it(tmp_path: Path) -> None:
    def build(directory: Path, *arguments: str | Path) -> None:
        subprocess.run([sys.executable, "-m", "hatchling", "build", *arguments], cwd=directory, capture_output=True,
                       text=True, check=True)  # fmt: skip

    def contents(wheel: Path) -> dict[str, bytes]:
        with zipfile.ZipFile(wheel) as file:
            return {name: file.read(name) for name in file.namelist() if not name.endswith("/RECORD")}

    build(ROOT, "-d", tmp_path)
    name = f"kilo_etcd-{__version__}"
    wheel = contents(tmp_path / f"{name}-py3-none-any.whl")
    package = {f"kilo_etcd/{path.relative_to(ROOT / 'src/kilo_etcd')}" for path in (ROOT / "src").rglob("*.py")}
    assert package < wheel.keys()
    assert {path.partition("/")[0] for path in wheel} == {"kilo_etcd", f"{name}.dist-info"}
    assert f"\nVersion: {__version__}\n" in wheel[f"{name}.dist-info/METADATA"].decode()
    assert b"kg = kilo_etcd.agent.entry:main\n" in wheel[f"{name}.dist-info/entry_points.txt"]
    with tarfile.open(tmp_path / f"{name}.tar.gz") as archive:
        # Python before 3.11.4 has no filters, 3.12 and 3.13 warn if none is set.
        archive.extraction_filter = getattr(tarfile, "data_filter", None)
        archive.extractall(tmp_path)
    source = tmp_path / name
    for path in ("scripts/package", "packaging/postinst", "systemd/kilo-etcd.service", "requirements.lock", "LICENSE",
                 "docs/systemd.md", "tests/conftest.py", "Makefile"):  # fmt: skip
        assert (source / path).read_bytes() == (ROOT / path).read_bytes()
        assert os.access(source / path, os.X_OK) == os.access(ROOT / path, os.X_OK)
    build(source, "-t", "wheel", "-d", tmp_path / "again")
    assert contents(tmp_path / "again" / f"{name}-py3-none-any.whl") == wheel
