"""Find the claims of a quarantined batch that the engine fails with, by asking about each alone.

Halving the batch would need a start of the engine for each halving. Asking one by one needs one for
each faulty claim, and loses the benefit of batching for one batch (docs/decisions/0013).
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
from services.gpu_worker.crashes import Crash, CrashRecords, Key
from services.gpu_worker.in_flight import InFlightBatch
from services.gpu_worker.inference import (
    CANARY,
    DeadCause,
    Declined,
    Inference,
    InferenceResult,
    WorkerFailure,
)

_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 2.0, 30.0
_UNUSABLE_ANSWER = "it gave no usable answer: aborted, or scores that are missing or not numbers"

log = structlog.get_logger(__name__)


class FaultIsolation:
    """Keeps the engine healthy, and tells a claim's fault from the engine's own.

    Nothing else may use the engine while `isolate` runs.
    """

    def __init__(
        self,
        engine: EngineLease,
        inference: Inference,
        settings: Settings,
        stop: threading.Event,
        crashes: CrashRecords,
    ) -> None:
        self._engine = engine
        self._inference = inference
        self._settings = settings
        self._stop = stop
        self._crashes = crashes

    def isolate(self, batch: InFlightBatch) -> None:
        """Give every claim of a quarantined batch an outcome. Claims stay unresolved when told to
        stop, when another engine may be able to answer them, or when they must first be returned in
        a batch of their own.

        A claim is given up when the engine or the worker failed with it `KEEPWARM_CLAIM_FAILURES`
        times, all but the first alone, and answered a canary after each failure. Raises
        EngineStartError when no engine answers a canary: then the node is at fault. Raises
        WorkerFailure when this process fails with the canary.
        """
        prompt = batch.message.run.prompt
        log.warning("batch.quarantined", batch=batch.message.batch_id, claims=len(batch.unresolved))
        if not self._prompt_is_usable(prompt, batch):
            return
        if not self._ask_all(batch):
            return
        waiting = deque(batch.unresolved)
        while waiting and not self._stop.is_set():
            index = waiting.popleft()
            crash = batch.crashes.get(index)
            if crash is not None and crash.alone:
                if batch.unresolved[index] >= self._settings.claim_failures:
                    self._give_up(
                        batch, index, _crash_reason(crash, batch.unresolved[index]), crash.memory
                    )
                # Else it may crash this process again: publish the other claims' outcomes first.
                if len(batch.message.claims) > 1 or index not in batch.unresolved:
                    continue
            with self._crashes.recorded(batch.keys([index]), alone=True):
                result = self._inference.infer(prompt, batch.claims([index]))
            batch.record([index], result)
            if index not in batch.unresolved or result.declined:
                continue
            log_end = "\n".join(self._engine.log_tail())
            self.handle_failure(result.failure)
            out_of_memory = self._engine.ran_out_of_memory
            if not self._recover(prompt):
                return
            batch.record_failure([index], alone=True)
            failures = batch.unresolved[index]
            log.warning(
                "claim.failed", batch=batch.message.batch_id, index=index, failures=failures
            )
            if failures < self._settings.claim_failures:
                waiting.append(index)
            else:
                self._give_up(
                    batch, index, _failure_reason(result, failures, log_end), out_of_memory
                )

    def _ask_all(self, batch: InFlightBatch) -> bool:
        """Ask about the whole batch once more, with nothing else at the engine: of all batches that
        were at an engine when it failed, at most one is at fault, and often none. False when told
        to stop meanwhile.
        """
        indexes = list(batch.unresolved)
        known = batch.crashes or any(failures > 1 for failures in batch.unresolved.values())
        if known or len(indexes) < 2:
            return True
        with self._crashes.recorded(batch.keys(indexes)):
            result = self._inference.infer(batch.message.run.prompt, batch.claims(indexes))
        batch.record(indexes, result)
        if result.failure is None and all(index not in batch.unresolved for index in indexes):
            return True
        self.handle_failure(result.failure)
        if not self._recover(batch.message.run.prompt):
            return False
        batch.record_failure(indexes)
        return True

    def _give_up(
        self, batch: InFlightBatch, index: int, cause: DeadCause, out_of_memory: bool
    ) -> None:
        """Mark the claim dead, or decline it if memory ran out: another node may have more."""
        if out_of_memory:
            declined = Declined(cause, counts_against_claim=True, out_of_memory=True)
            batch.decline(index, declined)
        else:
            batch.mark_dead(index, cause)

    def _prompt_is_usable(self, prompt: PromptSpec, batch: InFlightBatch) -> bool:
        """Whether a canary is answered with this prompt. If it is answered with another prompt
        only, all claims of the batch are marked dead. False then, or when told to stop.
        """
        crash = self._crashes.get(prompt_key(prompt))
        if crash is not None and crash.alone >= self._settings.claim_failures:
            why = crash.evidence
        else:
            try:
                return self._recover(prompt)
            except WorkerFailure as failure:
                why = failure.trace
        # Raises, or crashes this process, if the prompt is not at fault.
        if self._recover(PromptSpec()):
            cause = DeadCause(
                DeadReason.PROMPT_UNUSABLE,
                "the worker fails with this prompt for any claim, and not with another prompt. Its "
                f"error:\n{why}",
            )
            for index in list(batch.unresolved):
                batch.mark_dead(index, cause)
        return False

    def handle_failure(self, failure: EngineRequestError | WorkerFailure | None) -> None:
        """Stop an engine that hangs: it would hang for the next request, too. After another error
        of the engine, check with its keeper whether it is gone. A WorkerFailure is not its own.
        """
        if isinstance(failure, EngineSilent):
            log.error("engine.silent", reason=str(failure))
            self._engine.stop()
        elif failure is not None and not isinstance(failure, WorkerFailure):
            self._engine.check()

    def start_engine(self, attempts: int) -> bool:
        """Start the engine, with a backoff between attempts. False when told to stop meanwhile.

        Raises EngineStartError or KeeperError after `attempts` failed starts in a row. KeeperErrors
        are retried, because a keeper that runs as a service may restart.
        """
        for failures in count(1):
            try:
                return self._engine.start(self._stop)
            except (EngineStartError, KeeperError) as error:
                if failures >= attempts:
                    raise
                if not self._back_off(failures, str(error)):
                    return False
        raise AssertionError("count() never ends")

    def _recover(self, prompt: PromptSpec) -> bool:
        """Start the engine until it answers a canary. False when told to stop meanwhile.

        Raises EngineStartError if it never does, WorkerFailure if this process cannot ask it.
        """
        key = prompt_key(prompt)
        attempts = self._settings.engine_start_attempts
        for failures in count(1):
            if not self._engine.alive and not self.start_engine(attempts):
                return False
            with self._crashes.recorded([key], alone=True):
                result = self._inference.infer(prompt, [CANARY])
            # If the prompt leaves no space for any claim, the engine is not at fault.
            if result.verdicts or result.dead or result.declined:
                self._crashes.forget([key])
                return True
            if isinstance(result.failure, WorkerFailure):
                log.error("worker.unable", prompt=prompt.prompt_id, trace=result.failure.trace)
                raise result.failure
            if isinstance(result.failure, Interrupted) or self._stop.is_set():
                return False
            self._engine.stop()
            why = (
                f"it starts, but fails with a harmless claim: {result.failure or _UNUSABLE_ANSWER}"
            )
            if failures >= attempts:
                raise self._engine.start_error(why)
            if not self._back_off(failures, why):
                return False
        raise AssertionError("count() never ends")

    def _back_off(self, failures: int, why: str) -> bool:
        pause = backoff_seconds(
            failures, first_seconds=_FIRST_PAUSE_SECONDS, longest_seconds=_LONGEST_PAUSE_SECONDS
        )
        log.error("engine.start_failed", error=why, again_in_seconds=round(pause, 1))
        return not self._stop.wait(pause)


def prompt_key(prompt: PromptSpec) -> Key:
    """The key of the canary with this prompt in the crash records."""
    return (prompt.prompt_id, CANARY.claim_id)


def _failure_reason(result: InferenceResult, failures: int, log_end: str) -> DeadCause:
    if isinstance(result.failure, WorkerFailure):
        return DeadCause(
            DeadReason.WORKER_FAILED,
            f"the worker failed {failures} times with this claim, {failures - 1} of them alone, "
            f"and not with a harmless one:\n{result.failure.trace}",
        )
    return DeadCause(
        DeadReason.ENGINE_FAILED,
        f"an engine failed {failures} times with this claim, {failures - 1} of them alone, and not "
        f"with a harmless one: {result.failure or _UNUSABLE_ANSWER}. Its log's end:\n{log_end}",
    )


def _crash_reason(crash: Crash, failures: int) -> DeadCause:
    return DeadCause(
        DeadReason.WORKER_FAILED,
        f"the worker's process crashed {failures} times with this claim, {failures - 1} of them "
        f"alone, and not with a harmless one. Evidence:\n{crash.evidence}",
    )
