"""How long until this node has a context ready: the cost in the choice of what to take."""

from collections.abc import Iterable

from services.contexts.caches import EngineCaches
from services.contexts.device import Device
from services.contexts.plan import EnginePlan
from services.contexts.records import live_records
from services.contexts.runtime_dir import open_runtime_dir
from services.contracts import ContextSpec, Settings

# From host memory back to the GPU: a second for each few GiB of weights.
_WAKE_SECONDS = 5.0


class Readiness:
    """What is warm here, what starts took before, and what cannot be had here."""

    def __init__(self, device: Device, settings: Settings) -> None:
        self._device = device
        self._settings = settings
        self._directory = open_runtime_dir(settings.runtime_dir)
        self._caches = EngineCaches(settings.cache_dir)
        self.unusable: set[str] = set()
        """Contexts that cannot be had on this node."""

    def give_up(self, context_id: str) -> None:
        """It cannot be had on this node: no such model, or no engine for it."""
        self.unusable.add(context_id)

    def seconds(self, contexts: Iterable[ContextSpec]) -> dict[str, float]:
        """By context id. One that was never here is taken to start like the slowest of those that
        were; on a node without any, nothing is known of it, and it is left out.
        """
        live = {record.name: record for record in live_records(self._directory)}
        slowest = max(self._caches.all_seconds(), default=None)
        known: dict[str, float] = {}
        for spec in contexts:
            name = EnginePlan.of(spec, self._device, self._settings).name
            record, past = live.get(name), self._caches.recall(name)
            if record is not None and record.state in ("warm", "asleep"):
                known[spec.context_id] = 0.0 if record.state == "warm" else _WAKE_SECONDS
            elif past is not None and past.phases.total is not None:
                known[spec.context_id] = past.phases.total
            elif slowest is not None:
                known[spec.context_id] = slowest
        return known
