"""What a worker without a model accepts from runs; tests/e2e does so with all flags of vLLM."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contexts.accepted_contexts import ACCEPTED_ARGUMENTS, refusal
from services.contracts import ContextSpec, load_settings


def refused(*arguments: str, accepted: str = "") -> str | None:
    settings = load_settings(accepted_engine_arguments=accepted)
    return refusal(ContextSpec(model="org/model", engine_arguments=arguments), settings)


@pytest.mark.parametrize(
    "arguments",
    [
        (),
        ("--quantization=fp8",),
        ("--quantization", "fp8", "--kv-cache-dtype", "fp8"),
        ("--tensor_parallel_size=2", "--enforce-eager"),
        ('--hf-overrides={"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}',),
        ("--hf-overrides.rope_scaling.rope_type", "yarn"),
        ("--hf-overrides", '{"rope_theta": 1000000}'),
    ],
)
def test_arguments_that_change_verdicts_are_accepted(arguments: tuple[str, ...]) -> None:
    assert refused(*arguments) is None


@pytest.mark.parametrize(
    "arguments",
    [
        ("--trust-remote-code",),
        ("--trust_remote_code",),
        ("--trust-remote-c",),
        ("--middleware=os.system",),
        ("--tool-parser-plugin", "/tmp/plugin.py"),
        ("--worker-cls=evil.Worker",),
        ("--logits-processors", "evil:Processor"),
        ("--model=org/other",),
        ("--uds=/tmp/other.sock",),
        ("--config", "/tmp/engine.yaml"),
        ("--config=/tmp/engine.yaml",),
        ("-q", "fp8"),
        ("-O3",),
        ("org/other",),
        ("--enforce-eager", "--", "org/other"),
        ("--quantization", "fp8", "org/other"),
        ("--quantization=fp8", "org/other"),
        ("--quantization", "--trust-remote-code"),
        ('--hf-overrides={"architectures": ["Evil"]}',),
        ('--hf-overrides={"rope_theta": 1, "auto_map": {}}',),
        ("--hf-overrides", '{"architectures": ["Evil"]}'),
        ("--hf-overrides.architectures+", "Evil"),
        ("--hf-overrides.rope_theta=1", "--hf-overrides.auto_map.AutoConfig=evil"),
        ("--hf-overrides=evil.function",),
    ],
)
def test_all_others_are_refused(arguments: tuple[str, ...]) -> None:
    assert refused(*arguments) is not None


def test_the_refusal_names_the_argument_and_the_setting() -> None:
    assert refused("--worker-cls=evil.Worker") == (
        "the engine argument --worker-cls is not accepted from runs; name it in "
        "KEEPWARM_ACCEPTED_ENGINE_ARGUMENTS to accept it"
    )


def test_the_operator_can_accept_more() -> None:
    further = ("--attention-backend=FLASH_ATTN", '--hf-overrides={"architectures": ["A"]}')
    assert refused(*further) is not None
    assert refused(*further, accepted="--attention-backend --hf-overrides") is None
    assert refused("--middleware=m", *further, accepted="--attention-backend --hf-overrides")


_TEXTS = st.one_of(
    st.sampled_from(
        [
            *("--trust-remote-code", "--trust", "-tp", "-O", "--", "-", "--=", "--.", "8", "model"),
            *("--hf-overrides", "--hf_overrides.a.b", "{}", '{"a": 1}', "--config", "--config=x"),
            *sorted(ACCEPTED_ARGUMENTS),
        ]
    ),
    st.text(st.characters(categories=("L", "N", "P", "S", "Z")), min_size=1, max_size=20),
)


@given(st.lists(_TEXTS, max_size=6))
def test_whatever_is_accepted_names_accepted_arguments_alone(arguments: list[str]) -> None:
    if refused(*arguments) is None:
        named = {each.partition("=")[0].partition(".")[0] for each in arguments if each[:1] == "-"}
        assert {name.replace("_", "-") for name in named} <= ACCEPTED_ARGUMENTS
        values = [each for each in arguments if each[:1] != "-"]
        assert len(values) <= len(arguments) - len(values)


_POSITIONS = ("max_position_embeddings", "rope_parameters", "rope_scaling", "rope_theta")
_NAMES = st.one_of(st.sampled_from(_POSITIONS), st.text(max_size=12))


@given(st.dictionaries(_NAMES, st.integers(), max_size=3))
def test_of_overrides_only_those_of_positions_are_accepted(overrides: dict[str, int]) -> None:
    accepted = refused(f"--hf-overrides={json.dumps(overrides)}") is None
    assert accepted == (overrides.keys() <= set(_POSITIONS))


# Which models.


def model_refused(model: str, patterns: str, **parts: str) -> str | None:
    return refusal(ContextSpec(model=model, **parts), load_settings(accepted_models=patterns))  # type: ignore[arg-type]


def test_without_patterns_every_model_is_accepted() -> None:
    assert model_refused("org/model", "") is None


def test_models_and_organisations_can_be_named_by_patterns() -> None:
    patterns = "HuggingFaceTB/* Qwen/Qwen3-*"
    assert model_refused("HuggingFaceTB/SmolLM2-1.7B", patterns) is None
    assert model_refused("Qwen/Qwen3-8B", patterns) is None
    assert model_refused("Qwen/Other", patterns) == (
        "KEEPWARM_ACCEPTED_MODELS has no pattern for 'Qwen/Other'"
    )
    assert model_refused("huggingfacetb/SmolLM2", patterns) is not None


def test_an_adapter_is_a_model_too() -> None:
    assert model_refused("org/model", "org/*", adapter="org/adapter") is None
    assert "stranger/adapter" in str(
        model_refused("org/model", "org/*", adapter="stranger/adapter")
    )


def test_directories_are_compared_by_their_real_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tmp_path = tmp_path.resolve()
    models, other = tmp_path / "models", tmp_path / "other"
    for directory in (models / "good", other / "evil"):
        directory.mkdir(parents=True)
    (models / "link").symlink_to(other / "evil")
    monkeypatch.chdir(other)
    patterns = f"{models}/* evil"
    assert model_refused(str(models / "good"), patterns) is None
    assert model_refused(f"{models}/../other/evil", patterns) is not None
    assert model_refused(str(models / "link"), patterns) is not None
    assert model_refused("evil", patterns) is not None  # a directory here, and no name on the hub
    assert model_refused("~nobody-of-this-name/m", patterns) is not None
