"""A batch in flight, from its delivery until each of its claims is settled."""

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
from services.gpu_worker.inference import DeadCause, Declined, InferenceResult
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

# How many nodes must run out of memory with a claim, alone, before it is dead.
_NODES_WITHOUT_MEMORY = 3
# In the `keepwarm-declined` header: the engine cannot answer the claim, which is not at fault.
_UNABLE = "unable"

_label = BoundedLabels()


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """Who answers, as verdicts and heartbeats name it."""

    worker_id: str
    device: str


class InFlightBatch:
    """Collects the outcome of each claim, and settles them together at the end.

    `unresolved` maps the index of each claim without an outcome to the number of engine failures
    that it was part of.
    """

    def __init__(
        self, delivery: Delivery, engine: str = "", other_engine_seconds: float = 0
    ) -> None:
        """`engine` is the name of this worker's engine. Claims that it cannot answer become dead
        claims once they have waited `other_engine_seconds` for another engine.

        Raises MessageInvalid when the delivery is not a batch of claims.
        """
        self.delivery = delivery
        self.message = delivery.message(ClaimBatch)
        self.unresolved = dict.fromkeys(range(len(self.message.claims)), delivery.failures)
        self.waited_seconds = delivery.waited_seconds
        self._declined_before = delivery.declined
        self._engine = engine
        self._other_engine_seconds = other_engine_seconds
        self._declined: dict[int, str] = {}
        self.crashes: dict[int, Crash] = {}
        """Crashes of this node's workers, by the index of the claim that they were asking about."""
        # Each with the index of its claim:
        self._verdicts: list[tuple[int, Verdict]] = []
        self._dead: list[tuple[int, DeadCause, int]] = []
        self._engine_seconds = 0.0
        self._published = self._confirmed = 0
        self._settled = False
        self._lock = threading.Lock()
        if delivery.redelivered:
            REDELIVERED.inc(len(self.message.claims))

    @property
    def failed_before(self) -> bool:
        """Whether an engine has failed with these claims before."""
        return any(self.unresolved.values())

    def claims(self, indexes: Sequence[int]) -> list[Claim]:
        return [self.message.claims[index] for index in indexes]

    def keys(self, indexes: Iterable[int]) -> list[Key]:
        """The keys of the claims in the crash records."""
        return [(self.message.run.run_id, self.message.claims[index].claim_id) for index in indexes]

    @property
    def engine_seconds(self) -> float:
        """How long the requests to the engine took."""
        return self._engine_seconds

    def record(self, indexes: Sequence[int], result: InferenceResult) -> None:
        """Record the result of a request about the claims at `indexes`, in that order."""
        self._engine_seconds += result.engine_seconds
        for position, verdict in result.verdicts.items():
            del self.unresolved[indexes[position]]
            self._verdicts.append((indexes[position], verdict))
        for position, cause in result.dead.items():
            self.mark_dead(indexes[position], cause)
        for position, declined in result.declined.items():
            self.decline(indexes[position], declined)

    def record_failure(self, indexes: Sequence[int], *, alone: bool = False) -> None:
        """An engine failed with these claims. Counts for the unresolved ones that it accepted.

        Failures together with other claims count once, however many there are, which quarantines
        the claims. Each failure `alone` counts.
        """
        for index in indexes:
            if index in self.unresolved and index not in self._declined:
                failures = self.unresolved[index]
                self.unresolved[index] = failures + 1 if alone else max(1, failures)

    @property
    def declined_here_before(self) -> bool:
        """Whether this worker's engine has declined these claims before, and they may still wait
        for another engine.
        """
        engines = {_engine_of(entry) for entry in self._declined_before}
        return self._engine in engines and self.waited_seconds < self._other_engine_seconds

    def decline(self, index: int, declined: Declined) -> None:
        """Our engine cannot answer the claim. It is returned for another engine. It is
        dead when `counts_against_claim` is set and a second engine declines it for the same reason,
        or a third node if that is memory; or when no other engine has answered it in time.
        """
        kind = declined.cause.reason.value if declined.counts_against_claim else _UNABLE
        agreeing = {
            _engine_of(entry) for entry in self._declined_before if entry.startswith(f"{kind} ")
        } | {self._engine}
        if declined.out_of_memory:
            enough = len({_node_of(engine) for engine in agreeing}) >= _NODES_WITHOUT_MEMORY
        else:
            enough = declined.counts_against_claim and len(agreeing) > 1
        if enough:
            others = ", ".join(sorted(agreeing - {self._engine}))
            self._mark_declined_dead(index, declined, f"Declined as well by: {others}")
        elif self.waited_seconds >= self._other_engine_seconds:
            tried = sorted({*map(_engine_of, self._declined_before), self._engine} - {""})
            self._mark_declined_dead(
                index,
                declined,
                f"No other engine answered the claim, which waited {self.waited_seconds} s for one "
                f"(KEEPWARM_OTHER_ENGINE_SECONDS). Tried: {', '.join(tried) or 'this one'}",
            )
        else:
            self._declined[index] = f"{kind} {self._engine}"

    def _mark_declined_dead(self, index: int, declined: Declined, more: str) -> None:
        cause = declined.cause
        self.mark_dead(index, DeadCause(cause.reason, f"{cause.detail}\n{more}."))

    @property
    def declined(self) -> int:
        """How many claims this worker's engine has declined that will be returned for others."""
        return len(self._declined.keys() & self.unresolved.keys())

    def record_crash(self, index: int, crash: Crash) -> None:
        """Workers of this node crashed while they asked about the claim."""
        self.crashes[index] = crash
        self.unresolved[index] = max(1, self.unresolved[index]) + crash.alone

    def mark_dead(self, index: int, cause: DeadCause) -> None:
        self._dead.append((index, cause, self.unresolved.pop(index)))

    def trim(self, keep: int, consumer: Consumer, publisher: Publisher) -> None:
        """Keep the first `keep` unresolved claims, and return the others now. The returned ones
        must be confirmed, too, before the batch is acknowledged.
        """
        indexes = list(self.unresolved)[keep:]
        RETURNED.labels("trimmed").inc(len(indexes))
        rest = list(self._returned(indexes))
        for index in indexes:
            del self.unresolved[index]
        self._publish(rest, consumer, publisher, last=False)

    def return_each(self, consumer: Consumer, publisher: Publisher) -> None:
        """Return each claim in a quarantined message of its own, to the end of the queue."""
        RETURNED.labels("unfinished").inc(len(self.unresolved))
        messages: list[Outgoing] = []
        for index, failures in self.unresolved.items():
            self.unresolved[index] = max(1, failures)
            messages += self._returned([index])
        self._publish(messages, consumer, publisher, last=True)

    def settle(self, consumer: Consumer, publisher: Publisher, identity: WorkerIdentity) -> None:
        """Publish verdicts and dead claims, return the other claims as a smaller batch, and
        acknowledge the message once the broker has confirmed all of them. A batch without any
        outcome or failure is returned as it came.
        """
        self._count()
        messages = list(self._messages(identity))
        if not messages:
            consumer.give_back([self.delivery])
            return
        self._publish(messages, consumer, publisher, last=True)

    def _count(self) -> None:
        labels = Counter(verdict.label for _, verdict in self._verdicts)
        for label, count in labels.items():
            VERDICTS.labels(_label(label)).inc(count)
        INVALID_VERDICTS.inc(labels[INVALID])
        for _, cause, _ in self._dead:
            DEAD.labels(cause.reason.value).inc()
        RETURNED.labels("declined").inc(self.declined)
        RETURNED.labels("unfinished").inc(len(self.unresolved) - self.declined)

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
        prefix = f"{self.message.run.run_id}/{self.message.batch_id}/{self.delivery.attempt}"
        for number, message in enumerate(messages, first):
            publisher.publish(
                replace(message, message_id=f"{prefix}/{number}", on_confirmed=confirmed)
            )

    def _messages(self, identity: WorkerIdentity) -> Iterator[Outgoing]:
        for index, cause, failures in self._dead:
            yield self._dead_claim(index, cause, failures, identity)
        yield from _fitting_messages(
            self._verdicts, lambda verdicts: self._verdict_batch(verdicts, identity)
        )
        untouched = dict.fromkeys(range(len(self.message.claims)), self.delivery.failures)
        waited = self.waited_seconds != self.delivery.waited_seconds
        if self.unresolved == untouched and not self.declined and not waited:
            return
        yield from self._returned(list(self.unresolved))

    def _returned(self, indexes: Sequence[int]) -> Iterator[Outgoing]:
        """One message for all claims with the same history."""
        histories = {
            index: (self.unresolved[index], self._declined.get(index, "")) for index in indexes
        }
        for history in sorted(set(histories.values())):
            same_history = [index for index in indexes if histories[index] == history]
            yield from _fitting_messages(
                same_history, partial(self._returned_batch, history=history)
            )

    def _dead_claim(
        self, index: int, cause: DeadCause, failures: int, identity: WorkerIdentity
    ) -> Outgoing:
        proofs = self.message.proofs
        dead = DeadClaim(
            schema_version=self.message.schema_version,
            run_id=self.message.run.run_id,
            claim=self.message.claims[index],
            reason=cause.reason,
            detail=cause.detail[:MAX_DETAIL_CHARS].replace("\0", ""),
            worker_id=identity.worker_id,
            attempt=self.delivery.attempt,
            failures=failures,
            submission_id=self.message.submission_id if proofs else None,
            proof=proofs[index] if proofs else None,
        )
        return Outgoing.of(dead, topology.DEAD_EXCHANGE, topology.DEAD_CLAIMS_QUEUE)

    def _verdict_batch(
        self, verdicts: Sequence[tuple[int, Verdict]], identity: WorkerIdentity
    ) -> Outgoing:
        proofs = self.message.proofs
        verdict_batch = VerdictBatch(
            # A reader of the verdicts needs the version that a reader of the claims needs.
            schema_version=self.message.schema_version,
            run_id=self.message.run.run_id,
            batch_id=self.message.batch_id,
            labels=self.message.run.prompt.label_names,
            verdicts=tuple(verdict for _, verdict in verdicts),
            worker_id=identity.worker_id,
            device=identity.device,
            attempt=self.delivery.attempt,
            engine_seconds=self._engine_seconds * len(verdicts) / len(self._verdicts),
            submission_id=self.message.submission_id if proofs else None,
            proofs=tuple(
                verdict_proof(proofs[index], self.message.claims[index].evidence)
                for index, _ in verdicts
            )
            if proofs
            else (),
        )
        return Outgoing.of(verdict_batch, topology.VERDICTS_EXCHANGE, topology.VERDICTS_QUEUE)

    def _returned_batch(self, indexes: Sequence[int], history: tuple[int, str]) -> Outgoing:
        failures, entry = history
        earlier = [old for old in self._declined_before if old != entry]
        return Outgoing.of(
            self.message.only(indexes),
            topology.RETURNS_EXCHANGE,
            topology.RETURNS_QUEUE,
            headers=history_headers(
                failures, [*earlier, entry] if entry else earlier, self.waited_seconds
            ),
        )


def _engine_of(entry: str) -> str:
    return entry.partition(" ")[2]


def _node_of(engine: str) -> str:
    return engine.partition("/")[0]


def _fitting_messages(
    items: Sequence[T], build: Callable[[Sequence[T]], Outgoing]
) -> Iterator[Outgoing]:
    """As few messages as can carry the items: one, unless it would exceed the size limit."""
    if not items:
        return
    try:
        yield build(items)
    except MessageInvalid:
        if len(items) == 1:
            raise
        middle = len(items) // 2
        yield from _fitting_messages(items[:middle], build)
        yield from _fitting_messages(items[middle:], build)
