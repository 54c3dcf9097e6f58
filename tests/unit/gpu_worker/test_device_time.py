import pytest
from prometheus_client import REGISTRY

from services.gpu_worker.device_time import DeviceTime
from tests.unit.clock import Clock


def seconds(device: str, use: str) -> float:
    labels = {"device": device, "use": use}
    return REGISTRY.get_sample_value("keepwarm_device_seconds_total", labels) or 0.0


def test_each_second_has_one_use(clock: Clock) -> None:
    time = DeviceTime("laps", clock)
    for length, use in ((30, "loading"), (2, "idle"), (10, "batches"), (1, "idle")):
        clock.now += length
        time.lap(use)  # type: ignore[arg-type]
    time.record_batch(10.0, answered=3, requested=4)
    uses = ("loading", "idle", "inferring", "lost")
    assert [seconds("laps", use) for use in uses] == [30, 3, 7.5, 2.5]


@pytest.mark.parametrize(("answered", "asked", "lost"), [(0, 4, 8.0), (4, 4, 0.0), (0, 0, 0.0)])
def test_what_has_no_answer_was_in_vain(answered: int, asked: int, lost: float) -> None:
    device = f"{answered} of {asked}"
    DeviceTime(device).record_batch(8.0, answered=answered, requested=asked)
    assert (seconds(device, "inferring"), seconds(device, "lost")) == (8.0 - lost, lost)
