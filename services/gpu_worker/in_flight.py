"""A batch in a worker's hands, from its delivery until every claim of it is accounted for."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from services.broker import Consumer, Delivery, Outgoing, Publisher
from services.broker.delivery import history_headers
from services.contracts import (
    INVALID,
    Claim,
    ClaimBatch,
    DeadClaim,
    Verdict,
    VerdictBatch,
    topology,
)
from services.contracts.bounds import MAX_DETAIL_CHARS
from services.contracts.errors import MessageInvalid
from services.contracts.proofs import verdict_proof
from services.gpu_worker.crashes import Crash, Key
from services.gpu_worker.inference import Declined, Outcome, Refusal
from services.gpu_worker.metrics import (
    BATCH_SECONDS,
    DEAD,
    INVALID_VERDICTS,
    REDELIVERED,
    RETURNED,
    VERDICTS,
)
from services.telemetry import BoundedLabels

T = TypeVar("T")

# What is said of a claim that an engine cannot answer through no fault of the claim's.
_UNABLE = "unable"

_label = BoundedLabels()


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """Who answers."""

    worker_id: str
    device: str


class InFlightBatch:
    """Remembers what became of each claim; at the end tells the broker all of it at once.

    `open` maps the places of claims without an outcome to the failures of an engine that they were
    part of.
    """

    def __init__(self, delivery: Delivery, engine: str = "", patience_seconds: float = 0) -> None:
        """`engine` is the name of ours. Claims that it cannot answer are dead once they have waited
        `patience_seconds` for another one.

        Raises MessageInvalid when the delivery is not a batch of claims.
        """
        self.delivery = delivery
        self.batch = delivery.message(ClaimBatch)
        self.open = dict.fromkeys(range(len(self.batch.claims)), delivery.failures)
        self.waited_seconds = delivery.waited_seconds
        self._declined_before = delivery.declined
        self._engine = engine
        self._patience_seconds = patience_seconds
        self._declined: dict[int, str] = {}
        self.crashes: dict[int, Crash] = {}
        """What workers of this node died with, by place."""
        # Each with the place of its claim:
        self._verdicts: list[tuple[int, Verdict]] = []
        self._dead: list[tuple[int, Refusal, int]] = []
        self._engine_seconds = 0.0
        self._published = self._confirmed = 0
        self._settled = False
        self._lock = threading.Lock()
        if delivery.redelivered:
            REDELIVERED.inc(len(self.batch.claims))

    @property
    def suspect(self) -> bool:
        """Whether an engine has failed with these claims before."""
        return any(self.open.values())

    def claims(self, places: Sequence[int]) -> list[Claim]:
        return [self.batch.claims[place] for place in places]

    def keys(self, places: Iterable[int]) -> list[Key]:
        """What the claims are called where crashes are recorded."""
        return [(self.batch.run.run_id, self.batch.claims[place].claim_id) for place in places]

    @property
    def engine_seconds(self) -> float:
        """How long the engine was asked about its claims."""
        return self._engine_seconds

    def note(self, places: Sequence[int], outcome: Outcome) -> None:
        """Take in what became of the claims at `places`, in the order they were asked in."""
        self._engine_seconds += outcome.engine_seconds
        for index, verdict in outcome.verdicts.items():
            del self.open[places[index]]
            self._verdicts.append((places[index], verdict))
        for index, refusal in outcome.refused.items():
            self.mark_dead(places[index], refusal)
        for index, declined in outcome.declined.items():
            self.decline(places[index], declined)

    def record_failure(self, places: Sequence[int], *, alone: bool = False) -> None:
        """An engine failed with those of the claims that are open still, but for those that it did
        not take. In company that makes them suspects, however often it happens; only what they do
        `alone` counts against them.
        """
        for place in places:
            if place in self.open and place not in self._declined:
                self.open[place] = self.open[place] + 1 if alone else max(1, self.open[place])

    @property
    def came_back(self) -> bool:
        """Whether our engine could not answer these claims before, and they may wait longer for
        another one.
        """
        engines = {_engine_of(entry) for entry in self._declined_before}
        return self._engine in engines and self.waited_seconds < self._patience_seconds

    def decline(self, place: int, declined: Declined) -> None:
        """Our engine cannot answer the claim. Another one may, so it is returned; it is dead when a
        second engine says the same and that counts, or when none took it in time.
        """
        kind = declined.refusal.reason.value if declined.counts else _UNABLE
        agreeing = [
            engine
            for entry in self._declined_before
            if entry.startswith(f"{kind} ") and (engine := _engine_of(entry)) != self._engine
        ]
        if declined.counts and agreeing:
            self._bury_with(place, declined, f"The engine {agreeing[-1]} said so as well")
        elif self.waited_seconds >= self._patience_seconds:
            tried = sorted({*map(_engine_of, self._declined_before), self._engine} - {""})
            self._bury_with(
                place,
                declined,
                f"No other engine took the claim, which waited {self.waited_seconds} s for one "
                f"(KEEPWARM_OTHER_ENGINE_SECONDS). Tried: {', '.join(tried) or 'this one'}",
            )
        else:
            self._declined[place] = f"{kind} {self._engine}"

    def _bury_with(self, place: int, declined: Declined, more: str) -> None:
        refusal = declined.refusal
        self.mark_dead(place, Refusal(refusal.reason, f"{refusal.detail}\n{more}."))

    @property
    def declined(self) -> int:
        """How many claims our engine could not answer that are to be returned for others."""
        return len(self._declined.keys() & self.open.keys())

    def note_crash(self, place: int, crash: Crash) -> None:
        """Workers of this node died with the claim."""
        self.crashes[place] = crash
        self.open[place] = max(1, self.open[place]) + crash.alone

    def mark_dead(self, place: int, refusal: Refusal) -> None:
        self._dead.append((place, refusal, self.open.pop(place)))

    def trim(self, keep: int, consumer: Consumer, publisher: Publisher) -> None:
        """Keep the first `keep` of the open claims, and return the others now, unharmed. They are
        part of what has to be confirmed before the batch is acknowledged.
        """
        places = list(self.open)[keep:]
        RETURNED.labels("trimmed").inc(len(places))
        rest = list(self._returned(places))
        for place in places:
            del self.open[place]
        self._publish(rest, consumer, publisher, last=False)

    def settle(self, consumer: Consumer, publisher: Publisher, signature: WorkerIdentity) -> None:
        """Publish verdicts and dead claims, return the rest as a smaller batch, and acknowledge
        once the broker has confirmed all of them. A batch that nothing happened to goes back whole.
        """
        self._count()
        messages = list(self._messages(signature))
        if not messages:
            consumer.give_back([self.delivery])
            return
        self._publish(messages, consumer, publisher, last=True)

    def _count(self) -> None:
        labels = Counter(verdict.label for _, verdict in self._verdicts)
        for label, count in labels.items():
            VERDICTS.labels(_label(label)).inc(count)
        INVALID_VERDICTS.inc(labels[INVALID])
        for _, refusal, _ in self._dead:
            DEAD.labels(refusal.reason.value).inc()
        RETURNED.labels("declined").inc(self.declined)
        RETURNED.labels("unfinished").inc(len(self.open) - self.declined)

    def _publish(
        self, messages: Sequence[Outgoing], consumer: Consumer, publisher: Publisher, *, last: bool
    ) -> None:
        began = time.monotonic()

        def confirmed() -> None:  # on the publisher's thread
            with self._lock:
                self._confirmed += 1
                done = self._settled and self._confirmed == self._published
            if done:
                BATCH_SECONDS.labels("confirming").observe(time.monotonic() - began)
                consumer.acknowledge([self.delivery])

        with self._lock:
            first = self._published
            self._published += len(messages)
            self._settled = last
        batch = f"{self.batch.run.run_id}/{self.batch.batch_id}/{self.delivery.attempt}"
        for number, message in enumerate(messages, first):
            publisher.publish(
                replace(message, message_id=f"{batch}/{number}", on_confirmed=confirmed)
            )

    def _messages(self, signature: WorkerIdentity) -> Iterator[Outgoing]:
        for place, refusal, failures in self._dead:
            yield self._dead_claim(place, refusal, failures, signature)
        yield from _fitting(self._verdicts, lambda some: self._verdict_batch(some, signature))
        untouched = dict.fromkeys(range(len(self.batch.claims)), self.delivery.failures)
        waited = self.waited_seconds != self.delivery.waited_seconds
        if self.open == untouched and not self.declined and not waited:
            return
        yield from self._returned(list(self.open))

    def _returned(self, places: Sequence[int]) -> Iterator[Outgoing]:
        """A message for those that have the same history."""
        histories = {place: (self.open[place], self._declined.get(place, "")) for place in places}
        for history in sorted(set(histories.values())):
            alike = [place for place in places if histories[place] == history]
            yield from _fitting(alike, partial(self._rest, history=history))

    def _dead_claim(
        self, place: int, refusal: Refusal, failures: int, signature: WorkerIdentity
    ) -> Outgoing:
        proofs = self.batch.proofs
        dead = DeadClaim(
            schema_version=self.batch.schema_version,
            run_id=self.batch.run.run_id,
            claim=self.batch.claims[place],
            reason=refusal.reason,
            detail=refusal.detail[:MAX_DETAIL_CHARS].replace("\0", ""),
            worker_id=signature.worker_id,
            attempt=self.delivery.attempt,
            failures=failures,
            submission_id=self.batch.submission_id if proofs else None,
            proof=proofs[place] if proofs else None,
        )
        return Outgoing.of(dead, topology.DEAD_EXCHANGE, topology.DEAD_CLAIMS_QUEUE)

    def _verdict_batch(
        self, verdicts: Sequence[tuple[int, Verdict]], signature: WorkerIdentity
    ) -> Outgoing:
        proofs = self.batch.proofs
        batch = VerdictBatch(
            # Whoever reads about claims has to know what these claims' own reader had to.
            schema_version=self.batch.schema_version,
            run_id=self.batch.run.run_id,
            batch_id=self.batch.batch_id,
            labels=self.batch.run.prompt.label_names,
            verdicts=tuple(verdict for _, verdict in verdicts),
            worker_id=signature.worker_id,
            device=signature.device,
            attempt=self.delivery.attempt,
            engine_seconds=self._engine_seconds * len(verdicts) / len(self._verdicts),
            submission_id=self.batch.submission_id if proofs else None,
            proofs=tuple(
                verdict_proof(proofs[place], self.batch.claims[place].evidence)
                for place, _ in verdicts
            )
            if proofs
            else (),
        )
        return Outgoing.of(batch, topology.VERDICTS_EXCHANGE, topology.VERDICTS_QUEUE)

    def _rest(self, places: Sequence[int], history: tuple[int, str]) -> Outgoing:
        failures, entry = history
        earlier = [old for old in self._declined_before if old != entry]
        return Outgoing.of(
            self.batch.only(places),
            topology.RETURNS_EXCHANGE,
            topology.RETURNS_QUEUE,
            headers=history_headers(
                failures, [*earlier, entry] if entry else earlier, self.waited_seconds
            ),
        )


def _engine_of(entry: str) -> str:
    return entry.partition(" ")[2]


def _fitting(items: Sequence[T], build: Callable[[Sequence[T]], Outgoing]) -> Iterator[Outgoing]:
    """As few messages as can carry the items: one, unless that is over the bound of a message."""
    if not items:
        return
    try:
        yield build(items)
    except MessageInvalid:
        if len(items) == 1:
            raise
        middle = len(items) // 2
        yield from _fitting(items[:middle], build)
        yield from _fitting(items[middle:], build)
