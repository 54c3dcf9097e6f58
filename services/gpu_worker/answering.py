"""Deliveries on their way: taken, answered, settled. What an engine fails with is a suspect."""

import time
import traceback
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby

import structlog

from services.broker import Consumer, Delivery, Publisher
from services.contexts.completions import Interrupted
from services.contracts.errors import (
    BrokerError,
    EngineError,
    KeepwarmError,
    MessageInvalid,
    MessageTooNew,
)
from services.contracts.label_mass import said_instead
from services.gpu_worker.examination import Examination, prompt_key
from services.gpu_worker.in_hand import BatchInHand
from services.gpu_worker.inference import Inference, Outcome, WorkerFailure
from services.gpu_worker.metrics import BATCH_SECONDS, CANCELLED, SUSPECTS
from services.gpu_worker.pacing import Pace
from services.gpu_worker.shift import Shift

# How long a small batch waits for others while the engine has work.
_LINGER_SECONDS = 0.02
# How long claims that came back to an engine that cannot answer them are kept from it.
_HOLD_SECONDS = 5
_STOP_SECONDS = 2.0

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Answering:
    """What becomes of the batches of one context, between a consumer and a publisher.

    A batch is acknowledged after the broker has confirmed all that became of it. One that the
    engine failed with waits among the `suspects`, to be examined while nobody else asks the engine.
    `take` is for one thread; the others may run on several at once.
    """

    context_id: str
    inference: Inference
    examination: Examination
    pace: Pace
    shift: Shift
    consumer: Consumer
    publisher: Publisher
    engine: str = ""
    """What this worker's engine is called beside those of other nodes."""
    patience_seconds: float = 0
    """How long claims that it cannot answer wait for another one."""
    held: deque[tuple[float, BatchInHand]] = field(default_factory=deque)
    """Batches that came back to an engine that cannot answer them, and when they are returned."""
    in_hand: set[BatchInHand] = field(default_factory=set)
    suspects: list[BatchInHand] = field(default_factory=list)
    warned: set[str] = field(default_factory=set)
    """Runs of which it was said that the model hardly ever says a label word, or that our engine
    cannot answer some of their claims.
    """

    def take(self, timeout_seconds: float, *, linger: bool) -> list[Delivery]:
        """A batch; or of small ones as many as make a request, those that are here or come soon."""
        delivery = self.consumer.take(timeout_seconds)
        deadline = time.monotonic() + (_LINGER_SECONDS if linger else 0)
        deliveries: list[Delivery] = []
        while delivery is not None:
            deliveries.append(delivery)
            if len(deliveries) >= self.pace.together:
                break
            delivery = self.consumer.take(max(0.0, deadline - time.monotonic()))
        return deliveries

    def see_through(self, deliveries: Sequence[Delivery]) -> None:
        """From deliveries to their settlement, or to the suspects.

        Raises MessageTooNew, once the others are settled and nothing more is taken: whoever knows
        such messages gets them from the broker.
        """
        hands: list[BatchInHand] = []
        newer: list[tuple[Delivery, MessageTooNew]] = []
        for delivery in deliveries:
            try:
                hand = self._take_in_hand(delivery)
            except MessageTooNew as error:
                newer.append((delivery, error))
            else:
                hands += [] if hand is None else [hand]
        self.consumer.set_prefetch(self.pace.batches)
        hands = self._within_allowance(hands)
        for _, alike in groupby(hands, key=lambda hand: hand.batch.run.prompt.prompt_id):
            batches = list(alike)
            try:
                self._answer(batches)
            except Exception as error:
                self._set_aside(batches, error)
        if newer:
            # First, or it would come back at once.
            self.consumer.stop_taking(_STOP_SECONDS)
            self.consumer.give_back([delivery for delivery, _ in newer])
            log.error("message.newer", reason=str(newer[0][1]))
            raise newer[0][1]

    def examine(self) -> None:
        """The first suspect, to its settlement, or until told to stop."""
        hand = self.suspects.pop(0)
        before = hand.engine_seconds
        try:
            try:
                self.examination.examine(hand)
            except KeepwarmError:
                self.settle(hand)
                raise
            finally:
                self.shift.device_time.computed(hand.engine_seconds - before, answered=1, asked=1)
            self.settle(hand)
        except Exception as error:
            self._set_aside([hand], error)

    def settle(self, hand: BatchInHand) -> None:
        """Tell the broker what became of it; what is open goes back."""
        hand.settle(self.consumer, self.publisher, self.shift.signature)
        self.in_hand.discard(hand)
        if hand.crashes:
            self.shift.crashes.forget(hand.keys(hand.crashes))

    def return_held(self) -> None:
        """Those that were kept from us for long enough: another worker may take them now."""
        while self.held and self.held[0][0] <= time.monotonic():
            _, hand = self.held.popleft()
            hand.waited_seconds += _HOLD_SECONDS
            self.settle(hand)

    def _take_in_hand(self, delivery: Delivery) -> BatchInHand | None:
        """The batch, as far as it can be finished within the horizon; None where nothing is to be
        answered now.
        """
        try:
            hand = BatchInHand(delivery, self.engine, self.patience_seconds)
            if hand.batch.run.context.context_id != self.context_id:
                raise MessageInvalid("the batch wants another context than its queue's")
        except MessageTooNew:
            raise
        except Exception as error:
            self._refuse(delivery, error)
            return None
        if hand.batch.submission_id in self.shift.news.cancelled:
            log.info("batch.cancelled", run=hand.batch.run.run_id, claims=len(hand.open))
            CANCELLED.inc(len(hand.open))
            self.consumer.acknowledge([delivery])
            return None
        self.in_hand.add(hand)
        if hand.came_back:
            self.held.append((time.monotonic() + _HOLD_SECONDS, hand))
            return None
        if delivery.redelivered:
            self.shift.crashes.look()
        if self.shift.crashes.any:
            for place, key in enumerate(hand.keys(range(len(hand.batch.claims)))):
                if crash := self.shift.crashes.of(key):
                    hand.note_crash(place, crash)
        if hand.suspect or self.shift.crashes.of(prompt_key(hand.batch.run.prompt)):
            self._suspect(hand)
            return None
        self._trim(hand)
        return hand

    def _within_allowance(self, hands: Sequence[BatchInHand]) -> list[BatchInHand]:
        """The first, and as many behind it as are finished within the horizon: where batches become
        larger, more came together than their size allows. The others go back.
        """
        kept: list[BatchInHand] = []
        claims = 0
        for hand in hands:
            claims += len(hand.open)
            if kept and claims > self.pace.allowance:
                self.settle(hand)
            else:
                kept.append(hand)
        return kept

    def _answer(self, hands: Sequence[BatchInHand]) -> None:
        """Ask about batches with one prompt as one, and settle each, or suspect it."""
        asked = [list(hand.open) for hand in hands]
        claims = [
            claim
            for hand, places in zip(hands, asked, strict=True)
            for claim in hand.claims(places)
        ]
        for hand in hands:
            BATCH_SECONDS.labels("waiting").observe(time.monotonic() - hand.delivery.came_at)
        begun = self.pace.begin()
        with self.shift.crashes.asking(
            key for hand, places in zip(hands, asked, strict=True) for key in hand.keys(places)
        ):
            outcome = self.inference.infer(
                hands[0].batch.run.prompt, claims, on_answer=self.shift.answers.add
            )
        seconds = self.pace.end(begun, 0 if outcome.failure else len(outcome.verdicts))
        self.consumer.set_prefetch(self.pace.batches)
        parts = outcome.split([len(places) for places in asked])
        self._watch_mass(hands[0], outcome)
        for hand, places, part in zip(hands, asked, parts, strict=True):
            BATCH_SECONDS.labels("inferring").observe(outcome.engine_seconds)
            hand.note(places, part)
            self._watch_declined(hand, part)
        unanswered = sum(len(hand.open) - hand.declined for hand in hands)
        self.shift.device_time.computed(
            seconds, answered=len(claims) - unanswered, asked=len(claims)
        )
        failed = bool(unanswered) and not isinstance(outcome.failure, Interrupted)
        if failed:
            log.warning("batch.failed", claims=unanswered, reason=str(outcome.failure))
            self.examination.note_failure(outcome.failure)
        for hand, places in zip(hands, asked, strict=True):
            if failed and len(hand.open) > hand.declined:
                hand.blame(places)
                self._suspect(hand)
            else:
                self.settle(hand)

    def _watch_mass(self, hand: BatchInHand, outcome: Outcome) -> None:
        """Log once a run that its label words hold nearly nothing of the probability."""
        run_id = hand.batch.run.run_id
        answers = [(verdict.mass, verdict.raw_text) for verdict in outcome.verdicts.values()]
        if not answers or run_id in self.warned:
            return
        if found := said_instead(answers):
            self.warned.add(run_id)
            log.warning("labels.unlikely", run=run_id, median_mass=found[0], model_says=found[1])

    def _watch_declined(self, hand: BatchInHand, outcome: Outcome) -> None:
        """Log once a run that this engine cannot answer some of its claims."""
        run_id = hand.batch.run.run_id
        if hand.declined and (key := f"declined {run_id}") not in self.warned:
            self.warned.add(key)
            example = next(iter(outcome.declined.values()))
            log.warning(
                "claims.declined",
                run=run_id,
                claims=hand.declined,
                reason=example.refusal.reason.value,
                detail=example.refusal.detail,
                next_step="they are returned for another engine, and are dead claims when none "
                f"takes them within {self.patience_seconds:g} s",
            )

    def _set_aside(self, hands: Sequence[BatchInHand], error: Exception) -> None:
        """Something of ours failed with batches that no claim can be blamed for: their messages go
        to `dead-messages`, and the worker goes on. What ends a worker is raised again.
        """
        if isinstance(error, BrokerError | EngineError | WorkerFailure):
            raise error
        for hand in hands:
            if hand in self.in_hand and hand not in self.suspects:
                self._refuse(hand.delivery, error)
                self.in_hand.discard(hand)

    def _refuse(self, delivery: Delivery, error: Exception) -> None:
        reason = logged = str(error)
        if not isinstance(error, MessageInvalid):
            # Its text may quote a claim, so it is not logged; where it was raised says enough.
            reason = f"the worker failed with it: {error!r}"
            where = traceback.extract_tb(error.__traceback__)[-1]
            logged = f"{type(error).__name__} in {where.filename}:{where.lineno}"
        log.error("batch.refused", reason=logged, message_id=delivery.message_id)
        self.publisher.publish(
            delivery.refused(reason, lambda: self.consumer.acknowledge([delivery]))
        )

    def _suspect(self, hand: BatchInHand) -> None:
        SUSPECTS.inc()
        self.suspects.append(hand)

    def _trim(self, hand: BatchInHand) -> None:
        """Keep what is finished within the horizon; someone faster may have the rest."""
        claims = len(hand.open)
        keep = self.pace.take(claims, redelivered=hand.delivery.redelivered)
        if keep < claims:
            log.debug("batch.trimmed", kept=keep, returned=claims - keep)
            hand.trim(keep, self.consumer, self.publisher)
