"""A certificate authority for tests: certificates for servers and clients, as PEM files.

It is trustme's, which is no dependency of the package: only who makes an `Authority` needs it.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from attrs import frozen


@frozen
class Issued:
    """The PEM files of a certificate and of its key."""

    cert: Path
    key: Path


class Authority:
    """`ca` is the path of the authority's own certificate."""

    def __init__(self, directory: Path, name: str = "test CA") -> None:
        import trustme

        self._directory = directory
        self._authority = trustme.CA(organization_unit_name=name)
        directory.mkdir(parents=True, exist_ok=True)
        self.ca = directory / f"{name.replace(' ', '-')}.pem"
        self._authority.cert_pem.write_to_path(self.ca)

    def issue(
        self, common_name: str, hosts: Sequence[str] = (), *, seconds: float = 86400.0, nameless: bool = False
    ) -> Issued:
        """A certificate good for server and client, for so many seconds, with `hosts` (names and addresses) as its
        names. One of the same common name takes the former one's files; if `nameless`, only its files have it."""
        until = datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)
        # trustme makes a list of names in any case, which etcd refuses if it is empty.
        names = hosts or (f"{common_name}.test",)
        certificate = self._authority.issue_cert(*names, common_name=None if nameless else common_name, not_after=until)
        issued = Issued(self._directory / f"{common_name}.pem", self._directory / f"{common_name}-key.pem")
        certificate.cert_chain_pems[0].write_to_path(issued.cert)
        issued.key.touch(0o600)
        certificate.private_key_pem.write_to_path(issued.key)
        return issued
