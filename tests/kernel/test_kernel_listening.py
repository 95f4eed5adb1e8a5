"""At which ports the host listens, of what the kernel writes into /proc/net."""

from __future__ import annotations

import socket
import sys

import pytest

from kilo_etcd.kernel.listening import ports, read

TABLE = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000:094C 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 1 1 0000000000000000 100
   1: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 2 1 0000000000000000 100
   2: 0100A8C0:094B 0200A8C0:D431 01 00000000:00000000 00:00000000 00000000     0        0 3 1 0000000000000000 20
   3: 00000000000000000000000000000000:0016 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 0
   4: 00000000000000000000000001000000:0050 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 0
   5: 0000000000000000FFFF00000100007F:0051 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 0

cut
"""


@pytest.mark.skipif(sys.byteorder != "little", reason="as such a machine writes it")
def test_who_listens_for_others() -> None:
    assert set(ports(TABLE.splitlines())) == {2380, 22}


def test_a_socket_of_this_host_is_found() -> None:
    with socket.create_server(("0.0.0.0", 0)) as server, socket.create_server(("127.0.0.1", 0)) as inner:
        found = read()
        assert server.getsockname()[1] in found
        assert inner.getsockname()[1] not in found
