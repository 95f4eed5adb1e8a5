"""Userspace WireGuard: `wireguard-go`, or another program that implements the cross-platform UAPI on a unix socket.

The program is started once, in a session of its own and with nothing inherited, and outlives the agent; a device
that is there already is used as it is. When the program dies its device goes with it, which the kernel reports as
any other loss of the interface. Only a device of our own network namespace is ours: sockets are found by name.
"""

from __future__ import annotations

import base64
import errno
import ipaddress
import os
import shlex
import shutil
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from kilo_etcd.base import descriptors
from kilo_etcd.kernel.errors import NO_PERMISSION, KernelError, why_not
from kilo_etcd.kernel.netlink.formats import UCRED
from kilo_etcd.kernel.netlink.sockets import same_namespace
from kilo_etcd.kernel.predict import network_order
from kilo_etcd.kernel.read.wireguard import DeviceState
from kilo_etcd.kernel.state import ObservedPeer, RemovePeer, SetDevice, SetPeer, WireGuardChange
from kilo_etcd.kernel.write.wireguard import raw
from kilo_etcd.model import Endpoint

_ANSWER = 5.0
"""Seconds for an answer on the socket: a program that was stopped must not stop the agent."""
_START = 10.0
_DYING = 2.0
_POLL = 0.005
_NO_KEY = "0" * 64
_UNSTEADY = ("last_handshake_time_", "tx_bytes=", "rx_bytes=")
"""Lines of an answer that say what the device has seen, not what it was told."""
_ENDPOINT = "endpoint="
"""The line that says either: only whether there is one counts."""
_TUN = "/dev/net/tun"


def encode(changes: Iterable[WireGuardChange]) -> str:
    """One `set=1` transaction, without the key of any device or peer in another form than the protocol's hex."""
    lines = ["set=1"]
    peers: list[str] = []
    for change in changes:
        if isinstance(change, SetDevice):
            if change.private_key is not None:
                lines.append(f"private_key={raw(change.private_key).hex()}")
            if change.listen_port is not None:
                lines.append(f"listen_port={change.listen_port}")
            if change.mark is not None:
                lines.append(f"fwmark={change.mark}")
            continue
        name = f"public_key={raw(change.public_key).hex()}"
        peers.append(name)
        if isinstance(change, RemovePeer):
            peers.append("remove=true")
            continue
        if change.reset:
            peers += ("remove=true", name)
        peers.extend(_encode_peer(change))
    return "\n".join((*lines, *peers, "", ""))


def _encode_peer(change: SetPeer) -> Iterable[str]:
    if change.preshared_key is not None:
        yield f"preshared_key={raw(change.preshared_key).hex() if change.preshared_key else _NO_KEY}"
    if change.endpoint is not None:
        yield f"endpoint={change.endpoint}"
    if change.persistent_keepalive is not None:
        yield f"persistent_keepalive_interval={change.persistent_keepalive}"
    if change.replace_allowed_ips:
        yield "replace_allowed_ips=true"
    for network in change.allowed_ips:
        yield f"allowed_ip={network}"


def fingerprint(answer: str) -> int:
    """A number that stays the same as long as nothing changes in an answer but what the device has seen. OSError if it
    says an errno."""
    lines = [
        _ENDPOINT if line.startswith(_ENDPOINT) else line
        for line in answer.split("\n")
        if line and not line.startswith(_UNSTEADY)
    ]
    if lines.pop() != "errno=0":
        decode(answer)
    # wireguard-go keeps its peers in a map, which has another order each time.
    return hash(frozenset("\n".join((*lines, "")).split("public_key=")))


def decode(answer: str) -> DeviceState:
    """What a `get=1` answered. OSError if it says an errno."""
    public_key, port, mark = "", 0, 0
    peers: list[ObservedPeer] = []
    values: dict[str, str] = {}
    allowed: list[str] = []
    for line in answer.splitlines():
        name, _, value = line.partition("=")
        match name:
            case "private_key":
                public_key = public_key_of(bytes.fromhex(value))
            case "listen_port":
                port = int(value)
            case "fwmark":
                mark = int(value)
            case "public_key":
                if "public_key" in values:
                    peers.append(_decode_peer(values, allowed))
                values, allowed = {name: value}, []
            case "errno" if value != "0":
                raise _refusal(abs(int(value)))
            case "allowed_ip":
                allowed.append(value)
            case _:
                values[name] = value
    if "public_key" in values:
        peers.append(_decode_peer(values, allowed))
    return DeviceState(
        public_key=public_key, listen_port=port, mark=mark, peers={peer.public_key: peer for peer in peers}
    )


