"""How many claims a worker has answered, logged for the `keepwarm run` that started it."""

import threading
import time

import structlog

PROGRESS_EVENT = "worker.progress"
_LOG_SECONDS = 0.2

log = structlog.get_logger(__name__)


class AnswerCount:
    """Counts the engine's answers as they come: before their batch is complete and published."""

    def __init__(self, *, logged: bool = False) -> None:
        """With `logged` false, `log` writes nothing."""
        self._logged = logged
        self._lock = threading.Lock()
        self._answered = self._last_logged = 0
        self._next_log_at = 0.0

    @property
    def answered(self) -> int:
        """Answers so far. A claim that was asked twice counts twice."""
        return self._answered

    def add(self) -> None:
        """Count one answer. Any thread may call it."""
        with self._lock:
            self._answered += 1

    def log(self) -> None:
        """Log the count if it has changed, at most once every `_LOG_SECONDS`."""
        now = time.monotonic()
        if not self._logged or now < self._next_log_at or self._answered == self._last_logged:
            return
        self._next_log_at, self._last_logged = now + _LOG_SECONDS, self._answered
        log.info(PROGRESS_EVENT, answered=self._last_logged)
