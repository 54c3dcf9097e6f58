"""Which claim does the engine fail with? Each claim of a suspect batch is asked alone.

Halving the batch would take an engine's start for each halving; asking one by one takes one for the
claim at fault, and costs a batch's time without batching (docs/decisions/0013).
"""

import threading
from collections import deque
from itertools import count

import structlog

from services.contexts.attachment import Attachment
from services.contexts.completions import EngineSilent, Interrupted
from services.contracts import Claim, DeadReason, PromptSpec, Settings
from services.contracts.backoff import growing_pause
from services.contracts.errors import EngineRequestError, EngineStartError, KeeperError
from services.gpu_worker.in_hand import BatchInHand
from services.gpu_worker.inference import Inference, Outcome, Refusal

_HARMLESS = Claim(claim_id="harmless", position=0, text="Water is wet.")
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 2.0, 30.0
_NONSENSE = "it gave no usable answer: aborted, or scores that are missing or not numbers"

log = structlog.get_logger(__name__)


class Examination:
    """Minds the engine's health, and tells a claim's fault from the engine's own.

    Nobody else may be asking the engine while one of its methods runs.
    """

    def __init__(
        self, engine: Attachment, inference: Inference, settings: Settings, stop: threading.Event
    ) -> None:
        self._engine = engine
        self._inference = inference
        self._settings = settings
        self._stop = stop

    def examine(self, hand: BatchInHand) -> None:
        """Give every claim of a suspect batch an outcome; claims stay open only when told to stop.

        A claim is given up on when the engine failed with it `KEEPWARM_CLAIM_FAILURES` times, all
        but the first alone, and each time answered a harmless claim afterwards. Raises
        EngineStartError when there is no engine that does; then it is the node that is at fault.
        """
        prompt = hand.batch.run.prompt
        log.warning("batch.suspect", batch=hand.batch.batch_id, claims=len(hand.open))
        if not self._recover(prompt):
            return
        waiting = deque(hand.open)
        while waiting and not self._stop.is_set():
            place = waiting.popleft()
            outcome = self._inference.infer(prompt, hand.claims([place]))
            hand.note([place], outcome)
            if place not in hand.open:
                continue
            last_words = "\n".join(self._engine.last_words())
            self.note_failure(outcome.failure)
            if not self._recover(prompt):
                return
            hand.blame([place], alone=True)
            failures = hand.open[place]
            log.warning("claim.failed", batch=hand.batch.batch_id, place=place, failures=failures)
            if failures < self._settings.claim_failures:
                waiting.append(place)
            else:
                hand.bury(place, _engine_failed(outcome, failures, last_words))

    def note_failure(self, failure: EngineRequestError | None) -> None:
        """An engine that hangs is ended: it would hang for whoever asks next. One that broke off
        may be gone, which its keeper is about to say.
        """
        if isinstance(failure, EngineSilent):
            log.error("engine.silent", reason=str(failure))
            self._engine.stop()
        elif failure is not None:
            self._engine.look()

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
        """Have an engine that answers a harmless claim. False when told to stop meanwhile."""
        attempts = self._settings.engine_start_attempts
        for failures in count(1):
            if not self._engine.alive and not self.start_engine(attempts):
                return False
            outcome = self._inference.infer(prompt, [_HARMLESS])
            # A prompt that no claim fits into is not the engine's fault.
            if outcome.verdicts or outcome.refused:
                return True
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
        pause = growing_pause(
            failures, first_seconds=_FIRST_PAUSE_SECONDS, longest_seconds=_LONGEST_PAUSE_SECONDS
        )
        log.error("engine.start_failed", error=why, again_in_seconds=round(pause, 1))
        return not self._stop.wait(pause)


def _engine_failed(outcome: Outcome, failures: int, last_words: str) -> Refusal:
    return Refusal(
        DeadReason.ENGINE_FAILED,
        f"an engine failed {failures} times with this claim, {failures - 1} of them alone, and not "
        f"with a harmless one: {outcome.failure or _NONSENSE}. Its log ended with:\n{last_words}",
    )
