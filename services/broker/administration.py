"""Makes a broker ready for Keepwarm: its virtual host, and a user for each role.

All of it may be done again: what is there stays, permissions are set to what `roles` says now.
"""

import base64
import hashlib
import hmac
import re
import secrets
from dataclasses import asdict
from typing import Any, Literal

from services.broker.management_api import ManagementApi
from services.broker.roles import LISTENER_POLICIES, ROLES, Role, user_limits, virtual_host_limits
from services.contracts.errors import BrokerError, UsageError

_HASHING = "rabbit_password_hashing_sha256"
_SALT_BYTES = 4
_VIRTUAL_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

# Of a queue of notices or heartbeats. A healthy listener is behind by a few, and of old ones none
# matters. One that nobody reads goes.
_LISTENER_BYTES = 64 * 1024 * 1024
_LISTENER_MILLISECONDS = 10 * 60 * 1000
# Above what an administrator sets for all queues: of several policies a queue has one.
_LISTENER_PRIORITY = 100

SetupResult = Literal["made", "changed", "kept"]


def check_virtual_host(name: str) -> str:
    """`name`, which becomes a part of the users' names as well. Raises UsageError."""
    if _VIRTUAL_HOST.fullmatch(name) is None:
        raise UsageError(
            f"--vhost: {name!r} will not do; take 1 to 64 letters, digits, `.`, `_` or `-`. The "
            "virtual host / is everybody's, and Keepwarm wants one of its own"
        )
    return name


def make_virtual_host(api: ManagementApi, name: str) -> None:
    if api.get("vhosts", name) is None:
        api.put("vhosts", name, body={})


def has_user(api: ManagementApi, role: Role, virtual_host: str) -> bool:
    return api.get("users", role.user(virtual_host)) is not None


def make_user(api: ManagementApi, role: Role, virtual_host: str, password: str) -> SetupResult:
    """The role's user with this password and the role's rights, no others.

    Only a hash of the password is sent. A user whose password and tags fit is kept as it is.
    """
    name = role.user(virtual_host)
    there = api.get("users", name)
    outcome: SetupResult = "made" if there is None else "changed"
    if there is not None and _fits(there, role, password):
        outcome = "kept"
    else:
        hashed = password_hash(password, secrets.token_bytes(_SALT_BYTES))
        user = {"password_hash": hashed, "hashing_algorithm": _HASHING, "tags": ",".join(role.tags)}
        api.put("users", name, body=user)
    api.put("permissions", virtual_host, name, body=asdict(role.permissions))
    return outcome


def set_limits(api: ManagementApi, virtual_host: str, workers: int) -> None:
    """Bound what the passwords of this virtual host can use up on the broker."""
    for role in ROLES:
        for limit, value in user_limits(role, workers).items():
            api.put("user-limits", role.user(virtual_host), limit, body={"value": value})
    for limit, value in virtual_host_limits(workers).items():
        api.put("vhost-limits", virtual_host, limit, body={"value": value})
    for policy, (beginning, messages) in LISTENER_POLICIES.items():
        definition = {
            "max-length": messages,
            "max-length-bytes": _LISTENER_BYTES,
            "expires": _LISTENER_MILLISECONDS,
        }
        body = {
            "pattern": f"^{re.escape(beginning)}",
            "apply-to": "queues",
            "priority": _LISTENER_PRIORITY,
            "definition": definition,
        }
        api.put("policies", virtual_host, policy, body=body)


def amqp_address(api: ManagementApi) -> str:
    """`amqps://HOST:PORT` where the broker listens for TLS, else `amqp://…`. Raises BrokerError."""
    overview = api.get("overview") or {}
    ports = {each["protocol"]: each["port"] for each in overview.get("listeners", ())}
    host = f"[{api.host}]" if ":" in api.host else api.host
    for protocol, scheme in (("amqp/ssl", "amqps"), ("amqp", "amqp")):
        if protocol in ports:
            return f"{scheme}://{host}:{ports[protocol]}"
    raise BrokerError(
        f"the broker at {api.host} listens for no AMQP: see listeners.tcp and listeners.ssl in its "
        "rabbitmq.conf"
    )


def password_hash(password: str, salt: bytes) -> str:
    """As in https://www.rabbitmq.com/docs/passwords#computing-password-hash."""
    digest = hashlib.sha256(salt + password.encode()).digest()
    return base64.b64encode(salt + digest).decode("ascii")


def _fits(user: dict[str, Any], role: Role, password: str) -> bool:
    stored = str(user.get("password_hash") or "")
    if set(user["tags"]) != set(role.tags) or user.get("hashing_algorithm") != _HASHING:
        return False
    salt = base64.b64decode(stored)[:_SALT_BYTES]
    return hmac.compare_digest(password_hash(password, salt), stored)