def _refusal(code: int) -> OSError:
    if descriptors.is_shortage(error := OSError(code, os.strerror(code))):
        # Its descriptors, not ours.
        return OSError(errno.EIO, "the process of the userspace WireGuard has no file descriptor left")
    return error


def _decode_peer(values: dict[str, str], allowed: Iterable[str]) -> ObservedPeer:
    preshared = values.get("preshared_key", _NO_KEY)
    seconds, nanoseconds = (int(values.get(f"last_handshake_time_{unit}", "0")) for unit in ("sec", "nsec"))
    return ObservedPeer(
        public_key=base64.b64encode(bytes.fromhex(values["public_key"])).decode(),
        endpoint=_decode_endpoint(values["endpoint"]) if "endpoint" in values else None,
        allowed_ips=tuple(sorted((ipaddress.ip_network(ip, strict=False) for ip in allowed), key=network_order)),
        persistent_keepalive=int(values.get("persistent_keepalive_interval", "0")),
        preshared_key=None if preshared == _NO_KEY else base64.b64encode(bytes.fromhex(preshared)).decode(),
        last_handshake=seconds + nanoseconds / 1e9,
        rx_bytes=int(values.get("rx_bytes", "0")),
        tx_bytes=int(values.get("tx_bytes", "0")),
    )


def _decode_endpoint(value: str) -> Endpoint:
    host, _, port = value.rpartition(":")
    # A link-local address comes with its zone, which is an address to `ipaddress` as well.
    return Endpoint(ipaddress.ip_address(host.strip("[]")), int(port))


def public_key_of(private: bytes) -> str:
    """The base64 public key of 32 private bytes; empty for the all-zero key, which means that there is none."""
    if not any(private):
        return ""
    from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

    return base64.b64encode(X25519PrivateKey.from_private_bytes(private).public_key().public_bytes_raw()).decode()


