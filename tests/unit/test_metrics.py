"""All of Keepwarm's metrics: their names, labels and documentation."""

import importlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from prometheus_client import REGISTRY
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.registry import Collector

from services.collector.demand import DemandEstimator
from services.collector.fleet import Fleet
from services.collector.gauges import Gauges
from services.contexts.metrics import ContextStates, EngineMetrics
from services.contracts import load_settings

PACKAGES = ("broker", "producer", "contexts", "gpu_worker", "collector")
# A label that identifies a claim, a worker or a message would be a series for each.
LABELS = {
    *("link", "became", "outcome", "label", "reason", "why", "phase", "device", "use"),
    *("correct", "kind", "state", "queue"),
}
OF_THE_COLLECTOR = {"run_id", "context_id", "source", "model", "prompt"}
UNITS = ("_seconds", "_claims", "_lines", "_verdicts", "_messages", "_batches", "_per_second")
UNITLESS = {
    *("keepwarm_broker_connected", "keepwarm_broker_blocked", "keepwarm_batches_in_flight"),
    *("keepwarm_contexts", "keepwarm_workers", "keepwarm_context_workers"),
    *("keepwarm_engine_metrics_up", "keepwarm_run_complete", "keepwarm_run_cancelled"),
    *("keepwarm_store_waiting", "keepwarm_unlisted_workers"),
}


GAUGES = Gauges(Fleet(), DemandEstimator(None, load_settings(), Fleet()), None)  # type: ignore[arg-type]
"""The gauges of a collector without data."""


class MetricInfo(NamedTuple):
    """A metric, as defined in the code and documented on the page."""

    name: str
    type: str
    labels: tuple[str, ...]
    meaning: str


def defined() -> Iterator[MetricInfo]:
    for package in PACKAGES:
        module = importlib.import_module(f"services.{package}.metrics")
        for metric in vars(module).values():
            if isinstance(metric, MetricWrapperBase):
                name = metric._name + ("_total" if metric._type == "counter" else "")
                yield MetricInfo(
                    name, metric._type, tuple(metric._labelnames), metric._documentation
                )
    nothing: list[Collector] = [ContextStates(list), EngineMetrics(lambda: None), GAUGES]
    for collector in nothing:
        for family in collector.describe():
            labels = tuple(getattr(family, "_labelnames", ()))
            yield MetricInfo(family.name, family.type, labels, family.documentation)


METRICS = list(defined())


def metric_name(metric: MetricInfo) -> str:
    return metric.name


@pytest.mark.parametrize("metric", METRICS, ids=metric_name)
def test_a_name_follows_the_conventions(metric: MetricInfo) -> None:
    """https://prometheus.io/docs/practices/naming/"""
    assert re.fullmatch(r"keepwarm(_[a-z]+)+", metric.name)
    assert metric.name.endswith("_total") == (metric.type == "counter")
    assert "_milli" not in metric.name and "_minutes" not in metric.name
    if metric.type == "histogram":
        assert metric.name.endswith("_seconds")
    if metric.type == "gauge":
        assert metric.name.endswith((*UNITS, "_info")) or metric.name in UNITLESS | {
            "keepwarm_run_claims"
        }
    assert metric.meaning.endswith(".")


@pytest.mark.parametrize("metric", METRICS, ids=metric_name)
def test_labels_are_few_and_of_few_values(metric: MetricInfo) -> None:
    gauges_of_the_collector = metric.name.startswith(("keepwarm_run_", "keepwarm_context_"))
    allowed = LABELS | (
        OF_THE_COLLECTOR if metric.type == "gauge" and gauges_of_the_collector else set()
    )
    assert set(metric.labels) <= allowed


def test_each_metric_is_defined_once() -> None:
    assert len({metric.name for metric in METRICS}) == len(METRICS)


def test_every_exported_metric_of_ours_is_defined_in_the_code() -> None:
    exported = {family.name for family in REGISTRY.collect() if family.name.startswith("keepwarm")}
    assert exported <= {each.name.removesuffix("_total") for each in METRICS}


def test_the_page_documents_each_metric_as_the_code_defines_it(repository: Path) -> None:
    page = (repository / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(keepwarm_\w+)` \| (\w+) \| (.*?) \| (.+) \|$", page, re.MULTILINE)
    on_the_page = [
        MetricInfo(name, kind, tuple(re.findall(r"`(\w+)`", labels)), meaning.replace("\\|", "|"))
        for name, kind, labels, meaning in rows
    ]
    assert sorted(on_the_page) == sorted(METRICS)
