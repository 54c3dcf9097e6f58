"""What `keepwarm collect` tells while it waits. That it ends is shown on a real broker."""

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from structlog.testing import capture_logs

from services.broker.policies import PolicyProblem, PolicyReport
from services.cli import collect
from services.cli.collect import RunWatch, stall_reason, watch_policies
from services.collector.collector import ContextStatus
from services.contracts import load_settings


def where(**changes: int | None) -> ContextStatus:
    return ContextStatus(
        **{"messages": 0, "workers": 0, "claims_held": 0, "dead_messages": 0, **changes}
    )


def status(**changes: Any) -> Any:
    fields = {"done": 0, "dead": 0, "total": 500, "context_id": "ctx-1"}
    return SimpleNamespace(**{**fields, **changes})


@pytest.mark.parametrize(
    ("run", "at", "part"),
    [
        (None, {}, "the run is not announced"),
        (status(context_id=None), {}, "the run is not announced"),
        (status(), {"messages": 8}, "no worker serves ctx-1; start one"),
        (status(), {"messages": 8, "workers": 2}, "workers serve the context or load it"),
        (status(), {"workers": 1, "claims_held": 64}, "claims are in flight at workers"),
        (status(total=None), {}, "the submission is not complete"),
        (status(), {"dead_messages": 3}, "`keepwarm dead retry` sends them again"),
        (status(), {}, "Submit the file again with this store"),
    ],
)
def test_the_most_likely_reason_for_a_stall_has_a_next_step(
    run: Any, at: dict[str, int], part: str
) -> None:
    assert part in stall_reason(run, where(**at))


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    fake = SimpleNamespace(now=1_000.0)
    monkeypatch.setattr(collect, "time", SimpleNamespace(monotonic=lambda: fake.now))
    yield fake


def test_a_run_that_gains_nothing_is_reported_repeatedly_and_ever_less_often(
    clock: SimpleNamespace,
) -> None:
    watch = RunWatch("run-1")
    warned_at: list[float] = []
    for second in range(0, 400, 2):
        clock.now = 1_000.0 + second
        with capture_logs() as logs:
            done = 1 if second < 100 else 2
            watch.check(status(done=done), lambda _: where(messages=3))
        warned_at += [second for each in logs if each["event"] == "run.waiting"]
    assert warned_at == [30, 90, 130, 190, 310]


def test_without_a_run_to_wait_for_no_wait_is_reported(clock: SimpleNamespace) -> None:
    watch = RunWatch(None)
    with capture_logs() as logs:
        for _ in range(100):
            clock.now += 60
            watch.check(None, lambda _: where())
    assert logs == []


def test_dead_messages_are_reported_whenever_there_are_more(clock: SimpleNamespace) -> None:
    watch = RunWatch(None)
    with capture_logs() as logs:
        for count in (0, 2, 2, 5, 1, 2):
            there = where(dead_messages=count)
            watch.check(None, lambda _, there=there: there)
            watch.check(None, lambda _: where(dead_messages=99))  # not so soon
            clock.now += 2
    assert [each["messages"] for each in logs] == [2, 5, 2]
    assert all("keepwarm dead list" in each["next_step"] for each in logs)


def test_a_policy_that_is_set_while_it_collects_is_reported_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    harm = PolicyProblem("policy site", "message-ttl", 1, ("runs",), True, "given up", "Remove it.")
    answers = [
        PolicyReport(unknown="nobody answers"),
        PolicyReport(),
        PolicyReport((harm,)),
        PolicyReport((harm,)),
    ]
    looked = threading.Event()

    def ask(_: object) -> PolicyReport:
        if len(answers) > 1:
            return answers.pop(0)
        looked.set()
        return answers[0]

    monkeypatch.setattr(collect, "check_policies", ask)
    monkeypatch.setattr(collect, "_POLICY_SECONDS", 0.001)
    stop = threading.Event()
    with capture_logs() as logs:
        watch_policies(load_settings(), stop)
        assert looked.wait(60)
        stop.set()
    assert [each["event"] for each in logs] == ["broker.policies_unknown", "broker.policy"]
