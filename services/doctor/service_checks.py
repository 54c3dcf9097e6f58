"""What `keepwarm doctor` looks at around a node: the broker and the store."""

import os
import shutil
import threading
from collections.abc import Collection
from pathlib import Path

from services.broker import BrokerAddress, Declares, Publisher
from services.broker.inspection import missing_exchanges, writable
from services.broker.policies import Policies, ask_policies
from services.broker.private_node import find_server
from services.broker.queue_counts import Counts
from services.broker.roles import ROLES, Role, roles_that_fit
from services.contracts import Settings, topology
from services.contracts.errors import BrokerError, BrokerRefused, StoreError
from services.doctor.findings import GIB, ROOM_BYTES, Finding, note, shared_file_system, well

_ANSWER_SECONDS = 10.0


def private_broker(_: Settings) -> Finding:
    try:
        return well(f"{find_server()}, for `keepwarm run` without a broker")
    except BrokerError as error:
        return note(f"{error}; only `keepwarm run` without a broker needs it here")


def broker(settings: Settings) -> Finding:
    """Raises BrokerError when it cannot be reached, refuses us, or has queues of another kind."""
    if settings.broker_url is None:
        return note("none is named (KEEPWARM_BROKER_URL): only `keepwarm run` works")
    address = BrokerAddress.from_settings(settings)
    with Publisher(address, "doctor", window=1).open(_ANSWER_SECONDS) as link:
        counts = _counts(link)
    lacks = missing_exchanges(address)
    lacks += [queue for queue in topology.CORE_QUEUES if queue not in counts]
    if len(lacks) == len(topology.HOUSE_EXCHANGES + topology.CORE_QUEUES):
        return note(f"{address} takes us, and has no queues yet: a collector makes them")
    lengths = ", ".join(f"{queue} {count:,}" for queue, count in counts.items())
    if lacks:
        return note(
            f"{address} takes us, and lacks {', '.join(lacks)}: the next collector that starts "
            f"makes what is missing. Waiting: {lengths}"
        )
    policies = ask_policies(settings, limits=True)
    if losing := [str(harm) for harm in policies.problems if harm.loses_messages]:
        raise BrokerError(f"{address} takes us, and would lose messages: {' '.join(losing)}")
    arguments, fitting, limited = _rights(address)
    says = f"{address} takes us, {arguments}. Waiting: {lengths}{_told(policies, limited)}"
    if len(fitting) == len(ROLES):
        noted = policies.problems or policies.unlimited or limited - policies.delivery_unlimited
        return note(says) if noted else well(says)
    others = [role.name for role in ROLES if role not in fitting]
    return note(
        f"{says}. As far as it was tried, this user is right for: "
        f"{', '.join(role.name for role in fitting) or 'nothing'}; not for: {', '.join(others)}. "
        "Not tried: to read queues, and to make those of claims"
    )


def _told(policies: Policies, limited: Collection[str]) -> str:
    """What more there is to say of the queues."""
    told = [str(harm) for harm in policies.problems]
    if kept := sorted(set(limited) - policies.delivery_unlimited):
        told.append(
            f"{', '.join(kept)}: made before RabbitMQ 4, which gives up a message that was "
            "returned 20 times (from 4.3 on: whose consumer was lost 20 times), unless a policy "
            "sets delivery-limit to -1 (docs/broker.md)"
        )
    if policies.unlimited:
        told.append(
            f"Without limits on connections, channels and queues: {', '.join(policies.unlimited)}; "
            "`keepwarm broker setup`, run again, sets them"
        )
    if policies.unknown:
        told.append(f"Policies were not looked at: {policies.unknown}")
    return "".join(f". {each}" for each in told)


def _rights(address: BrokerAddress) -> tuple[str, list[Role], set[str]]:
    """What of the arguments, the roles that this user may play, and the queues that have a limit on
    deliveries by default. Raises BrokerError.
    """
    declares_core, limited = True, set[str]()
    try:
        # All are there: who may declares them once more, and the broker compares the arguments.
        with Publisher(address, "doctor", window=1, declares=Declares("unbound")).open(
            _ANSWER_SECONDS
        ) as link:
            limited = set(link.made_before_4)
    except BrokerRefused:
        declares_core = False
    arguments = (
        "and its queues are as they should be"
        if declares_core
        else "and this user may not make its queues, so their arguments were not compared"
    )
    return arguments, roles_that_fit(writable(address), declares_core=declares_core), limited


def _counts(link: Publisher) -> Counts:
    """Raises BrokerError when no answer comes."""
    heard = threading.Event()
    told: dict[str, int] = {}

    def hear(counts: Counts) -> None:
        told.update(counts)
        heard.set()

    link.request_counts(topology.CORE_QUEUES, hear)
    if not heard.wait(_ANSWER_SECONDS):
        raise BrokerError(
            "the broker took us and then did not say how long its queues are; see its log"
        )
    return told


def store(settings: Settings) -> Finding:
    """Raises StoreError when it cannot be used."""
    from services.store.database import checked_url, redacted

    url = checked_url(settings)
    if url.get_backend_name() != "sqlite":
        return _schema(redacted(url), settings)
    file = Path(url.database or "")
    directory = next(parent for parent in file.absolute().parents if parent.exists())
    if not file.exists() and not os.access(directory, os.W_OK | os.X_OK, effective_ids=True):
        raise StoreError(
            f"{directory} cannot be written by user {os.geteuid()}, and SQLite writes files beside "
            f"{file.name}; mend its permissions, or name another store with KEEPWARM_STORE_URL"
        )
    kind = shared_file_system(directory)
    if kind:
        raise StoreError(
            f"{file} is on {kind}, where SQLite can lose what it wrote; name a file on a disk of "
            "the collector's node with KEEPWARM_STORE_URL, or use PostgreSQL"
        )
    free = shutil.disk_usage(directory).free
    says = f"{file}, {free / GIB:.1f} GiB free"
    if not file.exists():
        return well(f"{says}; not there yet, the collector makes it")
    found = _schema(says, settings)
    if free < ROOM_BYTES:
        return note(f"{found.says}; make room before a large run")
    return found


def _schema(says: str, settings: Settings) -> Finding:
    from services.store.inspection import inspect_store
    from services.store.schema import SCHEMA_VERSION

    found = inspect_store(settings)
    if found.version is None:
        says = f"{says}; empty, the collector makes its tables"
    elif found.version != SCHEMA_VERSION:
        says = f"{says}; of version {found.version}, would be upgraded by the next collector"
    if found.read_only:
        return note(
            f"{says}; it can be read, as `status`, `report` and `export` do, and not be written, "
            f"as a collector, `cancel` and `dead` do: {found.read_only}"
        )
    return note(says) if found.version not in (None, SCHEMA_VERSION) else well(says)
