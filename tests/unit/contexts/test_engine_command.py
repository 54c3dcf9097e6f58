import os
import sys
from pathlib import Path

import pytest

from services.contexts.engine_command import (
    cores_of,
    engine_arguments,
    engine_environment,
    fork_server_environment,
)
from services.contexts.plan import EnginePlan
from services.contracts import ContextSpec, load_settings
from services.contracts.errors import UsageError
from services.node.device import Device

GIB = 1024**3
CPU = Device("cpu", "Xeon", 40 * GIB, (0, 1, 5))
GPU = Device("cuda", "Tesla T4", 15 * GIB, (0, 1))
SPEC = ContextSpec(model="org/model", revision="abc", dtype="float16", max_model_tokens=2048)
SOCKET = Path("/run/kw/e.sock")


CACHE = Path("/var/cache/kw")


def plan(spec: ContextSpec = SPEC, device: Device = CPU, **settings: object) -> EnginePlan:
    return EnginePlan.of(spec, device, load_settings(**settings))


def command(spec: ContextSpec = SPEC, device: Device = CPU, **settings: object) -> list[str]:
    return engine_arguments(plan(spec, device, **settings), SOCKET)


def environment_of(spec: ContextSpec = SPEC, device: Device = CPU) -> dict[str, str]:
    """All that the engine has in the end."""
    wanted = plan(spec, device)
    return {**fork_server_environment(wanted), **engine_environment(wanted, CACHE)}


def value_of(arguments: list[str], flag: str) -> str | None:
    """The last value of a flag: that is the one that counts."""
    values = [arguments[index + 1] for index, word in enumerate(arguments) if word == flag]
    return values[-1] if values else None


def test_the_engine_holds_the_context_behind_the_socket() -> None:
    arguments = command()
    for flag, value in {
        "--model": "org/model",
        "--revision": "abc",
        "--served-model-name": SPEC.context_id,
        "--uds": "/run/kw/e.sock",
        "--dtype": "float16",
        "--max-model-len": "2048",
        "--generation-config": "vllm",
    }.items():
        assert value_of(arguments, flag) == value


ADAPTED = SPEC.model_copy(update={"adapter": "org/adapter", "adapter_revision": "c0ffee"})
OTHERWISE_ADAPTED = SPEC.model_copy(update={"adapter": "/adapters/b", "adapter_revision": "f-1"})


def test_an_engine_for_adapters_takes_any_of_them_and_is_named_as_their_model() -> None:
    assert command(ADAPTED) == command(OTHERWISE_ADAPTED)
    arguments = command(ADAPTED)
    assert "--enable-lora" in arguments and value_of(arguments, "--max-lora-rank") == "64"
    assert value_of(arguments, "--served-model-name") == SPEC.context_id
    assert environment_of(ADAPTED)["VLLM_ALLOW_RUNTIME_LORA_UPDATING"] == "1"


def test_adapters_of_one_model_share_an_engine_and_the_model_alone_has_another() -> None:
    assert plan(ADAPTED).name == plan(OTHERWISE_ADAPTED).name != plan(SPEC).name
    assert plan(ADAPTED).name.startswith(SPEC.context_id)
    assert "--enable-lora" not in command(SPEC)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in environment_of(SPEC)


def test_an_engine_for_adapters_is_not_put_to_sleep() -> None:
    assert "--enable-sleep-mode" in command(SPEC, GPU)
    assert "--enable-sleep-mode" not in command(ADAPTED, GPU)


@pytest.mark.parametrize("arguments", ["--enable-lora", "--lora-modules mine=/a"])
def test_an_operators_adapter_is_refused_with_the_way_out(arguments: str) -> None:
    with pytest.raises(UsageError, match="KEEPWARM_ENGINE_ARGUMENTS: .* use --adapter PATH"):
        command(engine_arguments=arguments)


def test_the_engine_may_run_under_another_interpreter(tmp_path: Path) -> None:
    other = tmp_path / "python"
    other.symlink_to(sys.executable)
    assert plan(engine_python=other).python == str(other)
    assert plan(engine_python=other).name != plan().name


