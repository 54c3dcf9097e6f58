"""Does an engine still answer? Asked by its keeper while no worker uses it: workers have a time-out
of their own, and an engine that hangs would be handed to the next one as warm.
"""

from collections.abc import Callable

from services.contracts.clock import awake

# An engine on processors may be busy with the last requests of a worker that has gone, and its node
# with the start of another engine: that takes seconds, and this two minutes, at 5 s for an answer.
_EVERY_SECONDS = 20.0
_TIMES = 5


class Silence:
    """How often in a row an engine did not answer."""

    def __init__(self, answers: Callable[[], bool], clock: Callable[[], float] = awake) -> None:
        self._answers = answers
        self._clock = clock
        self.forget()

    def forget(self) -> None:
        """Nothing is known of it: it is used, or asleep."""
        self._unanswered = 0
        self._again_at = self._clock() + _EVERY_SECONDS

    @property
    def lasts(self) -> bool:
        """Whether it hangs, by all that one can tell. Now and then this asks it, and waits."""
        if self._clock() >= self._again_at:
            self._unanswered = 0 if self._answers() else self._unanswered + 1
            self._again_at = self._clock() + _EVERY_SECONDS
        return self._unanswered >= _TIMES
