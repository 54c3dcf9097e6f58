"""What a worker says of itself: that it is there, what it serves, how fast."""

import time

from services.broker import Outgoing, Publisher
from services.contracts import WorkerReport, topology
from services.contracts.presence import REPORT_SECONDS, WorkerState
from services.gpu_worker.in_hand import Signature


class Reports:
    """Sends one every `REPORT_SECONDS`, and one at each change; never waits for the broker."""

    def __init__(self, signature: Signature, context_id: str) -> None:
        self._signature = signature
        self._context_id = context_id
        self._said: WorkerState | None = None
        self._due = 0.0

    def say(
        self, state: WorkerState, claims_per_second: float | None, publisher: Publisher
    ) -> None:
        """Tell the collectors that listen, if it is time. With messages waiting for a broker that
        takes none, it is not: a report is only worth something now.
        """
        now = time.monotonic()
        if (state == self._said and now < self._due) or publisher.blocked_by is not None:
            return
        self._said, self._due = state, now + REPORT_SECONDS
        report = WorkerReport(
            worker_id=self._signature.worker_id,
            context_id=self._context_id,
            device=self._signature.device,
            state=state,
            claims_per_second=claims_per_second,
        )
        publisher.publish(Outgoing.of(report, topology.PRESENCE_EXCHANGE, "", notice=True))
