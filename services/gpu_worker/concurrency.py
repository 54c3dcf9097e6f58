"""How many claims and batches a worker keeps in flight: what it finishes in
`KEEPWARM_PREFETCH_SECONDS`, by its measured speed.
"""

import math
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from services.contracts.clock import awake_seconds

# The time constant of the rate's exponential average, in seconds of the engine's work.
_RATE_AVERAGE_SECONDS = 30.0
# The engine's speed is the highest of this many latest measurements.
_SPEED_SAMPLES = 8
# The claim limit before the speed is known: enough claims to measure it, and few enough for a slow
# engine to finish.
_INITIAL_CLAIM_LIMIT = 64
# Fewer claims would leave an engine with continuous batching half empty, and split a batch into
# many small messages.
_MIN_TRIMMED_CLAIMS = 8
# A batch is trimmed only if it exceeds the limit by this factor: returning a few claims is not
# worth a message.
_TRIM_FACTOR = 1.5
# If every recent batch had been delivered before, the limit is reduced by this part: work in flight
# is likely to be lost as well. The average is over about this many batches.
_MAX_REDELIVERY_REDUCTION = 7 / 8
_REDELIVERY_AVERAGE_BATCHES = 16
# Small batches share a request of about this many claims, because a request costs the engine nearly
# the same for one claim as for many. At least this many requests are kept at the engine, so that it
# always has work.
_REQUEST_CLAIMS = 32
_MIN_REQUESTS = 4


@dataclass(frozen=True, slots=True)
class RequestStart:
    """The measurements when a request was sent to the engine."""

    share: float
    answered: int
    answered_at: float


class AdaptiveConcurrency:
    """Measures claims/s while the engine works, and derives the limits of claims and batches.

    Several requests are at the engine at once, so the time of one request says little. Each is
    charged a share instead: one second with n requests at the engine costs each of them 1/n. The
    shares add up to the time in which the engine had work; idle time is charged to none. `rate`
    divides answered claims by these shares.

    The limits use the engine's speed: the most claims/s that were answered during one of the latest
    requests. Another worker's requests to the same engine, for instance one that drains, make
    answers slower and never faster, so the maximum is the engine's own speed. (BBR measures a
    path's bandwidth in this way: Cardwell et al., 2016.)

    When a connection, a worker or the broker is lost, another worker computes the work in flight
    again. So the limit is reduced when many batches had been delivered before, to any worker.
    Any thread may call any method.
    """

    def __init__(
        self,
        prefetch_seconds: float,
        max_batches: int,
        clock: Callable[[], float] = awake_seconds,
    ) -> None:
        self._prefetch_seconds = prefetch_seconds
        self._max_batches = max_batches
        self._clock = clock
        self._lock = threading.Lock()
        self._at_engine = 0
        self._share = 0.0  # the integral of 1/n over time, in seconds
        self._updated_at = clock()
        self._claims = self._seconds = 0.0  # both decay; their ratio is the rate
        self._answered = 0
        self._answered_at = self._updated_at  # or when the engine got work after it was idle
        self._speeds: deque[float] = deque(maxlen=_SPEED_SAMPLES)
        self._mean_batch: float | None = None
        self._redelivered = 0.0  # the part of the latest batches that had been delivered before

    @property
    def rate(self) -> float | None:
        """Claims/s; None until a batch has been answered."""
        return self._claims / self._seconds if self._seconds else None

    @property
    def claim_limit(self) -> int:
        """How many claims the worker may have in flight."""
        with self._lock:
            if not self._speeds:
                return _INITIAL_CLAIM_LIMIT
            return max(1, math.floor(self._prefetch_seconds * max(self._speeds)))

    @property
    def batch_limit(self) -> int:
        """How many batches of the recent mean size the worker may have in flight."""
        if self._mean_batch is None:
            return 1
        claims = self.claim_limit * (1 - _MAX_REDELIVERY_REDUCTION * self._redelivered)
        return max(1, min(self._max_batches, math.floor(claims / self._mean_batch)))

    @property
    def batches_per_request(self) -> int:
        """How many batches of the recent mean size share one request."""
        if self._mean_batch is None:
            return 1
        fitting = round(_REQUEST_CLAIMS / self._mean_batch)
        return max(1, min(self.batch_limit // _MIN_REQUESTS, fitting))

    def accept(self, claims: int, *, redelivered: bool = False) -> int:
        """Record the size of a delivered batch, and return how many of its claims to keep."""
        with self._lock:
            self._redelivered += (redelivered - self._redelivered) / _REDELIVERY_AVERAGE_BATCHES
            mean = self._mean_batch
            self._mean_batch = claims if mean is None else mean + (claims - mean) / 4
        limit = max(self.claim_limit, _MIN_TRIMMED_CLAIMS)
        return limit if claims >= _TRIM_FACTOR * limit else claims

    def begin(self) -> RequestStart:
        """A request is sent to the engine. Pass the result to `end`."""
        with self._lock:
            self._update_share()
            if self._at_engine == 0:
                self._answered_at = self._updated_at
            self._at_engine += 1
            return RequestStart(self._share, self._answered, self._answered_at)

    def end(self, start: RequestStart, claims: int) -> float:
        """The request has ended with `claims` answers; 0 if the engine failed, which is not a
        measurement. Returns the request's share of the engine's time in seconds.
        """
        with self._lock:
            self._update_share()
            self._at_engine -= 1
            self._answered += claims
            self._answered_at = self._updated_at
            seconds = self._share - start.share
            if claims and seconds > 0:
                # From the last answer before it was sent: an engine answers many claims at once.
                answered = self._answered - start.answered
                self._speeds.append(answered / (self._updated_at - start.answered_at))
                decay = math.exp(-seconds / _RATE_AVERAGE_SECONDS)
                self._claims = self._claims * decay + claims
                self._seconds = self._seconds * decay + seconds
            return seconds

    def _update_share(self) -> None:
        now = self._clock()
        if self._at_engine:
            self._share += (now - self._updated_at) / self._at_engine
        self._updated_at = now
