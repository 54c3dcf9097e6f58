"""What the device's time is used for: each second counts for one use."""

import threading
from collections.abc import Callable
from typing import Literal

from services.contracts.clock import awake_seconds
from services.gpu_worker.metrics import DEVICE_SECONDS

Use = Literal["loading", "idle", "batches"]


class DeviceTime:
    """Cuts time into laps, each with one use. Any thread may call it.

    The time of batches is counted by `record_batch` instead, with the shares that
    `AdaptiveConcurrency` measures: whether a batch's time was lost is known only at its end.
    """

    def __init__(self, device: str, clock: Callable[[], float] = awake_seconds) -> None:
        self._device = device
        self._clock = clock
        self._lock = threading.Lock()
        self._lap_began = clock()

    def lap(self, use: Use) -> None:
        """Count the time since the last lap for this use."""
        with self._lock:
            now = self._clock()
            seconds, self._lap_began = now - self._lap_began, now
        if use != "batches":
            DEVICE_SECONDS.labels(self._device, use).inc(seconds)

    def record_batch(self, seconds: float, *, answered: int, requested: int) -> None:
        """Count a batch's time as inferring, and as lost for the claims without an answer."""
        kept = answered / requested if requested else 1.0
        DEVICE_SECONDS.labels(self._device, "inferring").inc(seconds * kept)
        DEVICE_SECONDS.labels(self._device, "lost").inc(seconds * (1 - kept))
