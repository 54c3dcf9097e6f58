"""A batch harms no other batch, and a node that cannot answer a claim does not kill it."""

import signal
from pathlib import Path
from shutil import rmtree

import pytest

from services.broker import BrokerAddress, Consumer
from services.contracts import ContextSpec, topology
from services.models.files import pin_model
from tests.conftest import REPOSITORY
from tests.integration.conftest import PATIENCE, Command, cut, wait_until
from tests.integration.runs import Start, end_well, outcomes, submit, write_claims
from tests.integration.test_worker import collect, dead_of
from tests.interpreters import interpreter

LONG = "many different words " * 60  # some 240 tokens
# A worker keeps claims that it has declined before for 5 s otherwise.
SOON = {"TEST_WAITS": "services.gpu_worker.session._DECLINED_DELAY_SECONDS=1"}


@pytest.fixture(scope="session")
def faulty_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An interpreter whose tokenizers fail with what they are told to."""
    return interpreter(tmp_path_factory.mktemp("faulty"), REPOSITORY / "tests" / "faulty")


def claims(file: Path, count: int, odd: dict[int, dict[str, str]]) -> Path:
    lines = [{"id": str(number), "claim": f"Claim {number}."} for number in range(count)]
    return write_claims(file, [line | odd.get(number, {}) for number, line in enumerate(lines)])


def answered(environment: dict[str, str]) -> tuple[set[str], dict[str, str]]:
    """Ids with a label, and the dead with their reasons."""
    found = outcomes(environment)
    return {i for i, label, _ in found if label}, {i: why for i, _, why in found if why}


def ids(count: int) -> set[str]:
    return set(map(str, range(count)))


# A batch that the worker itself fails with.


@pytest.mark.parametrize("fault", ["PLEASE RAISE", "PLEASE PANIC"])
def test_five_workers_survive_a_batch_that_raises_for_one_claim_which_alone_is_dead(
    command: Start, environment: dict[str, str], tmp_path: Path, faulty_python: Path, fault: str
) -> None:
    file = claims(tmp_path / "claims.jsonl", 200, {77: {"claim": fault}})
    collecting = collect(command, submit(command, file))
    workers = [command("worker", python=faulty_python) for _ in range(5)]
    assert collecting.wait() == 0, collecting.output
    assert answered(environment) == (ids(200) - {"77"}, {"77": "worker-failed"})
    shown = command("dead", "show", *dead_of(environment))
    assert shown.wait() == 0, shown.output
    assert "the worker failed 3 times with this claim, 2 of them alone" in shown.output
    assert "the tokenizer was told to" in shown.output
    end_well(*workers)


@pytest.mark.parametrize(
    ("fault", "number", "says"),
    [
        ("PLEASE CRASH", signal.SIGSEGV, "Segmentation fault"),
        ("PLEASE ABORT", signal.SIGABRT, "Aborted"),
        ("PLEASE HANG", signal.SIGABRT, "Aborted"),
    ],
)
def test_a_claim_that_ends_the_workers_process_ends_few_and_is_dead_with_what_they_left(
    command: Start,
    environment: dict[str, str],
    tmp_path: Path,
    faulty_python: Path,
    fault: str,
    number: int,
    says: str,
) -> None:
    file = claims(tmp_path / "claims.jsonl", 64, {40: {"claim": fault}})
    collecting = collect(command, submit(command, file))
    codes: list[int] = []
    running: list[Command] = []

    def replace_the_dead() -> bool:
        """As a supervisor would. Whether the run is complete."""
        for worker in [worker for worker in running if worker.process.poll() is not None]:
            running.remove(worker)
            codes.append(worker.wait())
        while len(running) < 2:
            running.append(
                command("worker", python=faulty_python, KEEPWARM_TOKENIZER_TIMEOUT_SECONDS="3")
            )
        return collecting.process.poll() is not None

    wait_until(replace_the_dead, "the run's end")
    assert collecting.wait() == 0
    assert answered(environment) == (ids(64) - {"40"}, {"40": "worker-failed"})
    # In company once, then alone; of two workers with it at hand the second may not know yet.
    assert set(codes) == {-number} and 3 <= len(codes) <= 4
    shown = command("dead", "show", *dead_of(environment))
    assert shown.wait() == 0, shown.output
    assert "the worker's process crashed" in shown.output
    assert f"Fatal Python error: {says}" in shown.output
    end_well(*running)


def test_all_other_claims_are_answered_if_workers_that_a_claim_ends_leave_no_evidence(
    command: Start,
    environment: dict[str, str],
    tmp_path: Path,
    faulty_python: Path,
    address: BrokerAddress,
    small_model: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("services.broker.link._FIRST_DELAY_SECONDS", 0.01)  # of the victim's
    submit(command, claims(tmp_path / "claims.jsonl", 48, {5: {"claim": "PLEASE CRASH"}}))
    queue = topology.claims_queue(pin_model(ContextSpec(model=str(small_model))).context_id)
    # The first workers, without the time that they take.
    with Consumer(address, "victim", queues=[queue], prefetch=1).open(PATIENCE) as victim:
        for _ in range(20):
            assert victim.take(PATIENCE)
            cut(victim)
        assert victim.take(PATIENCE)
    collecting = command("collect")
    ended: list[Command] = []
    running: list[Command] = []

    def replace_the_dead() -> bool:
        """With a runtime directory that is as good as new. Whether it died alone."""
        if not running or running[-1].process.poll() is not None:
            ended.extend(running)
            running.clear()
            for name in ("workers", "crashed"):
                rmtree(Path(environment["KEEPWARM_RUNTIME_DIR"]) / name, ignore_errors=True)
            running.append(command("worker", python=faulty_python))
        return len(outcomes(environment)) == 47 and len(ended) > 2

    wait_until(replace_the_dead, "all answers")
    assert answered(environment) == (ids(48) - {"5"}, {})
    assert {worker.wait() for worker in ended} == {-signal.SIGSEGV}
    running[0].process.kill()
    end_well(collecting)


def test_a_prompt_that_hangs_the_tokenizer_makes_its_claims_dead_and_no_others(
    command: Start, environment: dict[str, str], tmp_path: Path, faulty_python: Path
) -> None:
    prompt = tmp_path / "prompt.yaml"
    prompt.write_text("name: hangs\ninstructions: PLEASE HANG\n")
    file = claims(tmp_path / "claims.jsonl", 16, {})
    submit(command, file, "--prompt", str(prompt))
    submit(command, file)
    collecting = command("collect")
    running: list[Command] = []

    def replace_the_dead() -> bool:
        """Whether all claims have an outcome."""
        if not running or running[-1].process.poll() is not None:
            running.append(
                command("worker", python=faulty_python, KEEPWARM_TOKENIZER_TIMEOUT_SECONDS="2")
            )
        return len(outcomes(environment)) == 32

    wait_until(replace_the_dead, "the end of both runs")
    assert answered(environment) == (ids(16), dict.fromkeys(ids(16), "prompt-unusable"))
    end_well(running[-1], collecting)


def test_a_worker_whose_tokenizer_hangs_drains_in_time(
    command: Start, environment: dict[str, str], tmp_path: Path, faulty_python: Path
) -> None:
    file = claims(tmp_path / "claims.jsonl", 16, {3: {"claim": "PLEASE HANG"}})
    submit(command, file)
    worker = command("worker", python=faulty_python, KEEPWARM_GRACE_SECONDS="5")
    worker.said("worker.taking")
    wait_until(
        lambda: any(Path(environment["KEEPWARM_RUNTIME_DIR"]).glob("workers/*/*.json")), "a request"
    )
    end_well(worker)


# A node that cannot answer what others can.


def test_what_is_too_long_for_one_node_alone_is_answered_by_another(
    command: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    odd = {number: {"evidence": LONG} for number in range(0, 64, 4)}
    file = claims(tmp_path / "claims.jsonl", 64, odd)
    collecting = collect(command, submit(command, file))
    short = command("worker", KEEPWARM_ENGINE_ARGUMENTS="--max-model-len 200", **SOON)
    short.said("claims.declined")
    assert "engine.shorter_than_context" in short.output
    healthy = command("worker", VLLM_TEST_CLAIM_SECONDS="0.01")
    assert collecting.wait() == 0, short.output
    assert answered(environment) == (ids(64), {})
    end_well(short, healthy)


def test_a_run_whose_engines_are_all_too_short_ends_with_the_reason(
    command: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    file = claims(tmp_path / "claims.jsonl", 32, {5: {"evidence": LONG}})
    collecting = collect(command, submit(command, file))
    worker = command(
        "worker",
        KEEPWARM_ENGINE_ARGUMENTS="--max-model-len 200",
        KEEPWARM_OTHER_ENGINE_SECONDS="5",
    )
    assert collecting.wait() == 0, worker.output
    assert answered(environment) == (ids(32) - {"5"}, {"5": "too-long"})
    shown = command("dead", "show", *dead_of(environment))
    assert shown.wait() == 0, shown.output
    told = " ".join(shown.output.split())
    assert "The context accepts them, but this engine accepts only 199" in told
    assert "No other engine answered the claim, which waited 5 s for one" in told
    end_well(worker)


@pytest.mark.parametrize("fault", ["refuse-long", "refuse-repeats", "oom-long"])
def test_what_one_engine_refuses_or_has_no_memory_for_is_answered_by_another(
    command: Start, environment: dict[str, str], tmp_path: Path, fault: str
) -> None:
    file = claims(tmp_path / "claims.jsonl", 32, {5: {"evidence": LONG}})
    collecting = collect(command, submit(command, file))
    bad = command("worker", VLLM_TEST_FAULT=fault, **SOON)
    # It has returned the claim before there is another worker.
    bad.said("claims.declined" if fault != "oom-long" else "claim.failed")
    good = command("worker")
    assert collecting.wait() == 0, bad.output
    assert answered(environment) == (ids(32), {})
    end_well(bad, good)


def test_a_claim_that_two_engines_refuse_that_take_others_of_its_length_is_dead(
    command: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    file = claims(tmp_path / "claims.jsonl", 32, {5: {"evidence": LONG}})
    collecting = collect(command, submit(command, file))
    workers = [
        command(
            "worker",
            VLLM_TEST_FAULT="refuse-repeats",
            KEEPWARM_ENGINE_ARGUMENTS=f"--seed {seed}",
            KEEPWARM_OTHER_ENGINE_SECONDS="600",
            **SOON,
        )
        for seed in (1, 2)
    ]
    assert collecting.wait() == 0, workers[0].output
    assert answered(environment) == (ids(32) - {"5"}, {"5": "engine-refused"})
    shown = command("dead", "show", *dead_of(environment))
    assert shown.wait() == 0, shown.output
    told = " ".join(shown.output.split())
    assert "a prompt repeats itself" in told
    assert "It accepts harmless text of the same length." in told
    assert "Declined as well by: " in told
    end_well(*workers)
