"""The permissions on the broker: a user for each role, with no right that it does not need.

A permission is three regular expressions over the names of exchanges and queues. RabbitMQ requires
for each operation (https://www.rabbitmq.com/docs/access-control#authorisation):

declare an exchange, delete anything    configure it
declare a queue                         configure it
  ... with a dead-letter exchange       and read the queue, write the exchange
bind a queue                            write the queue, read the exchange
publish                                 write the exchange; `amq.default` is the one without a name
consume, get, purge                     read the queue
ask whether a thing exists              nothing
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

from services.contracts import topology

_NOTHING = "^$"
# The smallest tag that can read policies, which may lose claims. Its user sees the management pages
# of the virtual hosts that it may log in to, and gains no permission on queues.
_SEES_POLICIES = ("management",)
_ANY_CLAIMS_QUEUE = topology.claims_queue("*")
_ANY_CONTROL_QUEUE = topology.listener_queue(topology.CONTROL_EXCHANGE, "*")
_ANY_HEARTBEATS_QUEUE = topology.listener_queue(topology.HEARTBEATS_EXCHANGE, "*")
_COLLECTED_QUEUES = (
    topology.RETURNS_QUEUE,
    topology.VERDICTS_QUEUE,
    topology.RUNS_QUEUE,
    topology.DEAD_CLAIMS_QUEUE,
)
_EVERYTHING = (
    *(*topology.CORE_EXCHANGES, *topology.CORE_QUEUES),
    *(_ANY_CLAIMS_QUEUE, _ANY_CONTROL_QUEUE, _ANY_HEARTBEATS_QUEUE),
)


@dataclass(frozen=True, slots=True)
class Permissions:
    """Regular expressions, anchored at both ends: RabbitMQ matches anywhere in a name."""

    configure: str = _NOTHING
    write: str = _NOTHING
    read: str = _NOTHING


@dataclass(frozen=True, slots=True)
class Role:
    """A service or a person with its permissions on the broker."""

    name: str
    may: str
    """Its rights in words."""
    permissions: Permissions
    tags: tuple[str, ...] = ()
    """RabbitMQ's tags: access to the management pages and API; without a tag there is none."""

    def user(self, virtual_host: str) -> str:
        """The user's name. Users belong to the whole broker, so it contains the virtual host."""
        return f"{virtual_host}-{self.name}"


def _only(*allowed: str) -> str:
    """An expression that matches exactly these names; `*` stands for one character or more."""
    alternatives = (name.replace(".", r"\.").replace("*", ".+") for name in allowed)
    return f"^({'|'.join(alternatives)})$"


ROLES = (
    Role(
        "producer",
        "declares claims queues; publishes claims and runs",
        Permissions(
            configure=_only(_ANY_CLAIMS_QUEUE),
            # The dead exchange, because the queues that it declares dead-letter into it.
            write=_only(
                topology.CLAIMS_EXCHANGE,
                topology.RUNS_EXCHANGE,
                topology.DEAD_EXCHANGE,
                _ANY_CLAIMS_QUEUE,
            ),
            # It consumes nothing; declaring and binding a queue that dead-letters requires this.
            read=_only(topology.CLAIMS_EXCHANGE, _ANY_CLAIMS_QUEUE),
        ),
        tags=_SEES_POLICIES,
    ),
    Role(
        "worker",
        "takes claims; publishes verdicts, dead claims, returns and heartbeats; reads control "
        "updates",
        Permissions(
            configure=_only(_ANY_CONTROL_QUEUE),
            write=_only(
                topology.VERDICTS_EXCHANGE,
                topology.DEAD_EXCHANGE,
                topology.RETURNS_EXCHANGE,
                topology.HEARTBEATS_EXCHANGE,
                _ANY_CONTROL_QUEUE,
            ),
            read=_only(_ANY_CLAIMS_QUEUE, topology.CONTROL_EXCHANGE, _ANY_CONTROL_QUEUE),
        ),
    ),
    Role(
        "collector",
        "declares all queues; takes verdicts, runs, returns and dead claims; publishes returned "
        "claims, refused messages and control updates",
        Permissions(
            configure=_only(
                *topology.CORE_EXCHANGES,
                *topology.CORE_QUEUES,
                _ANY_CLAIMS_QUEUE,
                _ANY_HEARTBEATS_QUEUE,
            ),
            write=_only(
                topology.CLAIMS_EXCHANGE,
                topology.DEAD_EXCHANGE,
                topology.CONTROL_EXCHANGE,
                *topology.CORE_QUEUES,
                _ANY_CLAIMS_QUEUE,
                _ANY_HEARTBEATS_QUEUE,
            ),
            # Exchanges to bind from, and claims queues because those that it declares dead-letter.
            read=_only(
                topology.CLAIMS_EXCHANGE,
                topology.RETURNS_EXCHANGE,
                topology.VERDICTS_EXCHANGE,
                topology.RUNS_EXCHANGE,
                topology.DEAD_EXCHANGE,
                topology.HEARTBEATS_EXCHANGE,
                *_COLLECTED_QUEUES,
                _ANY_CLAIMS_QUEUE,
                _ANY_HEARTBEATS_QUEUE,
            ),
        ),
        tags=_SEES_POLICIES,
    ),
    Role(
        "operator",
        "all permissions on Keepwarm's queues and exchanges; sees the management pages",
        Permissions(_only(*_EVERYTHING), _only(*_EVERYTHING), _only(*_EVERYTHING)),
        tags=("monitoring",),
    ),
)


# A process has two connections, and briefly a third. After a network failure the broker keeps the
# lost ones for another minute beside the new ones.
_CONNECTIONS_EACH = 6
_OTHER_PROCESSES = 50
_CHANNELS_EACH = 2
"""For each connection."""
_CLAIMS_QUEUES = 10_000


def user_limits(role: Role, workers: int) -> dict[str, int]:
    """RabbitMQ's limits for a role's user, for this many concurrent workers. They bound what a
    stolen password can use up.
    """
    processes = workers if role.name == "worker" else _OTHER_PROCESSES
    connections = _CONNECTIONS_EACH * processes
    return {"max-connections": connections, "max-channels": _CHANNELS_EACH * connections}


def virtual_host_limits(workers: int) -> dict[str, int]:
    """RabbitMQ's limits for the virtual host: all claims queues, and for each worker its own queue
    and briefly that of its last connection.
    """
    connections = sum(user_limits(role, workers)["max-connections"] for role in ROLES)
    return {"max-connections": connections, "max-queues": _CLAIMS_QUEUES + 2 * workers}


def roles_that_fit(writable: Collection[str], *, declares_core: bool) -> list[Role]:
    """The roles whose permissions a user has who may publish to exactly these direct exchanges.
    `declares_core`: whether it may declare the core exchanges and queues.
    """

    def fits(role: Role) -> bool:
        needs = {
            name for name in topology.DIRECT_EXCHANGES if re.search(role.permissions.write, name)
        }
        needs_core = re.search(role.permissions.configure, topology.VERDICTS_QUEUE) is not None
        return needs <= set(writable) and (declares_core or not needs_core)

    return [role for role in ROLES if fits(role)]
