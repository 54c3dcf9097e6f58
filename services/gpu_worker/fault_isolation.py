"""Which claim does the engine fail with? Each claim of a suspect batch is asked alone.

Halving the batch would take an engine's start for each halving; asking one by one takes one for the
claim at fault, and costs a batch's time without batching (docs/decisions/0013).
"""

import threading
from collections import deque
from itertools import count

import structlog

from services.contexts.engine_client import EngineSilent, Interrupted
from services.contexts.lease import EngineLease
from services.contracts import DeadReason, PromptSpec, Settings
from services.contracts.backoff import backoff_seconds
from services.contracts.errors import EngineRequestError, EngineStartError, KeeperError
from services.gpu_worker.crashes import Crash, Crashes, Key
from services.gpu_worker.in_flight import InFlightBatch
from services.gpu_worker.inference import (
    HARMLESS,
    Declined,
    Inference,
    Outcome,
    Refusal,
    WorkerFailure,
)

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 2.0, 30.0
_NONSENSE = "it gave no usable answer: aborted, or scores that are missing or not numbers"

log = structlog.get_logger(__name__)


class FaultIsolation:
    """Minds the engine's health, and tells a claim's fault from the engine's own.

    Nobody else may be asking the engine while one of its methods runs.
    """

    def __init__(
        self,
        engine: EngineLease,
        inference: Inference,
        settings: Settings,
        stop: threading.Event,
        crashes: Crashes,
    ) -> None:
        self._engine = engine
        self._inference = inference
        self._settings = settings
        self._stop = stop
        self._crashes = crashes

    def examine(self, hand: InFlightBatch) -> None:
        """Give every claim of a suspect batch an outcome. Claims stay open when told to stop, when
        another engine may be able to answer them, or when they have to be asked with no others in
        their batch.

        A claim is given up on when the engine or the worker failed with it
        `KEEPWARM_CLAIM_FAILURES` times, all but the first alone, and each time a harmless claim was
        answered afterwards. Raises EngineStartError when there is no engine that does; then it is
        the node that is at fault. Raises WorkerFailure when this process cannot.
        """
        prompt = hand.batch.run.prompt
        log.warning("batch.suspect", batch=hand.batch.batch_id, claims=len(hand.open))
        if not self._is_usable(prompt, hand):
            return
        if not self._ask_all(hand):
            return
        waiting = deque(hand.open)
        while waiting and not self._stop.is_set():
            place = waiting.popleft()
            crash = hand.crashes.get(place)
            if crash is not None and crash.alone:
                if hand.open[place] >= self._settings.claim_failures:
                    self._give_up(hand, place, _died_of(crash, hand.open[place]), crash.memory)
                # Else it may end this process again: first the others' outcomes are published.
                if len(hand.batch.claims) > 1 or place not in hand.open:
                    continue
            with self._crashes.asking(hand.keys([place]), alone=True):
                outcome = self._inference.infer(prompt, hand.claims([place]))
            hand.note([place], outcome)
            if place not in hand.open or outcome.declined:
                continue
            last_words = "\n".join(self._engine.log_tail())
            self.note_failure(outcome.failure)
            out_of_memory = self._engine.ran_out_of_memory
            if not self._recover(prompt):
                return
            hand.record_failure([place], alone=True)
            failures = hand.open[place]
            log.warning("claim.failed", batch=hand.batch.batch_id, place=place, failures=failures)
            if failures < self._settings.claim_failures:
                waiting.append(place)
            else:
                self._give_up(hand, place, _failed(outcome, failures, last_words), out_of_memory)

    def _ask_all(self, hand: InFlightBatch) -> bool:
        """Ask the whole batch once more, with no other beside it: of all batches that were at an
        engine when it failed one at most is at fault, and often none. False when told to stop
        meanwhile.
        """
        places = list(hand.open)
        known = hand.crashes or any(failures > 1 for failures in hand.open.values())
        if known or len(places) < 2:
            return True
        with self._crashes.asking(hand.keys(places)):
            outcome = self._inference.infer(hand.batch.run.prompt, hand.claims(places))
        hand.note(places, outcome)
        if outcome.failure is None and all(place not in hand.open for place in places):
            return True
        self.note_failure(outcome.failure)
        if not self._recover(hand.batch.run.prompt):
            return False
        hand.record_failure(places)
        return True

    def _give_up(
        self, hand: InFlightBatch, place: int, refusal: Refusal, out_of_memory: bool
    ) -> None:
        """The claim is dead; or, where memory ran out, another node may have more of it."""
        if out_of_memory:
            hand.decline(place, Declined(refusal, counts=True))
        else:
            hand.mark_dead(place, refusal)

    def _is_usable(self, prompt: PromptSpec, hand: InFlightBatch) -> bool:
        """Whether a harmless claim is answered with this prompt. Where only another prompt's is,
        all claims of the batch are dead; False then, or when told to stop.
        """
        crash = self._crashes.of(prompt_key(prompt))
        if crash is not None and crash.alone >= self._settings.claim_failures:
            why = crash.evidence
        else:
            try:
                return self._recover(prompt)
            except WorkerFailure as failure:
                why = failure.trace
        # Raises, or ends this process, where the prompt is not at fault.
        if self._recover(PromptSpec()):
            refusal = Refusal(
                DeadReason.PROMPT_UNUSABLE,
                f"the worker fails with this prompt, whatever the claim, and not with another. "
                f"What it said:\n{why}",
            )
            for place in list(hand.open):
                hand.mark_dead(place, refusal)
        return False

    def note_failure(self, failure: EngineRequestError | WorkerFailure | None) -> None:
        """An engine that hangs is ended: it would hang for whoever asks next. One that broke off
        may be gone, which its keeper is about to say. Where we failed ourselves it did nothing.
        """
        if isinstance(failure, EngineSilent):
            log.error("engine.silent", reason=str(failure))
            self._engine.stop()
        elif failure is not None and not isinstance(failure, WorkerFailure):
            self._engine.check()

    def start_engine(self, attempts: int) -> bool:
        """Start it, again with growing pauses if need be. False when told to stop meanwhile.

        Raises EngineStartError or KeeperError after so many failed starts in a row: a keeper that
        is a service of its own may be away for a while, too.
        """
        for failures in count(1):
            try:
                return self._engine.start(self._stop)
            except (EngineStartError, KeeperError) as error:
                if failures >= attempts:
                    raise
                if not self._pause(failures, str(error)):
                    return False
        raise AssertionError("count() never ends")

    def _recover(self, prompt: PromptSpec) -> bool:
        """Have an engine that answers a harmless claim. False when told to stop meanwhile.

        Raises EngineStartError where there is none, WorkerFailure where we cannot ask it.
        """
        key = prompt_key(prompt)
        attempts = self._settings.engine_start_attempts
        for failures in count(1):
            if not self._engine.alive and not self.start_engine(attempts):
                return False
            with self._crashes.asking([key], alone=True):
                outcome = self._inference.infer(prompt, [HARMLESS])
            # A prompt that no claim fits into is not the engine's fault.
            if outcome.verdicts or outcome.refused or outcome.declined:
                self._crashes.forget([key])
                return True
            if isinstance(outcome.failure, WorkerFailure):
                log.error("worker.unable", prompt=prompt.prompt_id, trace=outcome.failure.trace)
                raise outcome.failure
            if isinstance(outcome.failure, Interrupted) or self._stop.is_set():
                return False
            self._engine.stop()
            why = f"it starts, and fails with a harmless claim: {outcome.failure or _NONSENSE}"
            if failures >= attempts:
                raise self._engine.start_error(why)
            if not self._pause(failures, why):
                return False
        raise AssertionError("count() never ends")

    def _pause(self, failures: int, why: str) -> bool:
        pause = backoff_seconds(
            failures, first_seconds=_FIRST_PAUSE_SECONDS, longest_seconds=_LONGEST_PAUSE_SECONDS
        )
        log.error("engine.start_failed", error=why, again_in_seconds=round(pause, 1))
        return not self._stop.wait(pause)


def prompt_key(prompt: PromptSpec) -> Key:
    """What a harmless claim with this prompt is called where crashes are recorded."""
    return (prompt.prompt_id, HARMLESS.claim_id)


def _failed(outcome: Outcome, failures: int, last_words: str) -> Refusal:
    if isinstance(outcome.failure, WorkerFailure):
        return Refusal(
            DeadReason.WORKER_FAILED,
            f"the worker failed {failures} times with this claim, {failures - 1} of them alone, "
            f"and not with a harmless one:\n{outcome.failure.trace}",
        )
    return Refusal(
        DeadReason.ENGINE_FAILED,
        f"an engine failed {failures} times with this claim, {failures - 1} of them alone, and not "
        f"with a harmless one: {outcome.failure or _NONSENSE}. Its log ended with:\n{last_words}",
    )


def _died_of(crash: Crash, failures: int) -> Refusal:
    return Refusal(
        DeadReason.WORKER_FAILED,
        f"the worker's process died with this claim, {failures} times in all, {failures - 1} of "
        f"them alone, and not with a harmless one. What it left:\n{crash.evidence}",
    )
