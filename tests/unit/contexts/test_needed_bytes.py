"""How much memory an engine needs, before it starts."""

from pathlib import Path

import pytest

from services.contexts.engine_command import needed_bytes
from services.contexts.plan import EnginePlan
from services.contracts import ContextSpec, load_settings
from services.node.device import Device

GIB = 1024**3


@pytest.fixture
def plan(model_dir: Path) -> EnginePlan:
    with (model_dir / "model.safetensors").open("wb") as weights:
        weights.truncate(2 * GIB)
    spec = ContextSpec(model=str(model_dir))
    return EnginePlan.of(spec, Device("cpu", "Xeon", 16 * GIB, (0, 1)), load_settings())


def test_on_processors_an_engine_needs_what_it_used_the_last_time(plan: EnginePlan) -> None:
    assert needed_bytes(plan, 5 * GIB) == 5 * GIB


@pytest.mark.parametrize("known", [None, 0])
def test_without_an_earlier_start_the_estimate_follows_the_weights(
    plan: EnginePlan, known: int | None
) -> None:
    # 1.3 times the weights, 2 GiB of key-value cache, 1.5 GiB for the processes.
    assert needed_bytes(plan, known) == pytest.approx(6.1 * GIB, rel=0.001)
