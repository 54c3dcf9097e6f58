"""Metrics of contexts: outcomes of attaches, states, and the engine's own metrics."""

from collections import Counter as Counts
from collections.abc import Callable, Iterable, Iterator
from typing import get_args

from prometheus_client import Counter
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from services.contexts.engine_client import EngineClient
from services.contexts.protocol import State
from services.contracts.errors import EngineRequestError

# An engine's other metrics (Python, its process) have the same names as ours.
_ENGINE_PREFIX = "vllm:"

ATTACHES = Counter(
    "keepwarm_context_attaches_total",
    "Times that the worker requested its context, by outcome: warm, cold, joined (the engine was "
    "starting for another worker, or asleep), or failed.",
    ["outcome"],
)


WRONG_ENGINES = Counter(
    "keepwarm_contexts_wrong_total",
    "Engines stopped because their canary answers had changed, after a sleep or when a worker "
    "attached.",
)


class ContextStates(Collector):
    """How many contexts are in each state: all of a keeper, or the one of a worker."""

    def __init__(self, states: Callable[[], Iterable[State]]) -> None:
        self._states = states

    def describe(self) -> Iterable[Metric]:
        return [_states({})]

    def collect(self) -> Iterable[Metric]:
        return [_states(Counts(self._states()))]


def _states(counts: "dict[State, int] | Counts[State]") -> Metric:
    family = GaugeMetricFamily(
        "keepwarm_contexts",
        "Contexts by state: on a keeper all of its node, on a worker its own.",
        labels=["state"],
    )
    for state in get_args(State):
        family.add_metric([state], counts.get(state, 0))
    return family


class EngineMetrics(Collector):
    """The engine's own metrics, parsed and written again, so that an invalid page of the engine
    does not make ours unreadable.
    """

    def __init__(self, client: Callable[[], EngineClient | None]) -> None:
        """`client` returns the current engine's client, or None without an engine."""
        self._client = client

    def describe(self) -> Iterable[Metric]:
        return [_engine_metrics_up(False)]

    def collect(self) -> Iterator[Metric]:
        client = self._client()
        families: list[Metric] = []
        if client is not None:
            try:
                families = list(text_string_to_metric_families(client.metrics()))
            except (EngineRequestError, ValueError):
                families = []
        yield _engine_metrics_up(bool(families))
        seen: set[str] = set()
        for family in families:
            if family.name.startswith(_ENGINE_PREFIX) and family.name not in seen:
                seen.add(family.name)
                yield family


def _engine_metrics_up(up: bool) -> Metric:
    return GaugeMetricFamily(
        "keepwarm_engine_metrics_up",
        "Whether the engine returned its own metrics (vllm:…) in time (1) or not (0).",
        value=float(up),
    )
