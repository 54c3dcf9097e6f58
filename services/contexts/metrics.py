"""What is told of contexts: how starts went, their states, and what their engine says of itself."""

from collections import Counter as Counts
from collections.abc import Callable, Iterable, Iterator
from typing import get_args

from prometheus_client import Counter
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from services.contexts.engine_client import CompletionClient
from services.contexts.records import State
from services.contracts.errors import EngineRequestError

# What else an engine tells (Python, its process) has the names of what we tell of ourselves.
_ENGINE_PREFIX = "vllm:"

ATTACHES = Counter(
    "keepwarm_context_attaches_total",
    "Times that the worker asked for its context, by what came of it: warm, cold, joined (it was "
    "on its way for somebody else, or asleep), or failed.",
    ["outcome"],
)


WRONG_ENGINES = Counter(
    "keepwarm_contexts_wrong_total",
    "Engines that did not answer as they did when they were started, after a sleep or as a worker "
    "came, and were ended.",
)


class ContextStates(Collector):
    """How many contexts are in each state: all that a keeper keeps, or the one of a worker."""

    def __init__(self, states: Callable[[], Iterable[State]]) -> None:
        self._states = states

    def describe(self) -> Iterable[Metric]:
        return [_states({})]

    def collect(self) -> Iterable[Metric]:
        return [_states(Counts(self._states()))]


def _states(counts: "dict[State, int] | Counts[State]") -> Metric:
    family = GaugeMetricFamily(
        "keepwarm_contexts",
        "Contexts by state: all of the node on a keeper, its own on a worker.",
        labels=["state"],
    )
    for state in get_args(State):
        family.add_metric([state], counts.get(state, 0))
    return family


class EngineMetrics(Collector):
    """What the engine tells of itself, with our own. It is read and written anew, so that whatever
    it says, ours stay readable.
    """

    def __init__(self, client: Callable[[], CompletionClient | None]) -> None:
        """`client` is for the engine of the moment, None while there is none."""
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
        "Whether the engine told its own metrics (vllm:…) in time (1) or not (0).",
        value=float(up),
    )
