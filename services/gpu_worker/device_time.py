"""Where the device's time goes: each second of it to one use."""

import threading
from collections.abc import Callable
from typing import Literal

from services.contracts.clock import awake
from services.gpu_worker.metrics import DEVICE_SECONDS

Use = Literal["loading", "idle", "batches"]


class DeviceTime:
    """Cuts time into laps. Batches tell their own, by the shares that `AdaptiveConcurrency` gives
    them, for only at its end is it known whether a batch was of any use. Any thread.
    """

    def __init__(self, device: str, clock: Callable[[], float] = awake) -> None:
        self._device = device
        self._clock = clock
        self._lock = threading.Lock()
        self._lap_began = clock()

    def lap(self, use: Use) -> None:
        """The time since the last lap had this use."""
        with self._lock:
            now = self._clock()
            seconds, self._lap_began = now - self._lap_began, now
        if use != "batches":
            DEVICE_SECONDS.labels(self._device, use).inc(seconds)

    def computed(self, seconds: float, *, answered: int, asked: int) -> None:
        """A batch took so long, and so many of its claims have an answer: the rest was in vain."""
        kept = answered / asked if asked else 1.0
        DEVICE_SECONDS.labels(self._device, "inferring").inc(seconds * kept)
        DEVICE_SECONDS.labels(self._device, "lost").inc(seconds * (1 - kept))
