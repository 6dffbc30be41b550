"""Where a server listens, taken before anything is loaded."""

from __future__ import annotations

import socket

from tunesmith.core.errors import ServingError

__all__ = ["bind", "not_bound"]


def bind(host: str, port: int) -> socket.socket:
    """Return a socket bound to ``host`` and ``port`` (0: any free one) that does not listen yet.

    Raises:
        ServingError: the port is taken, or the address is none of this machine's.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        bound = socket.socket(family, kind, protocol)
    except OSError as error:
        raise not_bound(host, port, error) from None
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise not_bound(host, port, error) from None
    return bound


def not_bound(host: str, port: int, error: OSError) -> ServingError:
    """Return the error for an address that cannot be listened at."""
    return ServingError(f"cannot listen at {host}:{port}: {error.strerror}. Give another --port or --host.")
