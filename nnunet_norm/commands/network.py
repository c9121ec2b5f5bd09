"""The network of this machine: addresses, ports and interfaces, as a training on several machines needs them."""

from __future__ import annotations

import os
import socket
import struct
import sys

from nnunet_norm.errors import LaunchError

_ADDRESS_OF_INTERFACE = 0x8915
"""Linux's request SIOCGIFADDR (netdevice(7))."""


def address_of(endpoint: str, default_port: int) -> tuple[str, int]:
    """Host and port of ``HOST[:PORT]``.

    Raises:
        LaunchError: If the port is none, or the host is not known.
    """
    if endpoint.count(":") > 1:
        raise LaunchError(f"--rdzv-endpoint {endpoint}: give HOST:PORT with a host name, or an IPv4 address")
    host, _, port = endpoint.partition(":")
    if port and not (port.isdecimal() and 0 < int(port) < 2**16):
        raise LaunchError(f"--rdzv-endpoint {endpoint}: the port must be a number from 1 to 65535")
    try:
        socket.getaddrinfo(host, None)
    except OSError as error:
        raise LaunchError(f"--rdzv-endpoint {endpoint}: host {host!r} is not known here; give its address") from error
    return host, int(port) if port else default_port


def refuse_taken_port(port: int) -> None:
    """Refuse a port at which another program of this machine listens, and name one that is free.

    Raises:
        LaunchError: If it is taken, or not for users.
    """
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        with socket.create_server(("", 0)) as server:
            free = server.getsockname()[1]
        reason = os.strerror(error.errno or 0)
        raise LaunchError(
            f"--rdzv-endpoint: port {port} of this machine cannot be used ({reason}): give another on all machines; {free} "
            "is free here"
        ) from error


def interface_with(address: str) -> str:
    """The name of the interface that has an IPv4 address; on another system than Linux the address itself.

    Raises:
        LaunchError: If none has it; those that are there are listed.
    """
    if not sys.platform.startswith("linux"):
        return address
    import fcntl

    found = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        for _, name in socket.if_nameindex():
            try:
                answer = fcntl.ioctl(any_socket, _ADDRESS_OF_INTERFACE, struct.pack("256s", name.encode()))
            except OSError:  # without an address
                continue
            found[socket.inet_ntoa(answer[20:24])] = name
    if address not in found:
        there = ", ".join(f"{own} ({name})" for own, name in found.items())
        raise LaunchError(f"--local-addr {address}: this machine has no such address; it has {there or 'none'}")
    return found[address]
