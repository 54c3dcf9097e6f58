"""The live workers in the form of Prometheus' HTTP service discovery.

The form: https://prometheus.io/docs/prometheus/latest/http_sd/. `__meta_keepwarm_…` labels are for
relabelling only: no series has a worker's id unless a relabelling rule adds it.
"""

from collections.abc import Iterable
from typing import Any

from services.collector.metrics import UNLISTED
from services.contracts import WorkerHeartbeat
from services.contracts.addresses import is_loopback, split_address

MAX_TARGETS = 10_000
"""About 4 MiB. One Prometheus server scrapes no more than some thousand workers."""


def targets(workers: Iterable[WorkerHeartbeat], own_host: str) -> list[dict[str, Any]]:
    """A target for each address; if several workers report one address, the last in the list wins.
    Of more than `MAX_TARGETS` the first in alphabetical order are listed, the others are counted.

    A worker that listens on loopback is left out unless it is on `own_host`: elsewhere its address
    is another process.
    """
    reachable = {
        worker.metrics_address: worker
        for worker in workers
        if worker.metrics_address is not None
        and (worker.host == own_host or not is_loopback(split_address(worker.metrics_address)[0]))
    }
    UNLISTED.set(max(0, len(reachable) - MAX_TARGETS))
    return [
        {
            "targets": [address],
            "labels": {
                "service": "worker",
                "__meta_keepwarm_worker": worker.worker_id,
                "__meta_keepwarm_host": worker.host or "",
                "__meta_keepwarm_device": worker.device,
                "__meta_keepwarm_job_id": worker.job_id or "",
                "__meta_keepwarm_state": worker.state,
                "__meta_keepwarm_context": worker.context_id or "",
            },
        }
        for address, worker in sorted(reachable.items())[:MAX_TARGETS]
    ]
