"""A worker's identity, and its choice of a context. Serving is tested with a real broker."""

from collections.abc import Callable
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from services.contracts import ContextDemand, ContextSpec, ControlUpdate, encode, load_settings
from services.contracts.errors import ModelError
from services.gpu_worker import Worker
from services.gpu_worker.scheduling import Situation, StartupEstimates
from services.gpu_worker.session import ContextSession
from tests.unit.clock import Clock
from tests.unit.gpu_worker.conftest import DEVICE


def test_an_unusable_model_is_an_error_before_anything_is_started(
    spec: ContextSpec, model_dir: Path, tmp_path: Path
) -> None:
    (model_dir / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json"):
        Worker(spec, DEVICE, load_settings(runtime_dir=tmp_path / "r"))


def test_two_workers_have_two_names(spec: ContextSpec, tmp_path: Path) -> None:
    settings = load_settings(runtime_dir=tmp_path / "run")
    workers = [Worker(spec, DEVICE, settings) for _ in range(2)]
    assert workers[0]._identity.worker_id != workers[1]._identity.worker_id
    assert workers[0]._identity.device == "Xeon"
    for worker in workers:
        worker._fixed_session.close()  # type: ignore[union-attr]


def test_a_context_that_failed_once_is_served_when_it_can_be_had_again(
    spec: ContextSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    settings = load_settings(runtime_dir=tmp_path / "run", cache_dir=tmp_path / "cache")
    worker = Worker(None, DEVICE, settings)
    estimates = StartupEstimates(DEVICE, settings, clock)
    line = ContextDemand(context=spec, claims_ready=10**6, claims_in_flight=0, workers_warm=0)
    worker._control.receive(encode(ControlUpdate(contexts=(line,))))
    wanted = Situation(None, True, 600.0, 0.0, None, {}, 0.0)
    served: list[str] = []
    hub = iter([ModelError("the hub has a hiccup")])
    waited = 0

    def pin(spec: ContextSpec, *_: object) -> ContextSpec:
        for error in hub:
            raise error
        return spec

    def serve(serving: ContextSession, _: object) -> None:
        served.append(serving.spec.context_id)
        worker.stop()

    def listen(estimates: StartupEstimates, _: object) -> ContextSpec | None:
        nonlocal waited
        chosen = worker._choose(estimates, wanted)
        if chosen is None:
            waited += 1
            clock.now += 1
        return chosen

    monkeypatch.setattr("services.gpu_worker.worker.pin_model", pin)
    monkeypatch.setattr(worker, "_serve", serve)
    monkeypatch.setattr(worker, "_first_context", listen)
    worker._serve_by_demand(estimates, None)  # type: ignore[arg-type]
    assert served == [spec.context_id]
    assert 5 <= waited <= 10  # and not at once


def test_a_context_that_is_not_accepted_from_runs_is_never_chosen(
    spec: ContextSpec, tmp_path: Path
) -> None:
    """With a producer's password anybody may publish it, with the most claims of all."""
    settings = load_settings(runtime_dir=tmp_path / "run", cache_dir=tmp_path / "cache")
    worker = Worker(None, DEVICE, settings)
    hostile = spec.model_copy(update={"engine_arguments": ("--worker-cls=evil.Worker",)})
    wanted = Situation(None, True, 600.0, 0.0, None, {}, 0.0)

    def heard(*contexts: ContextSpec) -> None:
        lines = tuple(
            ContextDemand(context=each, claims_ready=10**6, claims_in_flight=0, workers_warm=0)
            for each in contexts
        )
        worker._control.receive(encode(ControlUpdate(contexts=lines)))

    estimates = StartupEstimates(DEVICE, settings)
    heard(hostile)
    with capture_logs() as events:
        for _ in range(3):
            assert worker._choose(estimates, wanted) is None
    (event,) = [event for event in events if event["event"] == "context.refused"]
    assert event["context"] == hostile.context_id and "--worker-cls" in event["reason"]
    heard(hostile, spec)
    assert worker._choose(estimates, wanted) == spec
    assert [each.context_id for each in worker._accepted_contexts()] == [spec.context_id]


def test_a_worker_that_is_stopped_reads_no_more_weights(
    spec: ContextSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = load_settings(runtime_dir=tmp_path / "run", cache_dir=tmp_path / "cache")
    worker = Worker(None, DEVICE, settings)

    def pin(spec: ContextSpec, cache_dir: Path, watch: Callable[[int, int], None]) -> ContextSpec:
        assert cache_dir == tmp_path / "cache"
        watch(1, 10**12)
        worker.stop()
        watch(2, 10**12)
        raise AssertionError("it read on")

    monkeypatch.setattr("services.gpu_worker.worker.pin_model", pin)
    monkeypatch.setattr(worker, "_first_context", lambda *_: spec)
    with capture_logs() as events:
        worker._serve_by_demand(StartupEstimates(DEVICE, settings), None)  # type: ignore[arg-type]
    assert [event["event"] for event in events] == ["model.reading"]
