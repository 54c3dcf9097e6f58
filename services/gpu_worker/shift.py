"""What a worker keeps while it goes from one context to the next."""

import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from services.contexts.runtime_dir import open_runtime_dir
from services.gpu_worker.answer_count import AnswerCount
from services.gpu_worker.crashes import Crashes
from services.gpu_worker.device_time import DeviceTime
from services.gpu_worker.in_hand import Signature
from services.gpu_worker.news import News
from services.gpu_worker.reports import Post, Reports
from services.telemetry import Pulse


@dataclass(frozen=True, slots=True)
class Shift:
    """Its name, what it heard, what it says of itself, and whether it has to go."""

    signature: Signature
    reports: Reports
    device_time: DeviceTime
    news: News
    pulse: Pulse
    stop: threading.Event
    answers: AnswerCount
    crashes: Crashes

    @classmethod
    def begin(
        cls, signature: Signature, post: Post, runtime_dir: Path, *, log_progress: bool = False
    ) -> Self:
        """Raises UsageError for a runtime directory that is not ours."""
        reports, device_time = Reports(signature, post), DeviceTime(signature.device)
        answers = AnswerCount(logged=log_progress)
        crashes = Crashes(open_runtime_dir(runtime_dir), signature.worker_id)
        stop = threading.Event()
        return cls(signature, reports, device_time, News(), Pulse(), stop, answers, crashes)
