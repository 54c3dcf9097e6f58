"""Policies on the broker that remove Keepwarm's messages, or block publishing.

An administrator may set a policy for all queues, and RabbitMQ then applies it to Keepwarm's queues
too. AMQP does not show policies; the management API does, to users with the tag `management`.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from services.broker.address import BrokerAddress
from services.broker.administration import LISTENER_POLICIES
from services.broker.management_api import ManagementApi
from services.broker.roles import ROLES
from services.broker.tls import TlsFiles
from services.contracts import Settings, topology
from services.contracts.addresses import is_loopback
from services.contracts.errors import BrokerError, BrokerRefused, BrokerUnreachable

_ANSWER_SECONDS = 3.0
_SHOWN_QUEUES = 3
_TCP_LISTEN = "0A"
_OF_QUORUM_QUEUES = ("all", "queues", "quorum_queues")
_OF_EXCHANGES = ("all", "exchanges")
# The effect of each key on a queue; https://www.rabbitmq.com/docs/parameters#policies
_DROPS = {
    "message-ttl": "a message that waits longer (in ms) is removed",
    "expires": "a queue unused for this long (in ms) is deleted with its messages",
    "delivery-limit": "a message that is returned more often is removed (from RabbitMQ 4.3 on, "
    "one whose consumer is lost more often)",
}
_LENGTHS = ("max-length", "max-length-bytes")
_DROPS_OLDEST = "the oldest message is dropped when the queue is full"
_NOT_CHECKED = (
    "no process at {url} belongs to the broker's own user; if the management API is elsewhere, set "
    "KEEPWARM_BROKER_MANAGEMENT_URL"
)
_BLOCKS_PUBLISHERS = "publishers wait while the queue is full"
_ALTERNATE = "alternate-exchange"
_BYPASSES_QUEUE = "a message whose queue is missing goes there, and its publisher gets a confirm"


@dataclass(frozen=True, slots=True)
class PolicyProblem:
    """What one key of a policy does to some of our queues or exchanges."""

    policy: str
    """`policy NAME` or `operator policy NAME`."""
    key: str
    value: Any
    queues: tuple[str, ...]
    loses_messages: bool
    what: str
    remedy: str

    def __str__(self) -> str:
        shown = ", ".join(self.queues[:_SHOWN_QUEUES])
        more = len(self.queues) - _SHOWN_QUEUES
        return (
            f"{self.policy} sets {self.key} to {self.value} on {shown}"
            f"{f' and {more} more' if more > 0 else ''}: {self.what}. {self.remedy}"
        )


@dataclass(frozen=True, slots=True)
class PolicyReport:
    """What a virtual host's policies do to our queues, or why they are unknown."""

    problems: tuple[PolicyProblem, ...] = ()
    delivery_unlimited: frozenset[str] = frozenset()
    """Queues whose delivery limit a policy lifts."""
    unlimited: tuple[str, ...] = ()
    """What `keepwarm broker setup` limits, and what has no limits: the virtual host, its roles'
    users, and the queues of control updates and heartbeats."""
    unknown: str | None = None
    """Why the policies could not be read; None if they were."""


@dataclass(frozen=True, slots=True)
class _Policy:
    name: str
    pattern: str
    apply_to: str
    priority: int
    definition: Mapping[str, Any]

    @classmethod
    def all_of(cls, kind: str, listed: Iterable[Mapping[str, Any]]) -> list["_Policy"]:
        return [
            cls(
                f"{kind} {each['name']}",
                each["pattern"],
                each["apply-to"],
                each["priority"],
                each["definition"],
            )
            for each in listed
        ]

    def covers(self, name: str) -> bool:
        kinds = _OF_EXCHANGES if name in topology.CORE_EXCHANGES else _OF_QUORUM_QUEUES
        if self.apply_to not in kinds:
            return False
        try:
            return re.search(self.pattern, name) is not None
        except re.error:  # valid only in RabbitMQ's own library: assume that it matches
            return True


def check_policies(
    settings: Settings, claims_queues: Sequence[str] = (), *, limits: bool = False
) -> PolicyReport:
    """Check the policies on the core queues, on these claims queues and on existing ones; with
    `limits`, also who has no limits. Takes a few seconds at most. Never raises BrokerError:
    `unknown` has the reason instead.

    Raises UsageError if KEEPWARM_BROKER_MANAGEMENT_URL is not a URL, or would send the password
    unencrypted to a host that KEEPWARM_PLAINTEXT_HOSTS does not name.
    """
    address = BrokerAddress.from_settings(settings)
    url = settings.broker_management_url or address.management_url
    if settings.broker_management_url is None and not _has_same_owner(url, address):
        return PolicyReport(unknown=_NOT_CHECKED.format(url=url))
    if address.password is None:
        return PolicyReport(unknown=f"{url} needs a password, and none is configured")
    with ManagementApi(
        url,
        address.user,
        address.password,
        tls=TlsFiles.of(settings) if url.startswith("https") else TlsFiles(),
        timeout_seconds=_ANSWER_SECONDS,
        named_by="KEEPWARM_BROKER_MANAGEMENT_URL",
        may_be_plaintext=settings.may_be_plaintext,
    ) as api:
        try:
            host = address.virtual_host
            existing = api.get("queues", host, columns="name", disable_stats="true") or ()
            policies = [*_Policy.all_of("policy", api.get("policies", host) or ())]
            operator_policies = _Policy.all_of(
                "operator policy", api.get("operator-policies", host) or ()
            )
            unlimited = tuple(_unlimited(api, host, policies)) if limits else ()
        except BrokerError as error:
            return PolicyReport(unknown=_why(error, address.user, url))
    prefix = topology.claims_queue("")
    existing_queues = {each["name"] for each in existing if each["name"].startswith(prefix)}
    queues = sorted({*topology.CORE_QUEUES, *claims_queues, *existing_queues})
    checked = [*queues, *topology.DIRECT_EXCHANGES]
    report = _find_problems(checked, address.virtual_host, policies, operator_policies)
    return replace(report, unlimited=unlimited)


