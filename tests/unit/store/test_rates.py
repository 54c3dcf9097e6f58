"""How fast devices answered the claims of a context."""

from types import SimpleNamespace

import pytest

from services.contracts import ContextSpec, Run
from services.store import Store, device_rates


def test_a_context_without_verdicts_has_no_rate(
    store: Store, make: SimpleNamespace, run: Run
) -> None:
    assert device_rates(store, run.context.context_id) == ()
    store.write(make.incoming(make.announced(claims=2)))
    assert device_rates(store, run.context.context_id) == ()


def test_the_rate_of_a_device_is_that_of_its_workers_in_all_runs_of_the_context(
    store: Store, make: SimpleNamespace, run: Run, other_run: Run
) -> None:
    elsewhere = run.model_copy(update={"context": ContextSpec(model="elsewhere")})
    verdicts = [make.verdict(number) for number in range(4)]
    store.write(
        make.incoming(
            *(make.announced(claims=4, of=each) for each in (run, other_run, elsewhere)),
            # Two workers, each for two seconds; the first with claims of two runs at a time.
            make.batch(*verdicts[:2]),
            make.batch(verdicts[2], of=other_run),
            make.batch(verdicts[3], of=other_run, worker_id="node-2"),
            make.batch(*verdicts, of=other_run, worker_id="node-3", device="AMD EPYC"),
            make.batch(*verdicts, of=elsewhere),
        )
    )
    first, second = device_rates(store, run.context.context_id)
    assert {first.device: first.claims, second.device: second.claims} == {
        "Tesla T4": 4,
        "AMD EPYC": 4,
    }
    rates = {rate.device: rate for rate in (first, second)}
    assert rates["Tesla T4"].prompt_tokens == 40
    assert rates["Tesla T4"].seconds == pytest.approx(4.0, abs=1e-3)
    assert rates["Tesla T4"].tokens_per_second == pytest.approx(10.0, rel=1e-3)
    assert rates["AMD EPYC"].seconds == pytest.approx(2.0, abs=1e-3)
