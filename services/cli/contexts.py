"""`keepwarm contexts list`, `warm`, `evict`, `logs` and `prune`."""

import json
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Annotated

import typer

from services.cli.context_options import (
    AdapterOption,
    AdapterRevisionOption,
    DTypeOption,
    EngineArgumentOption,
    MaxTokensOption,
    ModelOption,
    RevisionOption,
    context_from_flags,
)
from services.cli.logs import configure_logs
from services.cli.printable import printable
from services.contexts.borrowed_broker import warm_broker
from services.contexts.caches import EngineCaches
from services.contexts.keeper_client import drain, engines, node_device
from services.contexts.keeper_client import evict as evict_engines
from services.contexts.lease import EngineLease
from services.contexts.plan import EnginePlan
from services.contexts.protocol import ContextRecord
from services.contracts import Settings, load_settings
from services.contracts.errors import KeeperError, UsageError
from services.node.runtime_dir import engine_logs, open_runtime_dir
from services.node.signals import on_stop_signal

_MIB, _GIB = 1024**2, 1024**3

# In this module the type's name is a verb's.
Names = list[str]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object per line.")]


def warm(
    model: ModelOption = None,
    revision: RevisionOption = None,
    dtype: DTypeOption = "bfloat16",
    max_model_tokens: MaxTokensOption = 1024,
    engine_argument: EngineArgumentOption = None,
    adapter: AdapterOption = None,
    adapter_revision: AdapterRevisionOption = None,
) -> None:
    """Start an engine on this node before claims arrive.

    Returns when the engine is ready. Without a worker it stays for KEEPWARM_CONTEXT_IDLE_SECONDS.
    Without KEEPWARM_BROKER_URL it also starts a private RabbitMQ node for the next `keepwarm run`.
    """
    settings = load_settings()
    configure_logs(settings)
    context = context_from_flags(
        settings,
        model,
        revision,
        dtype,
        max_model_tokens,
        engine_argument,
        adapter,
        adapter_revision,
    )
    stop = threading.Event()
    stopped_by: dict[str, int] = {}

    def interrupted(number: int) -> None:
        stopped_by["signal"] = number
        stop.set()

    on_stop_signal(interrupted)
    lease = EngineLease(EnginePlan.of(context, node_device(settings), settings), settings)
    with ThreadPoolExecutor(1) as executor:
        if settings.broker_url is None:
            executor.submit(warm_broker, settings, stop.is_set)
        try:
            ready = lease.start(stop)
        finally:
            lease.close()
    if not ready:
        raise typer.Exit(128 + stopped_by["signal"])
    print(printable(lease.plan.name))


def evict(
    wanted: Annotated[
        Names | None,
        typer.Argument(
            metavar="NAME",
            help="Names of engines or contexts from `contexts list`, or their beginnings.",
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="All engines of this node, and its keeper.")
    ] = False,
) -> None:
    """Stop engines, even those in use. A worker that uses one starts it again."""
    settings = load_settings()
    if everything:
        if wanted:
            raise UsageError("--all takes no names; leave out --all or the names")
        stopped = drain(settings)
    elif wanted:
        records = _records(settings)
        chosen = [record for name in wanted for record in _of_one_context(records, name)]
        stopped = evict_engines(settings, tuple(record.name for record in chosen))
    else:
        raise UsageError("name engines, or use --all; `keepwarm contexts list` lists them")
    for name in stopped:
        print(printable(name))


def logs(
    wanted: Annotated[
        str,
        typer.Argument(
            metavar="NAME", help="The name of an engine or a context from `contexts list`."
        ),
    ],
) -> None:
    """Print the log of an engine, also of one that has ended or failed to start."""
    log = _log(open_runtime_dir(load_settings().runtime_dir), wanted)
    try:
        with log.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                print(printable(line), end="")
    except OSError as error:
        raise UsageError(f"{log} cannot be read: {error.strerror}") from error