class UserspaceDevice:
    """WireGuard devices behind the UAPI sockets in one directory."""

    def __init__(self, directory: str, runtime_dir: str) -> None:
        self._directory = Path(directory)
        self._runtime_dir = Path(runtime_dir)
        self.writes = 0

    def read(self, name: str) -> DeviceState:
        """The state of a device, as its program reports it. Raises OSError."""
        return decode(self._ask(name, "get=1\n\n"))

    def fingerprint(self, name: str) -> int:
        """Implements `Device.fingerprint`. It reads as much as `read` does."""
        return fingerprint(self._ask(name, "get=1\n\n"))

    def write(self, name: str, changes: Sequence[WireGuardChange]) -> None:
        """Implements `Device.write`, in one transaction. Raises OSError if the program refuses it."""
        self.writes += 1
        decode(self._ask(name, encode(changes)))

    def process(self, name: str) -> int | None:
        """The process that serves a device of our network namespace, or None. OSError: no descriptor is left to ask."""
        try:
            with self._connect(name) as connection:
                process, _, _ = UCRED.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, UCRED.size))
        except OSError as error:
            if descriptors.is_shortage(error):
                raise
            return None
        return process if same_namespace(process) else None

    def check(self, name: str, command: str) -> list[str]:
        """What `start` will run; KernelError says what is missing."""
        words = shlex.split(command)
        program = shutil.which(words[0])
        if program is None:
            raise KernelError(
                f"this kernel has no WireGuard and {words[0]} is not installed: install it "
                "(Debian: apt install wireguard-go), or load the module wireguard"
            )
        try:
            os.close(os.open(_TUN, os.O_RDWR | os.O_CLOEXEC))
        except OSError as error:
            if descriptors.is_shortage(error):
                raise KernelError(f"{words[0]} cannot make {name}: {why_not(error)}") from None
            raise KernelError(
                f"{words[0]} cannot make {name}, since {_TUN} cannot be opened ({error.strerror}): load the module tun "
                "(modprobe tun), or let the agent have it (systemd unit: DeviceAllow=/dev/net/tun rw; container: "
                "--device /dev/net/tun)"
            ) from None
        return [program, *words[1:]]

    def start(self, name: str, command: str) -> None:
        """Start the program (`command` as a shell would split it) and wait until it answers. KernelError says what is
        missing."""
        program = self.check(name, command)
        self._make_way(name)
        self._runtime_dir.mkdir(parents=True, exist_ok=True)
        errors = self._runtime_dir / f"{name}.wireguard.log"
        process = _launch(program, name, errors)
        deadline = time.monotonic() + _START
        while self.process(name) is None:
            if not _alive(process):
                raise KernelError(self._why(command, name, errors))
            if time.monotonic() > deadline:
                os.kill(process, signal.SIGTERM)
                raise KernelError(f"{command} did not open {self._path(name)} within {_START:g} s: see {errors}")
            time.sleep(_POLL)

    def wait_gone(self, name: str, process: int | None) -> None:
        """Wait until the program has seen that its device is gone, and take its socket away if it left it."""
        deadline = time.monotonic() + _ANSWER
        while process is not None and time.monotonic() < deadline and _alive(process):
            time.sleep(_POLL)
        self._remove_stale(name)

    def _path(self, name: str) -> Path:
        return self._directory / f"{name}.sock"

    def _make_way(self, name: str) -> None:
        # A process whose device has just been deleted may not be gone yet.
        deadline = time.monotonic() + _DYING
        while not self._remove_stale(name):
            if time.monotonic() > deadline:
                raise KernelError(
                    f"{self._path(name)} is served by a process of another network namespace: "
                    "give each namespace its own /run/wireguard, or choose another name with --interface"
                )
            time.sleep(_POLL)

    def _remove_stale(self, name: str) -> bool:
        """Remove a socket that nobody serves. Whether the name is free now."""
        path = self._path(name)
        try:
            if not stat.S_ISSOCK(path.stat().st_mode):
                return True
            self._connect(name).close()
        except FileNotFoundError:
            return True
        except ConnectionRefusedError:
            path.unlink(missing_ok=True)
            return True
        except OSError as error:
            if descriptors.is_shortage(error):
                raise
            return False
        return False

    def _connect(self, name: str) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(_ANSWER)
            connection.connect(str(self._path(name)))
        except BaseException:
            connection.close()
            raise
        return connection

    def _ask(self, name: str, request: str) -> str:
        try:
            with self._connect(name) as connection:
                connection.sendall(request.encode())
                answer = bytearray()
                while not answer.endswith(b"\n\n"):
                    part = connection.recv(1 << 16)
                    if not part:
                        raise OSError(errno.EPIPE, "the userspace WireGuard closed its socket within an answer")
                    answer += part
        except TimeoutError:
            process = self.process(name)
            remedy = f": kill -CONT {process}; or kill -9 {process}, and its device goes" if process else ""
            raise OSError(
                errno.ETIMEDOUT, f"the userspace WireGuard of {name} does not answer (is its process stopped?){remedy}"
            ) from None
        return answer.decode()

    def _why(self, command: str, name: str, errors: Path) -> str:
        output = errors.read_text(errors="replace")
        lines = [line for line in output.splitlines() if line.startswith(("ERROR", "Failed"))]
        if "not permitted" in output or "permission denied" in output.lower():
            return f"{command} cannot make {name}: {NO_PERMISSION}"
        return f"{command} cannot make {name}: {lines[-1] if lines else f'see {errors}'}"


def _launch(program: Sequence[str], name: str, errors: Path) -> int:
    """Start `program` (a path and its arguments) as nobody's child, in a session of its own, with nothing of ours open;
    its process number.

    In the foreground (`-f`), so that the process that opens the socket is the one that serves it: the socket's
    credentials then lead to it. The shell in between ends at once and leaves it to init.
    """
    completed = subprocess.run(
        ["/bin/sh", "-c", '"$@" </dev/null >/dev/null 2>"$0" & echo $!', str(errors), *program, "-f", name],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        start_new_session=True,
        cwd="/",
        env={"LOG_LEVEL": "error", "PATH": os.environ.get("PATH", os.defpath)},
        check=True,
    )
    return int(completed.stdout)


def _alive(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
