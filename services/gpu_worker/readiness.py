"""How long until this node has a context ready: the cost in the choice of what to take."""

import time
from collections.abc import Callable, Iterable

from services.contexts.caches import EngineCaches
from services.contexts.device import Device
from services.contexts.plan import EnginePlan
from services.contexts.records import live_records
from services.contexts.runtime_dir import open_runtime_dir
from services.contexts.template_process import is_imported
from services.contracts import ContextSpec, Settings
from services.contracts.backoff import growing_pause
from services.contracts.errors import KeeperError, KeepwarmError

# From host memory back to the GPU: a second for each few GiB of weights.
_WAKE_SECONDS = 5.0
# A context that failed here is tried again after about as long as the fault has lasted: a hiccup
# costs seconds, and a model that is missing for good a try each quarter or half of an hour.
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 10.0, 1800.0


class Readiness:
    """What is warm here, what starts took before, and what could not be had here of late."""

    def __init__(
        self, device: Device, settings: Settings, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._device = device
        self._settings = settings
        self._directory = open_runtime_dir(settings.runtime_dir)
        self._caches = EngineCaches(settings.cache_dir)
        self._clock = clock
        self._failures: dict[str, int] = {}
        self._not_before: dict[str, float] = {}

    def failed(self, context_id: str, error: KeepwarmError) -> float:
        """It could not be had, or not be kept. The seconds for which it is left to other nodes.

        A keeper that cannot be used is no fault of the context's: its pause does not grow.
        """
        failures = 1
        if not isinstance(error, KeeperError):
            failures = self._failures[context_id] = self._failures.get(context_id, 0) + 1
        pause = growing_pause(
            failures,
            first_seconds=_FIRST_PAUSE_SECONDS,
            longest_seconds=_LONGEST_PAUSE_SECONDS,
        )
        self._not_before[context_id] = self._clock() + pause
        return pause

    def answered(self, context_id: str) -> None:
        """It works here: whatever failed before is forgotten."""
        self._failures.pop(context_id, None)

    def may_try(self, context_id: str) -> bool:
        """False for a while after it has failed here."""
        return self._clock() >= self._not_before.get(context_id, 0.0)

    def seconds(self, contexts: Iterable[ContextSpec]) -> dict[str, float]:
        """By context id. One that was never here is taken to start like the slowest of those that
        were, and to be fetched first; on a node without any, nothing is known of it, and it is left
        out. Where no template is, imports come on top.
        """
        live = {record.name: record for record in live_records(self._directory)}
        starts = self._caches.recall_all()
        imports = max((start.phases.imports or 0.0 for start in starts.values()), default=0.0)
        if is_imported(self._directory):
            imports = 0.0
        slowest = max(
            (
                start.seconds_again + max(imports, start.phases.fetch or 0.0)
                for start in starts.values()
            ),
            default=None,
        )
        known: dict[str, float] = {}
        for spec in contexts:
            name = EnginePlan.of(spec, self._device, self._settings).name
            record, past = live.get(name), starts.get(name)
            if record is not None and record.state in ("warm", "asleep"):
                known[spec.context_id] = 0.0 if record.state == "warm" else _WAKE_SECONDS
            elif past is not None:
                known[spec.context_id] = past.seconds_again + imports
            elif slowest is not None:
                known[spec.context_id] = slowest
        return known
