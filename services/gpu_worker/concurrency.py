"""How much work a worker keeps in hand: what it finishes within its horizon, by its own speed."""

import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from services.contracts.clock import awake

# How far back the rate remembers, in seconds of the engine's work.
_MEMORY_SECONDS = 30.0
# Of so many answers the fastest says what the engine can do.
_LATEST_ANSWERS = 8
# Before the rate is known: enough to learn it from, and little enough for a slow engine to finish.
_FIRST_CLAIMS = 64
# Fewer would leave an engine that batches by itself half empty, and make crumbs of a batch.
_LEAST_CLAIMS = 8
# A batch that is a little too large is not worth a message.
_TRIM_FROM = 1.5
# Where every batch had been delivered before, so much of the horizon stays empty: its work would be
# lost as well. About so many of the latest batches say how it is.
_MOST_CAUTION = 7 / 8
_LATEST_BATCHES = 16
# Small batches go to the engine together, about so many claims in a request, for that costs it as
# much for one claim as for many. And so many requests there are at least, that it is never without.
_TOGETHER_CLAIMS = 32
_REQUESTS = 4


@dataclass(frozen=True, slots=True)
class Begun:
    """How things stood when a batch went to the engine."""

    share: float
    answered: int
    answered_at: float


class AdaptiveConcurrency:
    """Measures claims/s while the engine works, and says how many claims and batches that allows.

    Several batches are at the engine at once, so a batch's own seconds say little. Each is charged
    its share instead: a second with n batches at the engine costs each a nth of it. Shares add up
    to the time in which the engine had work, and idle time is nobody's.

    That is the rate. What is allowed goes by the engine's speed: the most claims/s that were
    answered while one of the latest batches was there. The engine may have been busy with what
    another worker had asked, who drains before us or shares it for a while, and that makes answers
    slower and never faster. (BBR measures a path's bandwidth so: Cardwell et al., 2016.)

    What is in hand when a connection, a worker or the broker goes is computed again by whoever gets
    it then. So where many batches come that had been delivered before, to anybody, fewer are taken.
    Any thread may ask.
    """

    def __init__(
        self,
        prefetch_seconds: float,
        most_batches: int,
        clock: Callable[[], float] = awake,
    ) -> None:
        self._prefetch_seconds = prefetch_seconds
        self._most_batches = most_batches
        self._clock = clock
        self._lock = threading.Lock()
        self._at_engine = 0
        self._share = 0.0  # what a batch would have been charged that is there since the beginning
        self._looked = clock()
        self._claims = self._seconds = 0.0  # both fade, so that their ratio follows the engine
        self._answered = 0
        self._answered_at = self._looked  # or since when there is something to answer
        self._speeds: deque[float] = deque(maxlen=_LATEST_ANSWERS)
        self._mean_batch: float | None = None
        self._lost = 0.0  # of the latest batches, the part that had been delivered before

    @property
    def rate(self) -> float | None:
        """Claims/s; None until a batch has been answered."""
        return self._claims / self._seconds if self._seconds else None

    @property
    def limit(self) -> int:
        """How many claims the worker may have in hand."""
        with self._lock:
            if not self._speeds:
                return _FIRST_CLAIMS
            return max(1, math.floor(self._prefetch_seconds * max(self._speeds)))

    @property
    def batches(self) -> int:
        """How many batches of the size that came lately to take: as make the allowance, or fewer
        where work is lost.
        """
        if self._mean_batch is None:
            return 1
        worth = self.limit * (1 - _MOST_CAUTION * self._lost)
        return max(1, min(self._most_batches, math.floor(worth / self._mean_batch)))

    @property
    def together(self) -> int:
        """How many batches of the size that came lately make one request."""
        if self._mean_batch is None:
            return 1
        return max(1, min(self.batches // _REQUESTS, round(_TOGETHER_CLAIMS / self._mean_batch)))

    def take(self, claims: int, *, redelivered: bool = False) -> int:
        """A batch came with so many claims: how many of them to keep."""
        with self._lock:
            self._lost += (redelivered - self._lost) / _LATEST_BATCHES
            mean = self._mean_batch
            self._mean_batch = claims if mean is None else mean + (claims - mean) / 4
        limit = max(self.limit, _LEAST_CLAIMS)
        return limit if claims >= _TRIM_FROM * limit else claims

    def begin(self) -> Begun:
        """A batch goes to the engine. Give what this returns to `end`."""
        with self._lock:
            self._look()
            if self._at_engine == 0:
                self._answered_at = self._looked
            self._at_engine += 1
            return Begun(self._share, self._answered, self._answered_at)

    def end(self, begun: Begun, claims: int) -> float:
        """It is back, with `claims` answered; 0 where the engine failed, which is no measure. Its
        share of the engine's seconds.
        """
        with self._lock:
            self._look()
            self._at_engine -= 1
            self._answered += claims
            self._answered_at = self._looked
            seconds = self._share - begun.share
            if claims and seconds > 0:
                # Since the answer before it went, for an engine answers many at once.
                answered = self._answered - begun.answered
                self._speeds.append(answered / (self._looked - begun.answered_at))
                left = math.exp(-seconds / _MEMORY_SECONDS)
                self._claims = self._claims * left + claims
                self._seconds = self._seconds * left + seconds
            return seconds

    def _look(self) -> None:
        now = self._clock()
        if self._at_engine:
            self._share += (now - self._looked) / self._at_engine
        self._looked = now
