"""The report of a run: quality, speed, workers and startups."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from statistics import NormalDist, fmean
from typing import Any

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Connection, func, select

from services.contracts import INVALID, Run
from services.contracts.errors import StoreError
from services.store.progress import KnownRun, RunStatus, run_status
from services.store.schema import deliveries, outcomes
from services.store.startups import Startups, startups_of
from services.store.store import Store

_CONFIDENCE = 0.95
_CHUNK_ROWS = 10_000


class Quality(BaseModel):
    """Quality of the verdicts, over the `labelled` claims that have a verdict and a gold label.

    A verdict INVALID counts as wrong. `accuracy_interval` is Wilson's, at 95 % (Wilson 1927).
    `macro_f1` is the unweighted mean of F1 over the gold labels that occur. `confusion` maps gold
    label -> verdict -> claims; its columns are the prompt's labels and INVALID.
    """

    model_config = ConfigDict(frozen=True)

    labelled: int
    correct: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    macro_f1: float
    confusion: dict[str, dict[str, int]]


class Speed(BaseModel):
    """Speed from the first request to an engine to the last verdict stored, pauses included."""

    model_config = ConfigDict(frozen=True)

    wall_seconds: float
    claims_per_second: float
    prompt_tokens: int
    tokens_per_second: float
    reasoning_tokens: int = 0
    """Written by the model before its answers; `tokens_per_second` is of the prompts alone."""


class WorkerShare(BaseModel):
    """The work of one worker. Its requests overlap: `engine_seconds` may exceed the wall time."""

    model_config = ConfigDict(frozen=True)

    worker_id: str
    device: str
    verdicts: int
    duplicates: int
    prompt_tokens: int
    engine_seconds: float


class Report(BaseModel):
    """The report of a run. `verdicts` counts by label, `dead` by reason."""

    model_config = ConfigDict(frozen=True)

    status: RunStatus
    run: Run | None
    lines: int | None
    input: dict[str, Any] | None
    """The producer's InputSummary; None if it was not announced."""
    verdicts: dict[str, int]
    mean_mass: float | None = None
    """The mean share of the model's probability that the label words held; None without verdicts.
    """
    dead: dict[str, int]
    redelivered_batches: int
    quality: Quality | None
    """None if no claim with a verdict has a gold label."""
    speed: Speed | None
    """None while there is no verdict."""
    workers: tuple[WorkerShare, ...]
    startups: Startups | None
    """None if no worker reported a start during the run."""


def build_report(store: Store, known: KnownRun) -> Report:
    """Raises StoreError if the run is not in the store."""
    status = run_status(store, known.run_id)
    if status is None:
        raise StoreError(f"the store has no run {known.run_id}")
    labels = known.run.prompt.label_names if known.run else ()
    key = known.run_key
    with store.transaction() as connection:
        pairs = connection.execute(
            select(
                outcomes.c.gold,
                outcomes.c.label,
                func.count().label("claims"),
                func.sum(outcomes.c.mass).label("mass"),
            )
            .where(outcomes.c.run_key == key, outcomes.c.label.is_not(None))
            .group_by(outcomes.c.gold, outcomes.c.label)
        ).all()
        verdicts = dict.fromkeys((*labels, INVALID), 0)
        for pair in pairs:
            verdicts[pair.label] = verdicts.get(pair.label, 0) + pair.claims
        answered = sum(verdicts.values())
        dead = connection.execute(
            select(outcomes.c.reason, func.count())
            .where(outcomes.c.run_key == key, outcomes.c.reason.is_not(None))
            .group_by(outcomes.c.reason)
        ).all()
        redelivered = connection.execute(
            select(func.count()).where(deliveries.c.run_key == key, deliveries.c.attempt > 1)
        ).scalar_one()
        return Report(
            status=status,
            run=known.run,
            lines=None
            if status.total is None
            else status.total + (status.rejected or 0) + (status.repeated or 0),
            input=known.input and known.input.as_dict(),
            verdicts=verdicts,
            mean_mass=sum(pair.mass for pair in pairs) / answered if answered else None,
            dead=dict(dead),
            redelivered_batches=redelivered,
            quality=_quality(
                {(pair.gold, pair.label): pair.claims for pair in pairs if pair.gold is not None},
                labels,
            ),
            speed=_speed(connection, key),
            workers=_workers(connection, key),
            startups=known.run
            and startups_of(
                connection, key, known.run.context.context_id, complete=status.complete
            ),
        )


