"""Policies on the broker that let Keepwarm's messages vanish, or hold them back.

Who manages a broker may set a policy for all queues, and RabbitMQ applies it to ours as well: it
shows it to nobody over AMQP. The management API does, to users with the tag `management`.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from services.broker.address import BrokerAddress
from services.broker.management_api import ManagementApi
from services.broker.roles import ROLES
from services.broker.tls import TlsFiles
from services.contracts import Settings
from services.contracts import topology as names
from services.contracts.addresses import is_loopback
from services.contracts.errors import BrokerError, BrokerRefused, BrokerUnreachable

_ANSWER_SECONDS = 3.0
_SHOWN_QUEUES = 3
_LISTENS = "0A"
_OF_QUORUM_QUEUES = ("all", "queues", "quorum_queues")
_OF_EXCHANGES = ("all", "exchanges")
# What each does to a queue; https://www.rabbitmq.com/docs/parameters#policies
_DROPS = {
    "message-ttl": "a message that waits for longer (in ms) is given up",
    "expires": "a queue that nobody uses for so long (in ms) is deleted with its messages",
    "delivery-limit": "a message that was returned more often is given up (from RabbitMQ 4.3 on "
    "one whose consumer was lost more often)",
}
_LENGTHS = ("max-length", "max-length-bytes")
_DROPS_OLDEST = "the oldest message is dropped when the queue is full"
_NOT_ASKED = (
    "nothing at {url} belongs to the broker's own user; KEEPWARM_BROKER_MANAGEMENT_URL names the "
    "management API where it is elsewhere"
)
_REFUSES = "publishers wait while the queue is full"
_ALTERNATE = "alternate-exchange"
_GOES_ASTRAY = "a message whose queue is missing goes there, and its sender is told that it arrived"


@dataclass(frozen=True, slots=True)
class Harm:
    """What one key of a policy does to some of our queues, or exchanges."""

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
class Policies:
    """What the policies of a virtual host do to our queues."""

    harms: tuple[Harm, ...] = ()
    delivery_unlimited: frozenset[str] = frozenset()
    """Queues whose delivery limit a policy lifts."""
    unlimited: tuple[str, ...] = ()
    """The virtual host, and users of its roles, that have no limits (`keepwarm broker setup`)."""
    unknown: str | None = None
    """Why nothing is known of them; None where all is."""


@dataclass(frozen=True, slots=True)
class _Policy:
    name: str
    pattern: str
    apply_to: str
    priority: int
    definition: Mapping[str, Any]

    @classmethod
    def all_of(cls, kind: str, listed: Iterable[Mapping[str, Any]]) -> Iterator["_Policy"]:
        for each in listed:
            yield cls(
                f"{kind} {each['name']}",
                each["pattern"],
                each["apply-to"],
                each["priority"],
                each["definition"],
            )

    def covers(self, name: str) -> bool:
        kinds = _OF_EXCHANGES if name in names.HOUSE_EXCHANGES else _OF_QUORUM_QUEUES
        if self.apply_to not in kinds:
            return False
        try:
            return re.search(self.pattern, name) is not None
        except re.error:  # one that only RabbitMQ's own library reads: better told than missed
            return True


def ask_policies(
    settings: Settings, claims_queues: Sequence[str] = (), *, limits: bool = False
) -> Policies:
    """The policies on the queues that always are, on these claims queues, and on those that are
    there; with `limits` also who has none. Takes some seconds at most, and never raises
    BrokerError: it says what is unknown.

    Raises UsageError when KEEPWARM_BROKER_MANAGEMENT_URL is no URL, or shows the password to the
    network where the broker's does not.
    """
    address = BrokerAddress.from_settings(settings)
    url = settings.broker_management_url or address.management_url
    if settings.broker_management_url is None and not _is_the_brokers_own(url, address):
        return Policies(unknown=_NOT_ASKED.format(url=url))
    if address.password is None:
        return Policies(unknown=f"{url} was not asked: it takes a password, and we have none")
    with ManagementApi(
        url,
        address.user,
        address.password,
        tls=TlsFiles.of(settings) if url.startswith("https") else TlsFiles(),
        timeout_seconds=_ANSWER_SECONDS,
        named_by="KEEPWARM_BROKER_MANAGEMENT_URL",
        clear_text=address.tls is None,
    ) as api:
        try:
            host = address.virtual_host
            there = api.get("queues", host, columns="name", disable_stats="true") or ()
            policies = [*_Policy.all_of("policy", api.get("policies", host) or ())]
            imposed = _Policy.all_of("operator policy", api.get("operator-policies", host) or ())
            unlimited = tuple(_unlimited(api, host)) if limits else ()
        except BrokerError as error:
            return Policies(unknown=_why(error, address.user, url))
    ours = {each["name"] for each in there if each["name"].startswith(names.claims_queue(""))}
    queues = sorted({*names.CORE_QUEUES, *claims_queues, *ours})
    ours_all = [*queues, *names.DIRECT_EXCHANGES]
    judged = _judged(ours_all, address.virtual_host, policies, [*imposed])
    return replace(judged, unlimited=unlimited)


def _unlimited(api: ManagementApi, virtual_host: str) -> Iterator[str]:
    """Of a virtual host that has users of our roles; another is not ours to judge. An empty list
    means that there are no limits, None that there is no such user.
    """
    users = (role.user(virtual_host) for role in ROLES)
    limits = {user: found for user in users if (found := api.get("user-limits", user)) is not None}
    if limits and api.get("vhost-limits", virtual_host) == []:
        yield f"the virtual host {virtual_host}"
    yield from (f"the user {user}" for user, found in limits.items() if not found)


def _is_the_brokers_own(url: str, address: BrokerAddress) -> bool:
    """False where any user of this machine may listen: without TLS, at the guessed port of loopback
    there could be somebody who collects passwords, when a tunnel or nothing is behind it.
    """
    if address.tls is not None or not is_loopback(address.host):
        return True
    owners = [_listeners(port) for port in (address.port, urlsplit(url).port)]
    return bool(owners[0]) and owners[0] == owners[1]


def _listeners(port: int | None) -> set[str]:
    """The user ids of the processes that listen on a port of this machine; see proc(5)."""
    found: set[str] = set()
    for table in ("tcp", "tcp6"):
        file = Path("/proc/net", table)
        for line in file.read_text().splitlines()[1:] if file.exists() else ():
            _, local, _, state, _, _, _, user, *_ = line.split()
            if state == _LISTENS and int(local.rpartition(":")[2], 16) == port:
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


def _judged(
    ours: Sequence[str],
    virtual_host: str,
    policies: Sequence[_Policy],
    imposed: Sequence[_Policy],
) -> Policies:
    found: dict[tuple[str, str, str, bool], tuple[Any, list[str]]] = {}
    limits: dict[str, list[int]] = defaultdict(list)
    for queue in ours:
        for policy in (*_in_effect(policies, queue), *_in_effect(imposed, queue)):
            for key, value in policy.definition.items():
                if key == "delivery-limit":
                    limits[queue].append(value)
                what, loses = _what_it_does(queue, key, value, policy.definition)
                if what:
                    kind = (policy.name, key, what, loses)
                    found.setdefault(kind, (value, []))[1].append(queue)
    harms = (
        Harm(name, key, value, tuple(touched), loses, what, _remedy(name, virtual_host))
        for (name, key, what, loses), (value, touched) in found.items()
    )
    return Policies(
        tuple(harms), frozenset(queue for queue, set_to in limits.items() if max(set_to) < 0)
    )


def _in_effect(policies: Sequence[_Policy], queue: str) -> list[_Policy]:
    """The one with the highest priority; of several the broker takes any."""
    covering = [policy for policy in policies if policy.covers(queue)]
    highest = max((policy.priority for policy in covering), default=0)
    return [policy for policy in covering if policy.priority == highest]


def _what_it_does(
    queue: str, key: str, value: Any, definition: Mapping[str, Any]
) -> tuple[str, bool]:
    """What a key does to a queue or exchange of ours, and whether messages are lost by it; "" where
    it does no harm.
    """
    if queue in names.HOUSE_EXCHANGES:
        return (_GOES_ASTRAY, True) if key == _ALTERNATE else ("", False)
    if key in _DROPS:
        return ("", False) if key == "delivery-limit" and value < 0 else (_DROPS[key], True)
    if key in _LENGTHS:
        # All others were made with `reject-publish`, and what a queue was made with counts more.
        drops = (
            queue == names.DEAD_MESSAGES_QUEUE
            and definition.get("overflow", "drop-head") == "drop-head"
        )
        return (_DROPS_OLDEST, True) if drops else (_REFUSES, False)
    return "", False


def _remedy(policy: str, virtual_host: str) -> str:
    kind, _, name = policy.rpartition(" ")
    clear = "clear_operator_policy" if kind.startswith("operator") else "clear_policy"
    return (
        "Change its pattern so that it leaves Keepwarm's queues out, or remove it: "
        f"`rabbitmqctl {clear} -p {virtual_host} {name}`"
    )
