"""Addresses of HTTP servers, `host:port`, in settings and messages."""

import ipaddress
import re
from typing import Annotated

from pydantic import AfterValidator, StringConstraints

_HOST = r"(?:\[[0-9A-Fa-f:.]{2,45}\]|[A-Za-z0-9](?:[A-Za-z0-9._-]{0,252}[A-Za-z0-9])?)"
_HOST_ALONE = re.compile(_HOST)
_HOST_AND_PORT = re.compile(rf"({_HOST}):([0-9]{{1,5}})")
_LAST_PORT = 65_535


def split_address(address: str) -> tuple[str, int]:
    """Host and port. An IPv6 host has brackets in the address and none in the result.

    Raises ValueError if this is not a `host:port`.
    """
    found = _HOST_AND_PORT.fullmatch(address)
    if found is None or int(found[2]) > _LAST_PORT:
        raise ValueError("write it like 127.0.0.1:9464, [::1]:9464 or node-7.example.org:9464")
    return found[1].strip("[]"), int(found[2])


def join_address(host: str, port: int) -> str:
    """The opposite of `split_address`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_host(text: str) -> bool:
    """Whether this is a host name or IP address without a port."""
    return _HOST_ALONE.fullmatch(text) is not None


def is_loopback(host: str) -> bool:
    """Whether this is a loopback address or `localhost`. Names are not resolved."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _reachable(address: str) -> str:
    if split_address(address)[1] == 0:
        raise ValueError("port 0 cannot be connected to; name the server's own port")
    return address


ReachableAddress = Annotated[str, StringConstraints(max_length=300), AfterValidator(_reachable)]
"""A `host:port` that others can connect to."""