def quality_of(store: Store, known: KnownRun, among: Callable[[str], bool]) -> Quality | None:
    """The quality over the claims whose ids are `among` those wanted; None if none of them has a
    verdict and a gold label. Reads every verdict of the run.
    """
    query = (
        select(outcomes.c.claim_id, outcomes.c.gold, outcomes.c.label)
        .where(outcomes.c.run_key == known.run_key, outcomes.c.label.is_not(None))
        .where(outcomes.c.gold.is_not(None))
        .execution_options(yield_per=_CHUNK_ROWS)
    )
    pairs: Counter[tuple[str, str]] = Counter()
    with store.transaction() as connection:
        for row in connection.execute(query):
            if among(row.claim_id):
                pairs[row.gold, row.label] += 1
    return _quality(pairs, known.run.prompt.label_names if known.run else ())


def _quality(pairs: Mapping[tuple[str, str], int], labels: Sequence[str]) -> Quality | None:
    """`pairs`: the number of claims by gold label and verdict."""
    if not pairs:
        return None
    labelled = sum(pairs.values())
    correct = sum(claims for (gold, given), claims in pairs.items() if gold == given)
    golds = {gold for gold, _ in pairs}
    columns = [
        *labels,
        *sorted({label for pair in pairs for label in pair} - {*labels, INVALID}),
        INVALID,
    ]
    present = [label for label in columns if label in golds]
    confusion = {label: dict.fromkeys(columns, 0) for label in present}
    for (gold, given), claims in pairs.items():
        confusion[gold][given] = claims
    return Quality(
        labelled=labelled,
        correct=correct,
        accuracy=correct / labelled,
        accuracy_interval=wilson_interval(correct, labelled),
        macro_f1=fmean(_f1(label, confusion) for label in present),
        confusion=confusion,
    )


def wilson_interval(successes: int, trials: int) -> tuple[float, float]:
    """The 95 % confidence interval of a proportion (Wilson 1927), as scipy.stats' binomtest has it.

    Implemented here because importing scipy takes longer than a small run on a warm engine.
    """
    z = NormalDist().inv_cdf((1 + _CONFIDENCE) / 2)
    share = successes / trials
    middle = share + z**2 / (2 * trials)
    half = z * sqrt(share * (1 - share) / trials + z**2 / (4 * trials**2))
    scale = 1 + z**2 / trials
    return max(0.0, (middle - half) / scale), min(1.0, (middle + half) / scale)


def _f1(label: str, confusion: Mapping[str, Mapping[str, int]]) -> float:
    """Harmonic mean of precision and recall of one label; 0 if it was never right."""
    right = confusion[label][label]
    given = sum(row[label] for row in confusion.values())
    return 2 * right / (given + sum(confusion[label].values()))


def _speed(connection: Connection, run_key: int) -> Speed | None:
    start, end, fresh, tokens, written = connection.execute(
        select(
            func.min(deliveries.c.received_at - deliveries.c.engine_seconds),
            func.max(deliveries.c.received_at),
            func.sum(deliveries.c.fresh),
            func.sum(deliveries.c.prompt_tokens),
            func.coalesce(func.sum(deliveries.c.reasoning_tokens), 0),
        ).where(deliveries.c.run_key == run_key)
    ).one()
    if start is None:
        return None
    seconds = end - start
    return Speed(
        wall_seconds=seconds,
        claims_per_second=float(fresh) / seconds if seconds > 0 else 0.0,
        prompt_tokens=int(tokens),
        tokens_per_second=float(tokens) / seconds if seconds > 0 else 0.0,
        reasoning_tokens=int(written),
    )


def _workers(connection: Connection, run_key: int) -> tuple[WorkerShare, ...]:
    rows = connection.execute(
        select(
            deliveries.c.worker_id,
            deliveries.c.device,
            func.sum(deliveries.c.fresh).label("verdicts"),
            func.sum(deliveries.c.duplicates).label("duplicates"),
            func.sum(deliveries.c.prompt_tokens).label("prompt_tokens"),
            func.sum(deliveries.c.engine_seconds).label("engine_seconds"),
        )
        .where(deliveries.c.run_key == run_key)
        .group_by(deliveries.c.worker_id, deliveries.c.device)
        .order_by(func.sum(deliveries.c.fresh).desc())
    )
    return tuple(WorkerShare.model_validate(row._mapping) for row in rows)