def _unlimited(api: ManagementApi, virtual_host: str, policies: Sequence[_Policy]) -> Iterator[str]:
    """What has no limits in the virtual host, if it has users of our roles.

    The API answers an empty list if there are no limits, and 404 if there is no such user.
    """
    users = (role.user(virtual_host) for role in ROLES)
    limits = {user: found for user in users if (found := api.get("user-limits", user)) is not None}
    if not limits:
        return
    if api.get("vhost-limits", virtual_host) == []:
        yield f"the virtual host {virtual_host}"
    yield from (f"the user {user}" for user, found in limits.items() if not found)
    known = {policy.name for policy in policies}
    for name, (prefix, _) in LISTENER_POLICIES.items():
        if f"policy {name}" not in known:
            yield f"the queues {prefix}*"


def _has_same_owner(url: str, address: BrokerAddress) -> bool:
    """False if another user of this machine might listen at the guessed port of loopback: without
    TLS, such a process could collect the password.
    """
    if address.tls is not None or not is_loopback(address.host):
        return True
    owners = [_listeners(port) for port in (address.port, urlsplit(url).port)]
    return bool(owners[0]) and owners[0] == owners[1]


def _listeners(port: int | None) -> set[str]:
    """The user ids of the processes that listen on a port of this machine (proc(5))."""
    found: set[str] = set()
    for table in ("tcp", "tcp6"):
        file = Path("/proc/net", table)
        for line in file.read_text().splitlines()[1:] if file.exists() else ():
            _, local, _, state, _, _, _, user, *_ = line.split()
            if state == _TCP_LISTEN and int(local.rpartition(":")[2], 16) == port:
                found.add(user)
    return found


def _why(error: BrokerError, user: str, url: str) -> str:
    if isinstance(error, BrokerRefused):
        return (
            f"{user} may not ask {url} for them; `rabbitmqctl set_user_tags {user} management` on "
            "the broker, or `keepwarm broker setup` once more, lets it"
        )
    if isinstance(error, BrokerUnreachable):
        return (
            f"the management API at {url} does not answer; turn its plug-in on, or name another "
            "address with KEEPWARM_BROKER_MANAGEMENT_URL"
        )
    return str(error)


def _find_problems(
    checked: Sequence[str],
    virtual_host: str,
    policies: Sequence[_Policy],
    operator_policies: Sequence[_Policy],
) -> PolicyReport:
    found: dict[tuple[str, str, str, bool], tuple[Any, list[str]]] = {}
    limits: dict[str, list[int]] = defaultdict(list)
    for queue in checked:
        for policy in (*_in_effect(policies, queue), *_in_effect(operator_policies, queue)):
            for key, value in policy.definition.items():
                if key == "delivery-limit":
                    limits[queue].append(value)
                what, loses = _effect(queue, key, value, policy.definition)
                if what:
                    kind = (policy.name, key, what, loses)
                    found.setdefault(kind, (value, []))[1].append(queue)
    problems = (
        PolicyProblem(name, key, value, tuple(touched), loses, what, _remedy(name, virtual_host))
        for (name, key, what, loses), (value, touched) in found.items()
    )
    return PolicyReport(
        tuple(problems), frozenset(queue for queue, set_to in limits.items() if max(set_to) < 0)
    )


def _in_effect(policies: Sequence[_Policy], queue: str) -> list[_Policy]:
    """Those with the highest priority; of several the broker applies any one."""
    covering = [policy for policy in policies if policy.covers(queue)]
    highest = max((policy.priority for policy in covering), default=0)
    return [policy for policy in covering if policy.priority == highest]


def _effect(queue: str, key: str, value: Any, definition: Mapping[str, Any]) -> tuple[str, bool]:
    """The effect of a key on a queue or exchange, and whether it loses messages; "" if harmless."""
    if queue in topology.CORE_EXCHANGES:
        return (_BYPASSES_QUEUE, True) if key == _ALTERNATE else ("", False)
    if key in _DROPS:
        return ("", False) if key == "delivery-limit" and value < 0 else (_DROPS[key], True)
    if key in _LENGTHS:
        # All others were declared with `reject-publish`, which takes precedence over a policy.
        drops = (
            queue == topology.DEAD_MESSAGES_QUEUE
            and definition.get("overflow", "drop-head") == "drop-head"
        )
        return (_DROPS_OLDEST, True) if drops else (_BLOCKS_PUBLISHERS, False)
    return "", False


def _remedy(policy: str, virtual_host: str) -> str:
    kind, _, name = policy.rpartition(" ")
    clear = "clear_operator_policy" if kind.startswith("operator") else "clear_policy"
    return (
        "Change its pattern so that it does not match Keepwarm's queues, or remove it: "
        f"`rabbitmqctl {clear} -p {virtual_host} {name}`"
    )
