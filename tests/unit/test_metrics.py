"""All metrics of the house: their names, their labels, and the page that tells of them."""

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

ROOMS = ("broker", "producer", "contexts", "gpu_worker", "collector")
# What tells one claim, one worker or one message from another would be a series for each.
LABELS = {
    *("link", "became", "outcome", "label", "reason", "why", "phase", "device", "use"),
    *("correct", "kind", "state", "queue"),
}
OF_THE_COLLECTOR = {"run_id", "context_id", "source", "model", "prompt"}
UNITS = ("_seconds", "_claims", "_lines", "_verdicts", "_messages", "_batches", "_per_second")
UNITLESS = {
    *("keepwarm_broker_connected", "keepwarm_broker_blocked", "keepwarm_batches_in_hand"),
    *("keepwarm_contexts", "keepwarm_workers", "keepwarm_context_workers"),
    *("keepwarm_engine_metrics_up", "keepwarm_run_complete", "keepwarm_run_cancelled"),
    "keepwarm_store_waiting",
}


GAUGES = Gauges(Fleet(), DemandEstimator(None, load_settings(), Fleet()), None)  # type: ignore[arg-type]
"""Of a collector that knows of nothing."""


class Told(NamedTuple):
    """A metric, as it is on the page and in the code."""

    name: str
    type: str
    labels: tuple[str, ...]
    meaning: str


def defined() -> Iterator[Told]:
    for room in ROOMS:
        module = importlib.import_module(f"services.{room}.metrics")
        for metric in vars(module).values():
            if isinstance(metric, MetricWrapperBase):
                name = metric._name + ("_total" if metric._type == "counter" else "")
                yield Told(name, metric._type, tuple(metric._labelnames), metric._documentation)
    nothing: list[Collector] = [ContextStates(list), EngineMetrics(lambda: None), GAUGES]
    for collector in nothing:
        for family in collector.describe():
            labels = tuple(getattr(family, "_labelnames", ()))
            yield Told(family.name, family.type, labels, family.documentation)


METRICS = list(defined())


def names(told: Told) -> str:
    return told.name


@pytest.mark.parametrize("told", METRICS, ids=names)
def test_a_name_follows_the_conventions(told: Told) -> None:
    """https://prometheus.io/docs/practices/naming/"""
    assert re.fullmatch(r"keepwarm(_[a-z]+)+", told.name)
    assert told.name.endswith("_total") == (told.type == "counter")
    assert "_milli" not in told.name and "_minutes" not in told.name
    if told.type == "histogram":
        assert told.name.endswith("_seconds")
    if told.type == "gauge":
        assert told.name.endswith((*UNITS, "_info")) or told.name in UNITLESS | {
            "keepwarm_run_claims"
        }
    assert told.meaning.endswith(".")


@pytest.mark.parametrize("told", METRICS, ids=names)
def test_labels_are_few_and_of_few_values(told: Told) -> None:
    gauges_of_the_collector = told.name.startswith(("keepwarm_run_", "keepwarm_context_"))
    allowed = LABELS | (
        OF_THE_COLLECTOR if told.type == "gauge" and gauges_of_the_collector else set()
    )
    assert set(told.labels) <= allowed


def test_each_is_defined_once() -> None:
    assert len({told.name for told in METRICS}) == len(METRICS)


def test_nothing_of_the_house_is_told_that_is_not_defined_so() -> None:
    told = {family.name for family in REGISTRY.collect() if family.name.startswith("keepwarm")}
    assert told <= {each.name.removesuffix("_total") for each in METRICS}


def test_the_page_tells_of_each_as_the_code_does(repository: Path) -> None:
    page = (repository / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(keepwarm_\w+)` \| (\w+) \| (.*?) \| (.+) \|$", page, re.MULTILINE)
    on_the_page = [
        Told(name, kind, tuple(re.findall(r"`(\w+)`", labels)), meaning.replace("\\|", "|"))
        for name, kind, labels, meaning in rows
    ]
    assert sorted(on_the_page) == sorted(METRICS)
