"""Gauges of runs, contexts, workers and queues, read at each scrape."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import inf
from typing import Self

from prometheus_client.core import GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from services.broker import Counts
from services.collector.demand import DemandEstimator
from services.collector.fleet import Fleet
from services.contracts import ContextDemand, WorkerHeartbeat, topology
from services.store import RunStatus, Store, run_statuses
from services.telemetry import BoundedLabels

_MAX_CONTEXTS = 100
_MAX_INFO_CHARS = 128
_MAX_READ_RUNS = 100
_MAX_RUNS = 20

_RUN_GAUGES = {
    "keepwarm_run_claims": ("Claims of the run; absent until all are sent.", "total"),
    "keepwarm_run_done_claims": ("Claims of the run that have a verdict.", "done"),
    "keepwarm_run_dead_claims": ("Dead claims of the run.", "dead"),
    "keepwarm_run_rejected_lines": ("Rejected lines of the run's file.", "rejected"),
    "keepwarm_run_duplicate_verdicts": (
        "Duplicate verdicts of the run, which were ignored.",
        "duplicates",
    ),
    "keepwarm_run_returned_claims": (
        "Claims of the run that workers returned unfinished.",
        "returned",
    ),
    "keepwarm_run_lost_claims": (
        "Claims of the run that were computed again, at most, because a worker was lost.",
        "lost_work",
    ),
    "keepwarm_run_claims_per_second": (
        "Claims per second, over the last minute with verdicts of the run.",
        "claims_per_second",
    ),
    "keepwarm_run_left_seconds": (
        "Seconds until the run is complete, at its current speed.",
        "eta_seconds",
    ),
    "keepwarm_run_complete": (
        "Whether every claim of the run has an outcome (1) or not (0).",
        "complete",
    ),
    "keepwarm_run_cancelled": ("Whether the run is cancelled (1) or not (0).", "cancelled"),
}
_CONTEXT_GAUGES = {
    "keepwarm_context_ready_claims": (
        "Claims waiting in the context's queue (an estimate).",
        "claims_ready",
    ),
    "keepwarm_context_in_flight_claims": (
        "Wanted claims that have left the queue and have no outcome yet (an estimate).",
        "claims_in_flight",
    ),
    "keepwarm_context_workers": ("Workers serving the context.", "workers_warm"),
}


@dataclass(frozen=True)
class RunsSnapshot:
    """The incomplete ones of the latest runs, then the latest complete ones."""

    statuses: tuple[RunStatus, ...] = ()
    read_at: float = -inf
    """By the monotonic clock."""

    @classmethod
    def read(cls, store: Store) -> Self:
        """Raises StoreError."""
        latest = run_statuses(store, _MAX_READ_RUNS)
        incomplete_first = sorted(latest, key=lambda status: status.complete)
        return cls(tuple(incomplete_first[:_MAX_RUNS]), time.monotonic())


class Gauges(Collector):
    """A collector in the sense of Prometheus: called at each scrape, never waits for the store."""

    def __init__(
        self, fleet: Fleet, demand: DemandEstimator, runs: Callable[[], RunsSnapshot]
    ) -> None:
        self._fleet = fleet
        self._demand = demand
        self._runs = runs
        self._device, self._label = BoundedLabels(), BoundedLabels()

    def describe(self) -> Iterable[Metric]:
        yield from _runs([], 0.0)
        yield from _verdicts([], self._label)
        yield from _contexts([])
        yield from _workers([], self._device)
        yield from _queues({})

    def collect(self) -> Iterable[Metric]:
        runs = self._runs()
        yield from _runs(runs.statuses, time.monotonic() - runs.read_at)
        yield from _verdicts(runs.statuses, self._label)
        yield from _contexts(self._demand.contexts[:_MAX_CONTEXTS])
        yield from _workers(self._fleet.workers(), self._device)
        yield from _queues(self._demand.counts)


def _runs(statuses: Sequence[RunStatus], age_seconds: float) -> Iterator[Metric]:
    info = GaugeMetricFamily(
        "keepwarm_run_info",
        "Always 1: the run's source, model and prompt.",
        labels=["run_id", "context_id", "source", "model", "prompt"],
    )
    for status in statuses:
        texts = (status.context_id, status.source, status.model, status.prompt)
        info.add_metric([status.run_id, *((text or "")[-_MAX_INFO_CHARS:] for text in texts)], 1)
    yield info
    for name, (meaning, field) in _RUN_GAUGES.items():
        family = GaugeMetricFamily(name, meaning, labels=["run_id"])
        for status in statuses:
            value = getattr(status, field)
            if value is not None:
                family.add_metric([status.run_id], value)
        yield family
    yield GaugeMetricFamily(
        "keepwarm_run_counts_age_seconds",
        "Age of the gauges of runs, in seconds; it grows while the store cannot be read.",
        value=age_seconds,
    )


def _verdicts(statuses: Sequence[RunStatus], label_label: BoundedLabels) -> Iterator[Metric]:
    verdicts = GaugeMetricFamily(
        "keepwarm_run_verdicts", "Verdicts of the run, by label.", labels=["run_id", "label"]
    )
    judged = GaugeMetricFamily(
        "keepwarm_run_gold_verdicts",
        "Verdicts of the run on claims with a gold label, by whether they agree with it.",
        labels=["run_id", "correct"],
    )
    for status in statuses:
        counts: Counter[str] = Counter()
        for label, number in status.verdicts.items():
            counts[label_label(label)] += number
        for label, number in counts.items():
            verdicts.add_metric([status.run_id, label], number)
        judged.add_metric([status.run_id, "true"], status.correct)
        judged.add_metric([status.run_id, "false"], status.judged - status.correct)
    yield verdicts
    yield judged


def _contexts(demand: Sequence[ContextDemand]) -> Iterator[Metric]:
    info = GaugeMetricFamily(
        "keepwarm_context_info", "Always 1: the context's model.", labels=["context_id", "model"]
    )
    for entry in demand:
        model = entry.context.model[-_MAX_INFO_CHARS:]
        info.add_metric([entry.context.context_id, model], 1)
    yield info
    for name, (meaning, field) in _CONTEXT_GAUGES.items():
        family = GaugeMetricFamily(name, meaning, labels=["context_id"])
        for entry in demand:
            family.add_metric([entry.context.context_id], getattr(entry, field))
        yield family


def _workers(
    heartbeats: Sequence[WorkerHeartbeat], device_label: BoundedLabels
) -> Iterator[Metric]:
    counts: Counter[tuple[str, str]] = Counter()
    speeds: defaultdict[str, float] = defaultdict(float)
    for heartbeat in heartbeats:
        device = device_label(heartbeat.device)
        counts[heartbeat.state, device] += 1
        if heartbeat.state == "serving":
            speeds[device] += heartbeat.claims_per_second or 0.0
    workers = GaugeMetricFamily(
        "keepwarm_workers",
        "Live workers, by state and device, from their heartbeats.",
        labels=["state", "device"],
    )
    for labels, number in counts.items():
        workers.add_metric(labels, number)
    yield workers
    speed = GaugeMetricFamily(
        "keepwarm_workers_claims_per_second",
        "Combined measured speed of the serving workers, by device.",
        labels=["device"],
    )
    for device, claims_per_second in speeds.items():
        speed.add_metric([device], claims_per_second)
    yield speed


def _queues(counts: Counts) -> Iterator[Metric]:
    family = GaugeMetricFamily(
        "keepwarm_queue_messages",
        "Messages waiting in one of Keepwarm's core queues, without unacknowledged ones.",
        labels=["queue"],
    )
    for queue in topology.CORE_QUEUES:
        if queue in counts:
            family.add_metric([queue], counts[queue])
    yield family
