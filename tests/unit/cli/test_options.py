from pathlib import Path

import pytest

from services.cli import context_options
from services.cli.claims_options import (
    check_seed,
    columns_from_flags,
    label_map_from_flags,
    prompt_from_flag,
)
from services.cli.context_options import context_from_flags
from services.contracts import ContextSpec, PromptSpec, load_settings
from services.contracts.errors import InputError, ModelError, UsageError
from services.models import hub
from tests.safetensors_files import write_safetensors
from tests.unit.clock import Clock


@pytest.mark.parametrize(
    ("flags", "columns"),
    [
        (None, {}),
        ([], {}),
        (["claim=text"], {"claim": "text"}),
        (["claim=text", "id=nr"], {"claim": "text", "id": "nr"}),
        (["claim=a=b"], {"claim": "a=b"}),
        (["label=the truth"], {"label": "the truth"}),
    ],
)
def test_columns_are_pairs(flags: list[str] | None, columns: dict[str, str]) -> None:
    assert columns_from_flags(flags) == columns


@pytest.mark.parametrize("flag", ["", "claim", "claim=", "=text", "="])
def test_what_is_no_pair_is_refused_with_an_example(flag: str) -> None:
    with pytest.raises(UsageError, match=f"--column {flag}: write it like claim=text"):
        columns_from_flags(["id=nr", flag])


def test_a_field_has_one_column() -> None:
    with pytest.raises(UsageError, match="--column evidence=… is given more than once"):
        columns_from_flags(["evidence=a", "claim=c", "evidence=b"])


def test_a_label_is_mapped_to_one_label() -> None:
    assert label_map_from_flags(["X=NEI", "X=NEI"], PromptSpec()) == {"X": "NEI"}
    with pytest.raises(UsageError, match="'X' is mapped to 'NEI' as well"):
        label_map_from_flags(["X=NEI", "X=REFUTES"], PromptSpec())


@pytest.mark.parametrize(("limit", "seed"), [(None, None), (5, None), (5, 0), (5, -3)])
def test_a_seed_may_come_with_a_limit(limit: int | None, seed: int | None) -> None:
    check_seed(limit, seed)


@pytest.mark.parametrize("seed", [0, 7])
def test_a_seed_needs_a_limit(seed: int) -> None:
    with pytest.raises(UsageError, match="set --limit as well"):
        check_seed(None, seed)


def test_without_a_prompt_file_the_prompt_is_fevers() -> None:
    assert prompt_from_flag(None) == PromptSpec()


def test_a_prompt_file_is_read(repository: Path) -> None:
    assert prompt_from_flag(repository / "samples" / "prompt.yaml").name == "fever-3way"
    with pytest.raises(InputError):
        prompt_from_flag(repository / "none.yaml")


def test_repairs_of_a_prompt_file_are_shown_on_the_screen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "prompt.yaml"
    path.write_text("template: 'Is {claim} so? '\n")
    assert prompt_from_flag(path).template == "Is {claim} so?"
    said = " ".join(capsys.readouterr().err.split())
    assert "Note: the prompt file" in said and "ends in white space (' ')" in said


def test_an_adapter_is_part_of_the_context(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(models)
    (models / "adapter").mkdir()
    (models / "adapter" / "adapter_config.json").write_text('{"r": 8}')
    lora = {"layers.0.lora_A.weight": (8, 4)}
    write_safetensors(models / "adapter" / "adapter_model.safetensors", lora)
    with_one = context("a", adapter="adapter")
    assert with_one.adapter == str(models / "adapter")
    assert with_one.base == context("a")


def test_an_adapters_revision_needs_an_adapter() -> None:
    with pytest.raises(UsageError, match="--adapter-revision needs an adapter; name it"):
        context(adapter_revision="main")


@pytest.fixture
def models(tmp_path: Path) -> Path:
    for name in ("a", "b", ".models/SmolLM2-135M-Instruct"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text(f'{{"name": "{name}"}}')
    return tmp_path


def context(model: str | None = None, **changes: object) -> ContextSpec:
    flags = {
        "revision": None,
        "dtype": "bfloat16",
        "max_model_tokens": 1024,
        "engine_arguments": None,
    }
    return context_from_flags(load_settings(), model, **{**flags, **changes})  # type: ignore[arg-type]


def test_a_flag_names_the_model_or_else_the_environment_or_else_it_is_the_demos(
    models: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert context().model == str(models / ".models" / "SmolLM2-135M-Instruct")
    monkeypatch.setenv("KEEPWARM_MODEL", "./b")
    assert context().model == str(models / "b")
    assert context("./a").model == str(models / "a")


def test_outside_a_clone_a_note_reports_that_the_default_model_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "current_commit", lambda *_: "c0ffee")
    assert context().model == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert "neither --model nor KEEPWARM_MODEL is set, so this uses" in capsys.readouterr().err
    assert context("HuggingFaceTB/SmolLM2-135M-Instruct").revision == "c0ffee"
    assert capsys.readouterr().err == ""

    def fails(*_: object) -> str:
        raise ModelError("cannot get the model")

    monkeypatch.setattr(hub, "current_commit", fails)
    with pytest.raises(ModelError, match="uses the demo model .*: cannot get"):
        context()


@pytest.mark.usefixtures("models")
def test_a_context_is_pinned_and_keeps_what_the_flags_say() -> None:
    found = context(
        "./a", dtype="float32", max_model_tokens=77, engine_arguments=["--seed=1", "--x=2"]
    )
    assert found.revision is not None
    assert found.revision.startswith("files-")
    assert (found.dtype, found.max_model_tokens) == ("float32", 77)
    assert found.engine_arguments == ("--seed=1", "--x=2")


@pytest.mark.usefixtures("models")
def test_a_revision_that_is_not_there_is_refused() -> None:
    with pytest.raises(ModelError, match="files-00 is required"):
        context("./a", revision="files-00")


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        ({"max_model_tokens": 10**8}, "--max-model-tokens"),
        ({"revision": ""}, "--revision"),
        ({"revision": "r" * 600}, "--revision"),
        ({"engine_arguments": ["--x"] * 200}, "--engine-argument"),
        ({"engine_arguments": ["x" * 600]}, "--engine-argument"),
    ],
)
def test_a_flag_out_of_bounds_is_reported_by_its_name(
    changes: dict[str, object], flag: str
) -> None:
    with pytest.raises(UsageError) as refused:
        context("./a", **changes)
    words = str(refused.value).replace(":", " ").replace(".", " ").split()
    assert words[0] == flag


def test_progress_of_reading_weights_is_shown_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], clock: Clock
) -> None:
    monkeypatch.setattr("time.monotonic", clock)
    progress = context_options._ReadingWeights()
    for seconds, done in ((1.9, 1), (2.1, 2), (3.0, 3), (12.2, 4)):
        clock.now = 1_000.0 + seconds
        progress(done * 10**9, 140 * 10**9)
    assert capsys.readouterr().err.splitlines() == [
        "Reading the weights to identify them: 2.0 of 140.0 GB (once for each file)",
        "Reading the weights to identify them: 4.0 of 140.0 GB (once for each file)",
    ]