def prune(
    older_than: Annotated[
        float,
        typer.Option(
            metavar="DAYS", min=0, help="Only caches unused for at least DAYS; 0 for all."
        ),
    ] = 30,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="List what would be removed, and remove nothing.")
    ] = False,
) -> None:
    """Remove compile caches that no engine has used for a long time, and print their sizes.

    Caches of running engines stay. An engine without its cache compiles again at its next start.
    `--dry-run --older-than 0` lists all caches.
    """
    settings = load_settings()
    caches = EngineCaches(settings.cache_dir)
    in_use = {record.name for record in _records(settings)}
    kept_bytes = removed_bytes = 0
    for cache in caches.find():
        old = cache.unused_seconds >= older_than * 86_400
        if old and cache.name not in in_use and (dry_run or caches.remove(cache)):
            removed_bytes += cache.size_bytes
            size = f"{cache.size_bytes / _MIB:,.1f} MiB"
            print(printable(f"{cache.name}  {size}, unused for {_ago(cache.unused_seconds)}"))
        else:
            kept_bytes += cache.size_bytes
    verb = "would be" if dry_run else "were"
    summary = (
        f"{removed_bytes / _MIB:,.1f} MiB {verb} removed, {kept_bytes / _MIB:,.1f} MiB are left in "
        f"{settings.cache_dir}"
    )
    print(printable(summary), file=sys.stderr)


def list(as_json: JsonOption = False) -> None:
    """List this node's engines: state, age, memory, workers, uses, and startup phases.

    The phases, in seconds: imports, fetch (weights to the node), load (weights to memory), compile
    (and warm-up), first token.
    """
    records = _records(load_settings())
    if as_json:
        for record in records:
            print(json.dumps(record.model_dump(mode="json")))
        return
    if not records:
        print("No engine is warm on this node. Start one with `keepwarm contexts warm`.")
        return
    for record in records:
        print(printable(_description(record)))


def _records(settings: Settings) -> Sequence[ContextRecord]:
    return engines(open_runtime_dir(settings.runtime_dir))


def _begins(name: str, wanted: str) -> bool:
    return name.startswith((wanted, f"ctx-{wanted}"))


def _of_one_context(records: Sequence[ContextRecord], wanted: str) -> Sequence[ContextRecord]:
    """The engines of one context: several when it has engines on several GPUs.

    Raises UsageError when no context, or more than one, has this name or beginning.
    """
    matching = [record for record in records if _begins(record.name, wanted)]
    if len({record.context.context_id for record in matching}) > 1:
        raise _ambiguous(wanted, [record.name for record in matching])
    if not matching:
        raise _unknown(wanted, records)
    return matching


def _log(directory: Path, wanted: str) -> Path:
    """The log of a running engine with this name, or else of one that has ended.

    Raises UsageError when no engine, or more than one, has this name or beginning.
    """
    records: Sequence[ContextRecord] = ()
    with suppress(KeeperError):  # the log may say why the keeper does not answer
        records = engines(directory)
    logs = {record.name: Path(record.log) for record in records if _begins(record.name, wanted)}
    if not logs:
        logs = {log.stem: log for log in engine_logs(directory) if _begins(log.stem, wanted)}
    if len(logs) > 1:
        raise _ambiguous(wanted, logs)
    if not logs:
        raise _unknown(wanted, records)
    return next(iter(logs.values()))


def _ambiguous(wanted: str, names: Iterable[str]) -> UsageError:
    return UsageError(f"several engine names begin with {wanted!r}; name one: {', '.join(names)}")


def _unknown(wanted: str, records: Sequence[ContextRecord]) -> UsageError:
    listed = ", ".join(record.name for record in records) or "none"
    return UsageError(f"no engine's name begins with {wanted!r}; engines on this node: {listed}")


def _description(record: ContextRecord) -> str:
    memory = "" if record.memory_bytes is None else f", {record.memory_bytes / _GIB:.1f} GiB"
    last = "now" if record.attached else f"{_ago(time.monotonic() - record.last_used)} ago"
    lines = [
        f"{record.name}  {Path(record.context.model).name} on {record.device}",
        f"  {record.state} for {_ago(record.seconds)}{memory}, {record.attached} workers now; used "
        f"{record.used} times, the last {last}",
    ]
    if record.adapters:
        lines.append(f"  adapters: {', '.join(record.adapters)}")
    if record.phases is not None:
        phases = record.phases.model_dump(exclude={"total"}, exclude_none=True)
        parts = ", ".join(f"{name.replace('_', ' ')} {took:.1f}" for name, took in phases.items())
        lines.append(f"  started in {record.phases.total:.1f} s: {parts}")
    elif record.progress:
        lines.append(f"  {record.progress}")
    return "\n".join(lines)


def _ago(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
