"""Sets up a broker for Keepwarm: its virtual host, and a user for each role.

Every step can be repeated. What exists is kept; permissions are set to those of `roles`.
"""

import base64
import hashlib
import hmac
import re
import secrets
from dataclasses import asdict
from typing import Any, Literal

from services.broker.management_api import ManagementApi
from services.broker.roles import ROLES, Role, user_limits, virtual_host_limits
from services.contracts import topology
from services.contracts.errors import BrokerError, UsageError

_HASHING = "rabbit_password_hashing_sha256"
_SALT_BYTES = 4
_VIRTUAL_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

# Limits of a queue of control updates or heartbeats. A healthy listener is behind by a few
# messages, and old ones do not matter. A queue that nobody reads expires.
_LISTENER_BYTES = 64 * 1024 * 1024
_LISTENER_MILLISECONDS = 10 * 60 * 1000
# Higher than an administrator's policy for all queues: RabbitMQ applies one policy to a queue.
_LISTENER_PRIORITY = 100
LISTENER_POLICIES = {
    "keepwarm-notices": (topology.listener_queue(topology.CONTROL_EXCHANGE, ""), 100),
    "keepwarm-presence": (topology.listener_queue(topology.HEARTBEATS_EXCHANGE, ""), 100_000),
}
"""By policy: the prefix of its queues' names, and the most messages in one of them."""

SetupResult = Literal["made", "changed", "kept"]


def check_virtual_host(name: str) -> str:
    """Return `name`, which also becomes part of the users' names. Raises UsageError."""
    if _VIRTUAL_HOST.fullmatch(name) is None:
        raise UsageError(
            f"--vhost: {name!r} is not valid; use 1 to 64 letters, digits, `.`, `_` or `-`. The "
            "virtual host / is shared, and Keepwarm needs one of its own"
        )
    return name


def make_virtual_host(api: ManagementApi, name: str) -> None:
    if api.get("vhosts", name) is None:
        api.put("vhosts", name, body={})


def has_user(api: ManagementApi, role: Role, virtual_host: str) -> bool:
    return api.get("users", role.user(virtual_host)) is not None


def make_user(api: ManagementApi, role: Role, virtual_host: str, password: str) -> SetupResult:
    """Create or change the role's user: this password, and only the role's permissions.

    Only a hash of the password is sent. A user whose password and tags already match is kept.
    """
    name = role.user(virtual_host)
    existing = api.get("users", name)
    result: SetupResult = "made" if existing is None else "changed"
    if existing is not None and _matches(existing, role, password):
        result = "kept"
    else:
        hashed = password_hash(password, secrets.token_bytes(_SALT_BYTES))
        user = {"password_hash": hashed, "hashing_algorithm": _HASHING, "tags": ",".join(role.tags)}
        api.put("users", name, body=user)
    api.put("permissions", virtual_host, name, body=asdict(role.permissions))
    return result


def set_limits(api: ManagementApi, virtual_host: str, workers: int) -> None:
    """Limit the connections, channels, queues and messages of this virtual host's users."""
    for role in ROLES:
        for limit, value in user_limits(role, workers).items():
            api.put("user-limits", role.user(virtual_host), limit, body={"value": value})
    for limit, value in virtual_host_limits(workers).items():
        api.put("vhost-limits", virtual_host, limit, body={"value": value})
    for policy, (prefix, messages) in LISTENER_POLICIES.items():
        definition = {
            "max-length": messages,
            "max-length-bytes": _LISTENER_BYTES,
            "expires": _LISTENER_MILLISECONDS,
        }
        body = {
            "pattern": f"^{re.escape(prefix)}",
            "apply-to": "queues",
            "priority": _LISTENER_PRIORITY,
            "definition": definition,
        }
        api.put("policies", virtual_host, policy, body=body)


def amqp_address(api: ManagementApi) -> str:
    """`amqps://HOST:PORT` if the broker listens for TLS, else `amqp://…`. Raises BrokerError."""
    overview = api.get("overview") or {}
    ports = {each["protocol"]: each["port"] for each in overview.get("listeners", ())}
    host = f"[{api.host}]" if ":" in api.host else api.host
    for protocol, scheme in (("amqp/ssl", "amqps"), ("amqp", "amqp")):
        if protocol in ports:
            return f"{scheme}://{host}:{ports[protocol]}"
    raise BrokerError(
        f"the broker at {api.host} does not listen for AMQP: set listeners.tcp or listeners.ssl in "
        "its rabbitmq.conf"
    )


def password_hash(password: str, salt: bytes) -> str:
    """As in https://www.rabbitmq.com/docs/passwords#computing-password-hash."""
    digest = hashlib.sha256(salt + password.encode()).digest()
    return base64.b64encode(salt + digest).decode("ascii")


def _matches(user: dict[str, Any], role: Role, password: str) -> bool:
    stored = str(user.get("password_hash") or "")
    if set(user["tags"]) != set(role.tags) or user.get("hashing_algorithm") != _HASHING:
        return False
    salt = base64.b64decode(stored)[:_SALT_BYTES]
    return hmac.compare_digest(password_hash(password, salt), stored)
