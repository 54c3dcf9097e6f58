"""A batch in a worker's hands, from its delivery until every claim of it is accounted for."""

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TypeVar

from services.broker import Consumer, Delivery, Outgoing, Publisher
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
from services.gpu_worker.inference import Outcome, Refusal
from services.gpu_worker.metrics import (
    BATCH_SECONDS,
    DEAD,
    INVALID_VERDICTS,
    REDELIVERED,
    RETURNED,
    VERDICTS,
)
from services.telemetry import Few

T = TypeVar("T")

_label = Few()


@dataclass(frozen=True, slots=True)
class Signature:
    """Who answers."""

    worker_id: str
    device: str


class BatchInHand:
    """Remembers what became of each claim; at the end tells the broker all of it at once.

    `open` maps the places of claims without an outcome to the failures of an engine that they were
    part of.
    """

    def __init__(self, delivery: Delivery) -> None:
        """Raises MessageInvalid when the delivery is not a batch of claims."""
        self.delivery = delivery
        self.batch = delivery.message(ClaimBatch)
        self.open = dict.fromkeys(range(len(self.batch.claims)), delivery.failures)
        self._verdicts: list[Verdict] = []
        self._dead: list[tuple[Claim, Refusal, int]] = []
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

    @property
    def engine_seconds(self) -> float:
        """How long the engine was asked about its claims."""
        return self._engine_seconds

    def note(self, places: Sequence[int], outcome: Outcome) -> None:
        """Take in what became of the claims at `places`, in the order they were asked in."""
        self._engine_seconds += outcome.engine_seconds
        for index, verdict in outcome.verdicts.items():
            del self.open[places[index]]
            self._verdicts.append(verdict)
        for index, refusal in outcome.refused.items():
            self.bury(places[index], refusal)

    def blame(self, places: Sequence[int], *, alone: bool = False) -> None:
        """An engine failed with those of the claims that are open still. In company that makes them
        suspects, however often it happens; only what they do `alone` counts against them.
        """
        for place in places:
            if place in self.open:
                self.open[place] = self.open[place] + 1 if alone else max(1, self.open[place])

    def bury(self, place: int, refusal: Refusal) -> None:
        self._dead.append((self.batch.claims[place], refusal, self.open.pop(place)))

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

    def settle(self, consumer: Consumer, publisher: Publisher, signature: Signature) -> None:
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
        labels = Counter(verdict.label for verdict in self._verdicts)
        for label, count in labels.items():
            VERDICTS.labels(_label(label)).inc(count)
        INVALID_VERDICTS.inc(labels[INVALID])
        for _, refusal, _ in self._dead:
            DEAD.labels(refusal.reason.value).inc()
        RETURNED.labels("unfinished").inc(len(self.open))

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

    def _messages(self, signature: Signature) -> Iterator[Outgoing]:
        for claim, refusal, failures in self._dead:
            yield self._dead_claim(claim, refusal, failures, signature)
        yield from _fitting(self._verdicts, lambda some: self._verdict_batch(some, signature))
        if self.open == dict.fromkeys(range(len(self.batch.claims)), self.delivery.failures):
            return  # untouched
        yield from self._returned(list(self.open))

    def _returned(self, places: Sequence[int]) -> Iterator[Outgoing]:
        for failures in sorted({self.open[place] for place in places}):
            alike = [place for place in places if self.open[place] == failures]
            yield from _fitting(self.claims(alike), partial(self._rest, failures=failures))

    def _dead_claim(
        self, claim: Claim, refusal: Refusal, failures: int, signature: Signature
    ) -> Outgoing:
        dead = DeadClaim(
            run_id=self.batch.run.run_id,
            claim=claim,
            reason=refusal.reason,
            detail=refusal.detail[:MAX_DETAIL_CHARS].replace("\0", ""),
            worker_id=signature.worker_id,
            attempt=self.delivery.attempt,
            failures=failures,
        )
        return Outgoing.of(dead, topology.DEAD_EXCHANGE, topology.DEAD_CLAIMS_QUEUE)

    def _verdict_batch(self, verdicts: Sequence[Verdict], signature: Signature) -> Outgoing:
        batch = VerdictBatch(
            run_id=self.batch.run.run_id,
            batch_id=self.batch.batch_id,
            labels=self.batch.run.prompt.label_names,
            verdicts=tuple(verdicts),
            worker_id=signature.worker_id,
            device=signature.device,
            attempt=self.delivery.attempt,
            engine_seconds=self._engine_seconds * len(verdicts) / len(self._verdicts),
        )
        return Outgoing.of(batch, topology.VERDICTS_EXCHANGE, topology.VERDICTS_QUEUE)

    def _rest(self, claims: Sequence[Claim], failures: int) -> Outgoing:
        return Outgoing.of(
            self.batch.model_copy(update={"claims": tuple(claims)}),
            topology.RETURNS_EXCHANGE,
            topology.RETURNS_QUEUE,
            headers={topology.FAILURES_HEADER: failures},
        )


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
