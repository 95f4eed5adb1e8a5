"""Connecting: TCP, then TLS where the endpoint says so. Certificate files are read for each connection, so that renewed
ones count from the next connection on.
"""

from __future__ import annotations

import errno
import math
import os
import socket
import ssl
from contextlib import suppress
from functools import partial
from ipaddress import ip_address

import trio
from attrs import define, field

from kilo_etcd.base import descriptors

from .api import Tls
from .connection import explain_tls
from .endpoint import EtcdEndpoint
from .grpc import TransportFailed


def tls_context(tls: Tls) -> ssl.SSLContext:
    """Raises TransportFailed (permanent) that names the file which cannot be used."""
    doing = tls.ca
    encrypted = False

    def no_password() -> str:
        # Without this OpenSSL asks at the terminal, and everything waits.
        nonlocal encrypted
        encrypted = True
        return ""

    try:
        context = ssl.create_default_context(ssl.Purpose.SERVER_AUTH, cafile=tls.ca)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if tls.insecure_skip_verify:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        if tls.cert:
            doing = f"{tls.cert} with {tls.key}" if tls.key else tls.cert
            context.load_cert_chain(tls.cert, tls.key, no_password)
    except ssl.SSLError as error:
        if encrypted:
            raise TransportFailed(
                f"the private key {tls.key or tls.cert} is encrypted; write it without a passphrase (openssl pkey)",
                permanent=True,
            ) from None
        raise TransportFailed(f"{doing} is not usable as PEM ({error.reason or error})", permanent=True) from None
    except OSError as error:
        if (short := descriptors.shortage(error)) is not None:
            raise TransportFailed(f"cannot read {doing or 'certificates'}: {short}", processed=False) from None
        raise TransportFailed(f"cannot read {doing} ({error.strerror})", permanent=True) from None
    context.set_alpn_protocols(["h2"])
    return context


LOOKUP_PATIENCE = 1.0
"""Seconds to wait for a name server where the addresses of the last time are there to be tried instead."""


@define(eq=False)
class Lookups:
    """One endpoint's way to its addresses.

    A look-up in a DNS that does not answer goes on in its thread when nobody waits for it any more, for half a minute.
    `limiter` bounds these, so that they never use up the threads that all of the process shares. What was answered last
    is kept: the name server may be reached only through what etcd describes, such as a tunnel that has just died.
    """

    limiter: trio.CapacityLimiter = field(factory=lambda: trio.CapacityLimiter(2))
    last_addresses: tuple[str, ...] = ()

    async def fresh(self, endpoint: EtcdEndpoint) -> bool:
        """Look the name up; whether that has succeeded, else `last_addresses` are to be tried. OSError: it is empty."""
        look_up = partial(socket.getaddrinfo, endpoint.host, endpoint.port, type=socket.SOCK_STREAM)
        with trio.move_on_after(LOOKUP_PATIENCE if self.last_addresses else math.inf):
            try:
                answers = await trio.to_thread.run_sync(look_up, abandon_on_cancel=True, limiter=self.limiter)
            except OSError:
                if not self.last_addresses:
                    raise
                return False
            self.last_addresses = tuple(dict.fromkeys(str(address[0]) for *_, address in answers))
            return True
        return False


async def connect(endpoint: EtcdEndpoint, tls: Tls | None, lookups: Lookups) -> trio.abc.Stream:
    """A byte stream to the endpoint, the TLS handshake done. Raises TransportFailed; the caller bounds the time."""
    context = tls_context(tls or Tls()) if endpoint.tls else None
    try:
        if _is_address(endpoint.host) or await lookups.fresh(endpoint):
            plain = await trio.open_tcp_stream(endpoint.host, endpoint.port)
        else:
            plain = await _open_first(lookups.last_addresses, endpoint.port)
    except OSError as error:
        raise TransportFailed(_explain_tcp(error), processed=False) from None
    except ValueError as error:
        # UnicodeError included: a name that IDNA does not know.
        raise TransportFailed(f"its name cannot be looked up ({error})", processed=False, permanent=True) from None
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if context is None:
        return plain
    stream: trio.SSLStream[trio.SocketStream] = trio.SSLStream(
        plain, context, server_hostname=endpoint.server_name or endpoint.host, https_compatible=True
    )
    try:
        await stream.do_handshake()
    except (trio.BrokenResourceError, ssl.SSLError) as error:
        await trio.aclose_forcefully(stream)
        cause = error.__cause__ if isinstance(error, trio.BrokenResourceError) else error
        if isinstance(cause, ssl.SSLError) and not isinstance(cause, ssl.SSLEOFError | ssl.SSLZeroReturnError):
            raise TransportFailed(explain_tls(cause), processed=False, permanent=True) from None
        raise TransportFailed(
            "it hung up during the TLS handshake; if it does not speak TLS, write the endpoint with http://",
            processed=False,
        ) from None
    except BaseException:
        await trio.aclose_forcefully(stream)
        raise
    if stream.selected_alpn_protocol() != "h2":
        await trio.aclose_forcefully(stream)
        raise TransportFailed(
            "it speaks TLS but not HTTP/2; is it etcd's client port?", processed=False, permanent=True
        )
    return stream


async def _open_first(addresses: tuple[str, ...], port: int) -> trio.SocketStream:
    """A connection to the first address that takes one. OSError: why the last one does not."""
    for address in addresses[:-1]:
        with suppress(OSError):
            return await trio.open_tcp_stream(address, port)
    return await trio.open_tcp_stream(addresses[-1], port)


def _is_address(host: str) -> bool:
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def _explain_tcp(error: OSError) -> str:
    errors: list[BaseException] = [error]
    for cause in errors:
        if isinstance(cause, BaseExceptionGroup):
            errors.extend(cause.exceptions)
        elif cause.__cause__ is not None:
            errors.append(cause.__cause__)
    for cause in errors:
        if (short := descriptors.shortage(cause)) is not None:
            return short
    for cause in errors:
        if isinstance(cause, socket.gaierror):
            # The resolver does not tell: without a descriptor no name has an address.
            if (short := descriptors.exhausted()) is not None:
                return short
            return f"its name does not resolve ({cause.strerror})"
    numbers = [cause.errno for cause in errors if isinstance(cause, OSError) and cause.errno]
    if errno.ECONNREFUSED in numbers:
        return "connection refused (is etcd running there?)"
    return os.strerror(numbers[0]) if numbers else str(error)