@pytest.mark.parametrize(
    "variable",
    [
        *("VLLM_API_KEY", "VLLM_USE_MODELSCOPE", "VLLM_MODEL_REDIRECT_PATH", "VLLM_PLUGINS"),
        *("VLLM_PORT", "VLLM_DP_SIZE", "VLLM_LOGGING_CONFIG_PATH", "VLLM_LOGGING_LEVEL"),
        *("VLLM_MAX_COMPLETION_PROMPTS", "VLLM_TEST_FORCE_LOAD_FORMAT", "vllm_api_key"),
        *("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "TORCHELASTIC_RUN_ID"),
        *("PYTHONPATH", "PYTHONHOME", "PYTHONWARNINGS", "PYTHONOPTIMIZE"),
    ],
)
def test_what_is_meant_for_another_server_does_not_reach_the_engine(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = plan().name
    monkeypatch.setenv(variable, "of another server")
    assert variable not in environment_of()
    assert plan().name == before


@pytest.mark.parametrize(
    "variable",
    [
        *("VLLM_CPU_KVCACHE_SPACE", "VLLM_CPU_OMP_THREADS_BIND", "VLLM_HOST_IP"),
        *("VLLM_ROCM_USE_AITER", "VLLM_DISABLE_PYNCCL", "VLLM_ENABLE_CUDA_COMPATIBILITY"),
        *("CUDA_HOME", "NCCL_P2P_DISABLE", "HF_TOKEN", "HF_ENDPOINT", "LD_LIBRARY_PATH"),
        *("TORCH_CUDA_ARCH_LIST", "PYTHONNOUSERSITE", "KEEPWARM_PYTHONPATH"),
    ],
)
def test_what_suits_the_machine_reaches_the_engine(
    variable: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = plan().name
    monkeypatch.setenv(variable, "of this machine")
    assert environment_of()[variable] == "of this machine"
    assert plan().name != before


def test_a_local_models_fingerprint_is_not_a_revision_of_the_engines(tmp_path: Path) -> None:
    spec = ContextSpec(model=str(tmp_path), revision="files-00")
    assert "--revision" not in command(spec)


def test_a_hub_model_without_a_revision_asks_for_none() -> None:
    assert "--revision" not in command(ContextSpec(model="org/model"))


def test_each_device_has_arguments_of_its_own() -> None:
    assert "--enforce-eager" in command(device=CPU)
    assert value_of(command(device=CPU), "--distributed-executor-backend") == "uni"
    assert "--enforce-eager" not in command(device=GPU)
    cpu, gpu = (value_of(command(device=device), "--max-num-seqs") for device in (CPU, GPU))
    assert int(cpu or 0) < int(gpu or 0)


@pytest.mark.parametrize(
    ("device", "max_model_tokens", "step"),
    [
        (CPU, 1_024, "2048"),
        (CPU, 32_768, "32768"),
        (GPU, 1_024, "8192"),
        (Device("cuda", "H100", 75 * GIB, (0,)), 1_024, "16384"),
        (Device("cuda", "H100", 75 * GIB, (0,)), 131_072, "131072"),
    ],
)
def test_a_step_is_large_and_never_smaller_than_the_longest_prompt(
    device: Device, max_model_tokens: int, step: str
) -> None:
    spec = ContextSpec(model="org/model", max_model_tokens=max_model_tokens)
    assert value_of(command(spec, device), "--max-num-batched-tokens") == step


@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "cuda"])
def test_the_contexts_arguments_come_after_ours_and_the_operators_last(device: Device) -> None:
    spec = ContextSpec(model="org/model", engine_arguments=("--max-num-seqs=7", "--dtype=half"))
    arguments = command(spec, device, engine_arguments="--max-num-seqs 9 --served 'a b'")
    assert arguments[-6:] == [
        "--max-num-seqs=7",
        "--dtype=half",
        "--max-num-seqs",
        "9",
        "--served",
        "a b",
    ]


def test_an_operators_arguments_that_do_not_parse_are_reported() -> None:
    with pytest.raises(UsageError, match="KEEPWARM_ENGINE_ARGUMENTS does not parse: No closing"):
        command(engine_arguments="--x 'open")


def test_a_models_own_code_is_not_trusted_unless_asked_for() -> None:
    assert "--trust-remote-code" not in command()
    assert "--trust-remote-code" in command(engine_trust_remote_code=True)


# The environment.


@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "cuda"])
def test_the_engine_gets_none_of_our_secrets(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KEEPWARM_BROKER_PASSWORD", "hunter2")
    monkeypatch.setenv("KEEPWARM_STORE_URL", "postgresql://u:hunter2@h/d")
    environment = environment_of(SPEC, device)
    assert not any(name.startswith("KEEPWARM_") for name in environment)
    assert "hunter2" not in environment.values()


def test_secrets_in_lower_case_are_secrets_too(monkeypatch: pytest.MonkeyPatch) -> None:
    # Settings are read from variables in any case.
    monkeypatch.setenv("keepwarm_broker_password", "hunter2")
    assert load_settings().secret("broker") == "hunter2"
    assert "hunter2" not in environment_of(SPEC, CPU).values()


def test_the_rest_of_the_environment_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-token")
    environment = environment_of(SPEC, CPU)
    assert environment["HF_TOKEN"] == "a-token"
    assert environment["PATH"] == os.environ["PATH"]


def test_the_engine_reports_to_nobody() -> None:
    assert environment_of(SPEC, GPU)["VLLM_NO_USAGE_STATS"] == "1"
    assert environment_of(SPEC, GPU)["DO_NOT_TRACK"] == "1"


def test_a_local_model_needs_no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    local = environment_of(ContextSpec(model=str(tmp_path)), CPU)
    assert local["HF_HUB_OFFLINE"] == "1"
    assert "HF_HUB_OFFLINE" not in environment_of(SPEC, CPU)


@pytest.mark.parametrize(
    ("memory_gib", "cache_gib"), [(0.5, "1"), (8, "1"), (16, "2"), (40, "5"), (512, "8")]
)
def test_a_cpu_engine_takes_a_share_of_the_memory_within_bounds(
    memory_gib: float, cache_gib: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_CPU_KVCACHE_SPACE", raising=False)
    device = Device("cpu", "Xeon", int(memory_gib * GIB), (0,))
    assert environment_of(SPEC, device)["VLLM_CPU_KVCACHE_SPACE"] == cache_gib


def test_a_cpu_engine_uses_every_core_that_it_may(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_CPU_OMP_THREADS_BIND", raising=False)
    assert cores_of(plan()) == [0, 1, 5]
    assert environment_of()["OMP_NUM_THREADS"] == "3"
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0,5")
    assert cores_of(plan()) == [0, 5]
    assert environment_of()["OMP_NUM_THREADS"] == "2"


def test_threads_of_a_cpu_engine_do_not_spin_for_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    assert environment_of()["GOMP_SPINCOUNT"] == "3000"
    assert "GOMP_SPINCOUNT" not in environment_of(SPEC, GPU)
    monkeypatch.setenv("GOMP_SPINCOUNT", "7")
    assert environment_of()["GOMP_SPINCOUNT"] == "7"
    monkeypatch.delenv("GOMP_SPINCOUNT")
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    assert "GOMP_SPINCOUNT" not in environment_of()


def test_what_the_operator_set_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "77")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    environment = environment_of(ContextSpec(model="/models/x"), CPU)
    assert environment["VLLM_CPU_KVCACHE_SPACE"] == "77"
    assert environment["HF_HUB_OFFLINE"] == "0"


def test_compile_caches_are_the_engines_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("VLLM_CACHE_ROOT", "TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
        assert environment_of()[name].startswith(f"{CACHE}/")


def test_only_an_engine_on_a_gpu_can_be_put_to_sleep() -> None:
    assert "--enable-sleep-mode" in command(device=GPU)
    assert environment_of(device=GPU)["VLLM_SERVER_DEV_MODE"] == "1"
    assert "--enable-sleep-mode" not in command(device=CPU)
    assert "VLLM_SERVER_DEV_MODE" not in environment_of(device=CPU)


# The engine's name.


def test_equal_wishes_are_one_engine_and_free_memory_does_not_matter() -> None:
    busy = Device("cpu", "Xeon", 3 * GIB, (0, 1, 5))
    assert plan().name == plan(device=busy).name
    assert plan().name.startswith(f"{SPEC.context_id}-")


@pytest.mark.parametrize(
    "other",
    [
        {"device": Device("cpu", "Xeon", 40 * GIB, (0, 1))},
        {"engine_arguments": "--max-num-seqs 9"},
        {"engine_trust_remote_code": True},
        {"spec": ContextSpec(model="org/other")},
    ],
    ids=str,
)
def test_a_wish_that_differs_in_what_an_engine_does_is_another_engine(
    other: dict[str, object],
) -> None:
    assert plan(**other).name != plan().name  # type: ignore[arg-type]


def test_an_engines_variables_are_part_of_its_name_and_others_are_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = plan()
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("KEEPWARM_LOG_LEVEL", "DEBUG")
    assert plan().name == before.name
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "TRITON_ATTN")
    assert plan().name != before.name


def test_an_engines_variables_are_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a-token")
    assert plan().environment["HF_TOKEN"] == "a-token"
    assert "a-token" not in repr(plan())


def test_a_keepers_own_variables_for_engines_do_not_reach_those_of_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    wanted = plan()  # by a worker without it
    monkeypatch.setenv("VLLM_ATTENTION_BACKEND", "TRITON_ATTN")  # the keeper was started with it
    assert "VLLM_ATTENTION_BACKEND" not in fork_server_environment(wanted)


def test_an_engine_on_processors_needs_no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    assert environment_of()["TORCHDYNAMO_DISABLE"] == "1"
    assert "TORCHDYNAMO_DISABLE" not in environment_of(device=GPU)
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    assert environment_of()["TORCHDYNAMO_DISABLE"] == "0"
