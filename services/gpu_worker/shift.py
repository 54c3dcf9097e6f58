"""What a worker keeps while it goes from one context to the next."""

import threading
from dataclasses import dataclass
from typing import Self

from services.gpu_worker.answer_count import AnswerCount
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

    @classmethod
    def begin(cls, signature: Signature, post: Post, *, log_progress: bool = False) -> Self:
        reports, device_time = Reports(signature, post), DeviceTime(signature.device)
        answers = AnswerCount(logged=log_progress)
        return cls(signature, reports, device_time, News(), Pulse(), threading.Event(), answers)
