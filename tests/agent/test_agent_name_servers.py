"""Which name servers a host asks in the end."""

from __future__ import annotations

from pathlib import Path

from kilo_etcd.agent.name_servers import name_servers


def test_name_servers_are_those_that_are_asked_in_the_end(tmp_path: Path) -> None:
    own, behind, more = tmp_path / "resolv.conf", tmp_path / "resolved.conf", tmp_path / "unbound.conf"

    def asked() -> list[str]:
        return [str(name_server) for name_server in name_servers(own, (behind, more))]

    assert asked() == []
    own.write_text("# nameserver 9.9.9.9\nnameserver 10.1.0.1\nnameserver x\n nameserver fe80::1%eth0\nsearch a\n")
    assert asked() == ["10.1.0.1"]
    behind.write_text("nameserver 192.168.1.1\nnameserver fd00::53\n")
    assert asked() == ["10.1.0.1"], "no resolver of the host's own is asked"
    for stub in ("127.0.0.53", "127.0.0.1", "::1"):
        own.write_text(f"nameserver {stub}\n")
        assert asked() == ["192.168.1.1", "fd00::53"]
    own.write_text("nameserver 127.0.0.1\nnameserver 10.1.0.1\n")
    assert asked() == ["10.1.0.1", "192.168.1.1", "fd00::53"]
    more.write_text('forward-zone:\n  name: "."\n  forward-addr: 10.5.0.1@53\n  forward-addr: fd00::5\n')
    behind.write_bytes(b"nameserver 10.0.0.1\n\xff\xfe")
    assert asked() == ["10.1.0.1", "10.0.0.1", "10.5.0.1", "fd00::5"]
    behind.unlink()
    more.unlink()
    own.write_text("nameserver 127.0.0.1\n")
    assert asked() == [], "what stands in its configuration is not known"
