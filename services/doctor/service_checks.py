"""Checks of `keepwarm doctor` on the broker and the store."""

import os
import shutil
import threading
from collections.abc import Collection
from pathlib import Path

from services.broker import BrokerAddress, Declares, Publisher
from services.broker.inspection import missing_exchanges, writable_exchanges
from services.broker.policies import PolicyReport, check_policies
from services.broker.private_node import find_server
from services.broker.queue_counts import Counts
from services.broker.roles import ROLES, Role, roles_that_fit
from services.contracts import Settings, topology
from services.contracts.errors import BrokerError, BrokerRefused, StoreError
from services.doctor.findings import (
    GIB,
    RECOMMENDED_FREE_BYTES,
    Finding,
    ok,
    warning,
)
from services.node.file_systems import network_file_system

_ANSWER_SECONDS = 10.0


def private_broker(_: Settings) -> Finding:
    try:
        return ok(f"{find_server()}, which `keepwarm run` uses without --broker")
    except BrokerError as error:
        return warning(f"{error}; needed only for `keepwarm run` without --broker")


def broker(settings: Settings) -> Finding:
    """Raises BrokerError when the broker cannot be reached, refuses the user, has queues of another
    kind, or has policies that lose messages.
    """
    if settings.broker_url is None:
        return warning("not set (KEEPWARM_BROKER_URL), so only `keepwarm run` works")
    address = BrokerAddress.from_settings(settings)
    with Publisher(address, "doctor", window=1).open(_ANSWER_SECONDS) as link:
        counts = _counts(link)
    missing = missing_exchanges(address)
    missing += [queue for queue in topology.CORE_QUEUES if queue not in counts]
    if len(missing) == len(topology.CORE_EXCHANGES + topology.CORE_QUEUES):
        return warning(f"connected to {address}, which has no queues yet: a collector creates them")
    lengths = ", ".join(f"{queue} {count:,}" for queue, count in counts.items())
    if missing:
        return warning(
            f"connected to {address}; missing: {', '.join(missing)}. The next collector "
            f"creates them. Messages: {lengths}"
        )
    policies = check_policies(settings, limits=True)
    if losing := [str(harm) for harm in policies.problems if harm.loses_messages]:
        raise BrokerError(f"connected to {address}, but it would lose messages: {' '.join(losing)}")
    arguments, fitting, limited = _rights(address)
    message = (
        f"connected to {address}; {arguments}. Messages: {lengths}{_remarks(policies, limited)}"
    )
    if len(fitting) == len(ROLES):
        remarks = policies.problems or policies.unlimited or limited - policies.delivery_unlimited
        return warning(message) if remarks else ok(message)
    others = [role.name for role in ROLES if role not in fitting]
    return warning(
        f"{message}. This user has the permissions of: "
        f"{', '.join(role.name for role in fitting) or 'no role'}; not of: {', '.join(others)}. "
        "Not checked: reading from queues, and creating claims queues"
    )


def _remarks(policies: PolicyReport, limited: Collection[str]) -> str:
    """Further sentences about the queues."""
    remarks = [str(harm) for harm in policies.problems]
    if kept := sorted(set(limited) - policies.delivery_unlimited):
        remarks.append(
            f"{', '.join(kept)}: created before RabbitMQ 4, which drops a message that was "
            "returned 20 times (from 4.3 on: whose consumer was lost 20 times), unless a policy "
            "sets delivery-limit to -1 (docs/broker.md)"
        )
    if policies.unlimited:
        remarks.append(
            f"No limits on connections, channels and queues: {', '.join(policies.unlimited)}; "
            "rerun `keepwarm broker setup` to set them"
        )
    if policies.unknown:
        remarks.append(f"Policies were not checked: {policies.unknown}")
    return "".join(f". {each}" for each in remarks)


def _rights(address: BrokerAddress) -> tuple[str, list[Role], set[str]]:
    """A sentence about the queues' arguments, the roles whose permissions this user has, and the
    queues that have a limit on deliveries by default.

    Raises BrokerError.
    """
    may_declare, limited = True, set[str]()
    try:
        # All queues exist. Declaring them again makes the broker compare the arguments.
        with Publisher(address, "doctor", window=1, declares=Declares("unbound")).open(
            _ANSWER_SECONDS
        ) as link:
            limited = set(link.made_before_4)
    except BrokerRefused:
        may_declare = False
    arguments = (
        "its queues have the right arguments"
        if may_declare
        else "this user may not declare its queues, so their arguments were not compared"
    )
    roles = roles_that_fit(writable_exchanges(address), declares_core=may_declare)
    return arguments, roles, limited


def _counts(link: Publisher) -> Counts:
    """Raises BrokerError when no answer comes."""
    answered = threading.Event()
    counts: dict[str, int] = {}

    def receive(answer: Counts) -> None:
        counts.update(answer)
        answered.set()

    link.request_counts(topology.CORE_QUEUES, receive)
    if not answered.wait(_ANSWER_SECONDS):
        raise BrokerError(
            "the broker accepted the connection but did not report its queues' lengths; see its log"
        )
    return counts


def store(settings: Settings) -> Finding:
    """Raises StoreError when the store cannot be used."""
    from services.store.database import checked_url, redacted

    url = checked_url(settings)
    if url.get_backend_name() != "sqlite":
        return _schema(redacted(url), settings)
    file = Path(url.database or "")
    directory = next(parent for parent in file.absolute().parents if parent.exists())
    if not file.exists() and not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
        raise StoreError(
            f"{directory} cannot be written by user {os.geteuid()}, and SQLite writes files beside "
            f"{file.name}; fix its permissions, or name another store with KEEPWARM_STORE_URL"
        )
    kind = network_file_system(directory)
    if kind:
        raise StoreError(
            f"{file} is on {kind}, where SQLite can lose data; name a file on a local disk of the "
            "collector's node with KEEPWARM_STORE_URL, or use PostgreSQL"
        )
    free = shutil.disk_usage(directory).free
    message = f"{file}, {free / GIB:.1f} GiB free"
    if not file.exists():
        return ok(f"{message}; does not exist yet, the collector creates it")
    found = _schema(message, settings)
    if free < RECOMMENDED_FREE_BYTES:
        return warning(f"{found.message}; free some space before a large run")
    return found


def _schema(message: str, settings: Settings) -> Finding:
    from services.store.inspection import inspect_store
    from services.store.schema import SCHEMA_VERSION

    found = inspect_store(settings)
    if found.version is None:
        message = f"{message}; empty, the collector creates its tables"
    elif found.version != SCHEMA_VERSION:
        message = f"{message}; version {found.version}, which the next collector upgrades"
    if found.read_only:
        return warning(
            f"{message}; read-only for this user, which is enough for `status`, `report` and "
            f"`export`, but not for `collect`, `cancel` and `dead`: {found.read_only}"
        )
    return warning(message) if found.version not in (None, SCHEMA_VERSION) else ok(message)
