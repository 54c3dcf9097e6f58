"""The engine's own metrics among ours, whatever it says."""

import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from services.contexts.metrics import ContextStates, EngineMetrics
from services.contracts.errors import EngineRequestError

VLLM = """\
# HELP vllm:num_requests_running Requests.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="a \\"b\\\\"} 3.0
# HELP vllm:prompt_tokens_total Tokens.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0"} 12.0
# HELP vllm:ttft_seconds Time.
# TYPE vllm:ttft_seconds histogram
vllm:ttft_seconds_bucket{le="0.1"} 1.0
vllm:ttft_seconds_bucket{le="+Inf"} 2.0
vllm:ttft_seconds_count 2.0
vllm:ttft_seconds_sum 0.3
"""
OTHERS = "# TYPE process_open_fds gauge\nprocess_open_fds 12.0\nkeepwarm_verdicts_total 7.0\n"


class Engine:
    """Stands for the client of one."""

    def __init__(self, said: str | None) -> None:
        self._said = said

    def metrics(self) -> str:
        if self._said is None:
            raise EngineRequestError("it hangs")
        return self._said


def told(engine: Engine | None) -> str:
    registry = CollectorRegistry()
    registry.register(EngineMetrics(lambda: engine))  # type: ignore[arg-type, return-value]
    text = generate_latest(registry).decode()
    assert list(text_string_to_metric_families(text))
    return text


def test_metrics_of_vllm_are_relayed_unchanged() -> None:
    up, _, rest = told(Engine(VLLM)).partition("keepwarm_engine_metrics_up 1.0\n")
    assert up and rest == VLLM


def test_what_has_the_name_of_something_of_ours_is_left_out() -> None:
    assert told(Engine(VLLM + OTHERS)) == told(Engine(VLLM))


def test_a_metric_that_comes_twice_is_relayed_once() -> None:
    assert told(Engine(VLLM + VLLM)).count("# TYPE vllm:ttft_seconds histogram") == 1


@pytest.mark.parametrize(
    "said", [None, "", "nonsense {{{", 'vllm:x{a="b} 1\n', "vllm:x one\n", "# TYPE vllm:x\n\x00"]
)
def test_an_engine_that_tells_nothing_of_use_leaves_ours_readable(said: str | None) -> None:
    assert "keepwarm_engine_metrics_up 0.0\n" in told(Engine(said))


def test_without_an_engine_there_is_nothing_to_tell() -> None:
    assert "keepwarm_engine_metrics_up 0.0\n" in told(None)


def test_contexts_are_counted_by_state_and_those_without_any_are_zero() -> None:
    registry = CollectorRegistry()
    registry.register(ContextStates(lambda: ["warm", "warm", "starting"]))
    values = {
        state: registry.get_sample_value("keepwarm_contexts", {"state": state})
        for state in ("waiting", "starting", "warm", "asleep", "stopping")
    }
    assert values == {"waiting": 0, "starting": 1, "warm": 2, "asleep": 0, "stopping": 0}
