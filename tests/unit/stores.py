"""A store in a file, and messages for it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from services.contracts import (
    Claim,
    ClaimBatch,
    ContextReady,
    ContextSpec,
    DeadClaim,
    DeadReason,
    Label,
    PromptSpec,
    Run,
    RunAnnouncement,
    Totals,
    Verdict,
    VerdictBatch,
    WorkerHeartbeat,
    load_settings,
)
from services.store import Incoming, Store


@pytest.fixture(scope="session")
def prompt() -> PromptSpec:
    return PromptSpec(
        name="abc",
        labels=(
            Label(name="A", word="one"),
            Label(name="B B", word="two"),
            Label(name="C", word="three"),
        ),
    )


# Fixtures of the whole session are made once: a run of this prompt needs to be this folder's own.
@pytest.fixture(scope="session")
def run(context: ContextSpec, prompt: PromptSpec) -> Run:
    return Run(source="claims.jsonl", source_digest="src-00", context=context, prompt=prompt)


@pytest.fixture(scope="session")
def other_run(context: ContextSpec, prompt: PromptSpec) -> Run:
    return Run(source="other.jsonl", source_digest="src-01", context=context, prompt=prompt)


@pytest.fixture
def open_store(tmp_path: Path) -> Iterator[Callable[..., Store]]:
    """Opens stores and closes them after the test."""
    opened: list[Store] = []

    def open_one(place: str | Path = tmp_path / "store.sqlite", *, create: bool = True) -> Store:
        opened.append(Store.open(load_settings(store_url=str(place)), create=create))
        return opened[-1]

    yield open_one
    for store in opened:
        store.close()


@pytest.fixture
def store(open_store: Callable[..., Store]) -> Store:
    return open_store()


@pytest.fixture(scope="session")
def make(run: Run) -> SimpleNamespace:
    """`make.verdict(3, "A")`, `make.batch(…)`, `make.dead(4)`, `make.announced(claims=5)`,
    `make.returned(6, 7)`, `make.ready("start-1")`, `make.report("node-1")`.
    """

    def claim(number: int) -> Claim:
        return Claim(
            claim_id=f"c{number}",
            position=number,
            text=f"Claim {number}, Łódź.",
            evidence="Long.",
            gold="B B",
        )

    def verdict(number: int, label: str = "A", **changes: Any) -> Verdict:
        fields: dict[str, Any] = {
            "claim_id": f"c{number}",
            "position": number,
            "text": f"Claim {number}, Łódź.",
            "label": label,
            "probabilities": (0.5, 0.25, 0.25),
            "mass": 0.75,
            "raw_text": " one",
            "prompt_tokens": 10,
        }
        return Verdict(**{**fields, **changes})

    def batch(*verdicts: Verdict, of: Run = run, **changes: Any) -> VerdictBatch:
        fields: dict[str, Any] = {
            "run_id": of.run_id,
            "batch_id": "00000000-0",
            "labels": of.prompt.label_names,
            "verdicts": verdicts,
            "worker_id": "node-1",
            "device": "Tesla T4",
            "attempt": 1,
            "engine_seconds": 2.0,
        }
        return VerdictBatch(**{**fields, **changes})

    def dead(number: int, of: Run = run, **changes: Any) -> DeadClaim:
        fields: dict[str, Any] = {
            "run_id": of.run_id,
            "claim": claim(number),
            "reason": DeadReason.TOO_LONG,
            "detail": "it has 9,999 tokens",
            "worker_id": "node-1",
            "attempt": 1,
        }
        return DeadClaim(**{**fields, **changes})

    def announced(
        claims: int | None = None,
        repeated: int = 0,
        rejected: int = 0,
        of: Run = run,
        submission_id: str | None = None,
    ) -> RunAnnouncement:
        totals = None
        if claims is not None:
            lines = claims + repeated + rejected
            totals = Totals(lines=lines, claims=claims, repeated=repeated, rejected=rejected)
        # Each run is sent once, unless a test says otherwise.
        return RunAnnouncement(
            run=of, submission_id=submission_id or f"sub-{of.run_id}", totals=totals
        )

    def returned(*numbers: int, of: Run = run, **changes: Any) -> ClaimBatch:
        fields: dict[str, Any] = {
            "run": of,
            "submission_id": f"sub-{of.run_id}",
            "batch_id": "00000000-0",
            "claims": tuple(claim(number) for number in numbers),
        }
        return ClaimBatch(**{**fields, **changes})

    def ready(startup_id: str, **changes: Any) -> ContextReady:
        fields: dict[str, Any] = {
            "startup_id": startup_id,
            "worker_id": "node-1",
            "context_id": run.context.context_id,
            "device": "Tesla T4",
            "warm": False,
            "seconds": 60.0,
        }
        return ContextReady(**{**fields, **changes})

    def report(worker_id: str, **changes: Any) -> WorkerHeartbeat:
        fields: dict[str, Any] = {
            "worker_id": worker_id,
            "context_id": run.context.context_id,
            "device": "Tesla T4",
            "state": "serving",
            "claims_per_second": None,
        }
        return WorkerHeartbeat(**{**fields, **changes})

    def incoming(
        *messages: RunAnnouncement | VerdictBatch | DeadClaim | ClaimBatch | ContextReady,
    ) -> Incoming:
        return Incoming.of(messages)

    return SimpleNamespace(
        verdict=verdict,
        batch=batch,
        dead=dead,
        announced=announced,
        returned=returned,
        ready=ready,
        report=report,
        incoming=incoming,
        claim=claim,
    )
