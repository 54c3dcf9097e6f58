"""The sweep file: what is read, and how errors name the key."""

from collections.abc import Callable
from pathlib import Path

import pytest

from services.cli.sweep_file import ModelEntry, SweepFile, keys_for_flags, require_names
from services.contracts import ContextSpec
from services.contracts.errors import EngineError, InputError, UsageError

Write = Callable[[str], Path]
LEAST = "claims: claims.jsonl\nprompts: [a.yaml]\n"


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str) -> Path:
        path = tmp_path / "studies" / "sweep.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    return write


def test_paths_are_relative_to_the_file(write: Write, tmp_path: Path) -> None:
    studies = tmp_path / "studies"
    path = write(
        "claims: {file: ../claims.jsonl, corpus: wiki}\nprompts: [a.yaml, /b.yaml]\nout: results\n"
    )
    sweep = SweepFile.read(path)
    assert sweep.claims.file == studies / "../claims.jsonl"
    assert sweep.claims.corpus == studies / "wiki"
    assert sweep.prompts == (studies / "a.yaml", Path("/b.yaml"))
    assert sweep.out == studies / "results"


def test_a_model_is_a_directory_beside_the_file_or_a_name_on_the_hub(
    write: Write, tmp_path: Path
) -> None:
    (tmp_path / "studies" / "mine").mkdir(parents=True)
    path = write(LEAST + "models:\n  - mine\n  - org/hub\n  - model: ../other\n    adapter: mine\n")
    models = SweepFile.read(path).models
    assert [entry.model for entry in models] == [
        str(tmp_path / "studies" / "mine"),
        "org/hub",
        str(tmp_path / "other"),
    ]
    assert models[2].adapter == str(tmp_path / "studies" / "mine")


def test_without_models_there_is_one_cell_for_each_prompt(write: Write) -> None:
    assert SweepFile.read(write(LEAST)).models == (ModelEntry(),)


def test_numbers_are_labels(write: Write) -> None:
    path = write("claims: {file: f, label_map: {0: REFUTES, 1: SUPPORTS}}\nprompts: [a.yaml]\n")
    assert SweepFile.read(path).claims.label_map == {"0": "REFUTES", "1": "SUPPORTS"}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("prompts: [a.yaml]\n", "claims: Field required"),
        ("claims: c.jsonl\n", "prompts: Field required"),
        ("claims: c.jsonl\nprompts: []\n", "prompts: Tuple should have at least 1 item"),
        (LEAST + "modles: [m]\n", "modles: Extra inputs are not permitted"),
        (LEAST + "models: [{modle: m}]\n", "models.0.modle: Extra inputs are not permitted"),
        (LEAST + "models: [{max_model_tokens: '9'}]\n", "models.0.max_model_tokens: Input should"),
        (LEAST + "select: 1.5\n", "select: Input should be less than 1"),
        (LEAST + "select: true\n", "select: Input should be less than 1"),
        ("claims: {file: f, limit: true}\nprompts: [a]\n", "claims.limit: Input should be a valid"),
        ("claims: {file: f, limit: 0}\nprompts: [a]\n", "claims.limit: Input should be greater"),
        ("claims: {file: f, label_map: {yes: A}}\nprompts: [a]\n", "put it in quotes"),
    ],
)
def test_an_error_names_the_file_the_key_and_a_sample(write: Write, text: str, says: str) -> None:
    path = write(text)
    with pytest.raises(InputError, match="samples/sweep.yaml and docs/experiments.md") as raised:
        SweepFile.read(path)
    assert f"the sweep file {path}: " in str(raised.value)
    assert says in str(raised.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- a\n", "must be a mapping, as in samples/sweep.yaml"),
        ("claims: [\n", "is not YAML"),
    ],
)
def test_what_is_not_a_mapping_is_refused(write: Write, text: str, says: str) -> None:
    with pytest.raises(InputError, match=says):
        SweepFile.read(write(text))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="none.yaml cannot be read: No such file"):
        SweepFile.read(tmp_path / "none.yaml")


@pytest.mark.parametrize("kind", [InputError, UsageError])
def test_flags_in_messages_become_keys(kind: type[Exception]) -> None:
    says = (
        r"^the sweep file s.yaml: claims: label_map A: write it; correct columns x=y; "
        r"see engine_arguments$"
    )
    with pytest.raises(InputError, match=says), keys_for_flags(Path("s.yaml"), "claims"):
        raise kind("--label-map A: write it; correct --column x=y; see --engine-argument")


def test_a_message_that_names_its_key_stays() -> None:
    with (
        pytest.raises(InputError, match=r"^the sweep file s.yaml: models: gone$"),
        keys_for_flags(Path("s.yaml"), "claims"),
        keys_for_flags(Path("s.yaml"), "models"),
    ):
        raise InputError("gone")


def test_other_errors_stay() -> None:
    with (
        pytest.raises(EngineError, match=r"^use --model$"),
        keys_for_flags(Path("s.yaml"), "claims"),
    ):
        raise EngineError("use --model")


@pytest.mark.parametrize(
    ("names", "values", "says"),
    [
        (["a", "b", "a"], [1, 2, 3], "number 1 and number 3 have the name 'a'; give one of them"),
        (["a", "b", "c"], [1, 2, 1], "number 3, 'c', is the same as number 1; leave one out"),
    ],
)
def test_two_of_the_same_name_or_content_are_refused(
    names: list[str], values: list[int], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        require_names(Path("s.yaml"), "models", names, values)


@pytest.mark.parametrize(
    ("entry", "name"),
    [
        (ModelEntry(), "SmolLM2"),
        (ModelEntry(name="small"), "small"),
        (ModelEntry(adapter="/adapters/first"), "SmolLM2+first"),
    ],
)
def test_a_model_is_named_by_its_end_and_its_adapters(entry: ModelEntry, name: str) -> None:
    assert entry.name_of(ContextSpec(model="org/SmolLM2", adapter=entry.adapter)) == name


def test_the_sample_is_a_sweep_of_the_samples(repository: Path) -> None:
    sweep = SweepFile.read(repository / "samples" / "sweep.yaml")
    assert len(sweep.prompts) == 2
    assert all(path.is_file() for path in (*sweep.prompts, sweep.claims.file))
