"""`keepwarm contexts list`, `warm`, `evict`, `logs` and `prune`."""

import json
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from services.cli.shown import shown
from services.contexts.borrowed_broker import warm_broker
from services.contexts.caches import EngineCaches
from services.contexts.lease import EngineLease, drain
from services.contexts.lease import evict as evict_engines
from services.contexts.plan import EnginePlan
from services.contexts.records import ContextRecord, live_records
from services.contexts.start_keeper import node_device
from services.contracts import Settings, load_settings
from services.contracts.errors import UsageError
from services.node.runtime_dir import engine_logs, open_runtime_dir
from services.node.signals import on_stop_signal

_MIB, _GIB = 1024**2, 1024**3

# In this module the type's name is a verb's.
Names = list[str]
JsonOption = Annotated[bool, typer.Option("--json", help="One JSON object a line.")]


def warm(
    model: ModelOption = None,
    revision: RevisionOption = None,
    dtype: DTypeOption = "bfloat16",
    max_model_tokens: MaxTokensOption = 1024,
    engine_argument: EngineArgumentOption = None,
    adapter: AdapterOption = None,
    adapter_revision: AdapterRevisionOption = None,
) -> None:
    """Prepare a context on this node before any claims come.

    Returns when it is warm. Without a worker it stays so for KEEPWARM_CONTEXT_IDLE_SECONDS. Where
    no broker is named, a private one is made ready as well, for the next `keepwarm run`.
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
    attachment = EngineLease(EnginePlan.of(context, node_device(settings), settings), settings)
    with ThreadPoolExecutor(1) as meanwhile:
        if settings.broker_url is None:
            meanwhile.submit(warm_broker, settings, stop.is_set)
        try:
            ready = attachment.start(stop)
        finally:
            attachment.close()
    if not ready:
        raise typer.Exit(128 + stopped_by["signal"])
    print(shown(attachment.plan.name))


def evict(
    wanted: Annotated[
        Names | None,
        typer.Argument(
            metavar="NAME",
            help="Engines or contexts, as `contexts list` names them, or their beginnings.",
        ),
    ] = None,
    everything: Annotated[
        bool, typer.Option("--all", help="Every engine of this node, and its keeper.")
    ] = False,
) -> None:
    """Stop engines, whether workers use them or not. A worker that does starts its own again."""
    settings = load_settings()
    records = _records(settings)
    if everything:
        if wanted:
            raise UsageError("--all needs no names; leave one of the two out")
        drain(settings)
        left = {record.name for record in _records(settings)}
        gone = tuple(record.name for record in records if record.name not in left)
    elif wanted:
        going = [record for name in wanted for record in _of_one_context(records, name)]
        gone = evict_engines(settings, tuple(record.name for record in going))
    else:
        raise UsageError("name what is to go, or use --all; `keepwarm contexts list` shows what is")
    for name in gone:
        print(shown(name))


def logs(
    wanted: Annotated[
        str,
        typer.Argument(metavar="NAME", help="An engine or a context, as `contexts list` names it."),
    ],
) -> None:
    """Print an engine's own log; of one that is no more, or never came up, what it left."""
    log = _log(open_runtime_dir(load_settings().runtime_dir), wanted)
    try:
        with log.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                print(shown(line), end="")
    except OSError as error:
        raise UsageError(f"{log} cannot be read: {error.strerror}") from error


def prune(
    older_than: Annotated[
        float,
        typer.Option(
            metavar="DAYS", min=0, help="Those that were unused for so long; 0 for every one."
        ),
    ] = 30,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be removed, and remove nothing.")
    ] = False,
) -> None:
    """Remove compile caches that no engine has used for long, and say how large each was.

    Caches of engines that are here stay. An engine whose cache is gone compiles again at its next
    start. `--dry-run --older-than 0` lists all of them.
    """
    settings = load_settings()
    caches = EngineCaches(settings.cache_dir)
    in_use = {record.name for record in _records(settings)}
    stay_bytes = going_bytes = 0
    for cache in caches.find():
        old = cache.unused_seconds >= older_than * 86_400
        if old and cache.name not in in_use and (dry_run or caches.remove(cache)):
            going_bytes += cache.size_bytes
            size = f"{cache.size_bytes / _MIB:,.1f} MiB"
            print(shown(f"{cache.name}  {size}, unused for {_ago(cache.unused_seconds)}"))
        else:
            stay_bytes += cache.size_bytes
    went = "would be" if dry_run else "were"
    summary = (
        f"{going_bytes / _MIB:,.1f} MiB {went} removed, {stay_bytes / _MIB:,.1f} MiB stay in "
        f"{settings.cache_dir}"
    )
    print(shown(summary), file=sys.stderr)


def list(as_json: JsonOption = False) -> None:
    """What is warm on this node: since when, how large, how often used, how long it took.

    A start is told by its phases in seconds: imports, fetch (weights to the node), load (weights to
    memory), compile (and warm-up), first token.
    """
    records = _records(load_settings())
    if as_json:
        for record in records:
            print(json.dumps(record.model_dump(mode="json")))
        return
    if not records:
        print("Nothing is warm on this node. `keepwarm contexts warm` prepares a context.")
        return
    for record in records:
        print(shown(_told(record)))


def _records(settings: Settings) -> Sequence[ContextRecord]:
    return live_records(open_runtime_dir(settings.runtime_dir))


def _begins(name: str, wanted: str) -> bool:
    return name.startswith((wanted, f"ctx-{wanted}"))


def _of_one_context(records: Sequence[ContextRecord], wanted: str) -> Sequence[ContextRecord]:
    """Several where it has an engine on each of several GPUs, say. Raises UsageError for none, and
    for the beginning of several contexts' names.
    """
    matching = [record for record in records if _begins(record.name, wanted)]
    if len({record.context.context_id for record in matching}) > 1:
        raise _ambiguous(wanted, [record.name for record in matching])
    if not matching:
        raise _unknown(wanted, records)
    return matching


def _log(directory: Path, wanted: str) -> Path:
    """Of an engine that lives; where none is called so, of one that left it behind. Raises
    UsageError when there is none, or several.
    """
    records = live_records(directory)
    logs = {record.name: Path(record.log) for record in records if _begins(record.name, wanted)}
    if not logs:
        logs = {log.stem: log for log in engine_logs(directory) if _begins(log.stem, wanted)}
    if len(logs) > 1:
        raise _ambiguous(wanted, logs)
    if not logs:
        raise _unknown(wanted, records)
    return next(iter(logs.values()))


def _ambiguous(wanted: str, names: Iterable[str]) -> UsageError:
    return UsageError(f"several engines begin with {wanted!r}; name one: {', '.join(names)}")


def _unknown(wanted: str, records: Sequence[ContextRecord]) -> UsageError:
    listed = ", ".join(record.name for record in records) or "nothing at all"
    return UsageError(f"no engine here begins with {wanted!r}; warm on this node: {listed}")


def _told(record: ContextRecord) -> str:
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
    elif record.says:
        lines.append(f"  {record.says}")
    return "\n".join(lines)


def _ago(seconds: float) -> str:
    for size, unit in ((86_400, "d"), (3_600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.0f} s"
