from pathlib import Path

import pytest

from services.contracts import PromptSpec
from services.contracts.errors import InputError
from services.producer import read_prompt

LABELS = """
labels:
  - {name: "YES", word: "yes"}
  - {name: "NO", word: "no", aliases: [nope]}
"""


def write(directory: Path, content: str | bytes) -> Path:
    path = directory / "prompt.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_prompt_file_gives_a_prompt_with_the_defaults_filled_in(tmp_path: Path) -> None:
    prompt = read_prompt(write(tmp_path, f"name: mine\ntemplate: 'Is {{claim}} so?'\n{LABELS}"))
    assert prompt.name == "mine"
    assert prompt.template == "Is {claim} so?"
    assert prompt.label_of("nope") == "NO"
    assert prompt.instructions == PromptSpec().instructions


def test_a_prompt_file_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    assert read_prompt(write(tmp_path, b"\xef\xbb\xbfname: mine\n")).name == "mine"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\xff\xfe", "is not UTF-8; save it as UTF-8"),
        ("a: [", "is not YAML"),
        ("a: *nowhere", "is not YAML"),
        ("\0", "is not YAML"),
        ("", "must be a mapping, as in samples/prompt.yaml"),
        ("- a\n- b\n", "must be a mapping"),
        ("just text", "must be a mapping"),
        ("colour: red\n", "colour: Extra inputs are not permitted"),
        ("1: red\n", "1: "),
        ("template: 'no claim here'\n", "template: .*it must contain {claim}"),
        (
            "labels: [{name: a, word: True}, {name: b, word: x}]\n",
            "labels.0.word: .*put it in quotes",
        ),
        ("labels: [{name: 'YES', word: x}, {name: 'yes', word: y}]\n", "'YES' names both"),
        ("examples: [{claim: c, label: MAYBE}]\n", "'MAYBE', which is not declared"),
        ("minimum_mass: 2\n", "minimum_mass: "),
        ('name: "a\\0b"\n', "name: "),
    ],
)
def test_faults_of_a_prompt_file_are_reported_with_its_name(
    content: str | bytes, says: str, tmp_path: Path
) -> None:
    path = write(tmp_path, content)
    with pytest.raises(InputError, match=says) as refused:
        read_prompt(path)
    assert str(path) in str(refused.value)
    assert refused.value.exit_code == 3


@pytest.mark.parametrize(
    "content",
    ["name: 2024-13-45\n", "name: !!int 'x'\n", "name: " + "[" * 1_000],
    ids=["no such date", "no such number", "too deep"],
)
def test_yaml_that_makes_its_own_reader_stumble_is_an_input_error(
    content: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=r"prompt\.yaml"):
        read_prompt(write(tmp_path, content))


def test_yaml_cannot_run_code(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not YAML"):
        read_prompt(write(tmp_path, "name: !!python/object/apply:os.getcwd []\n"))


def test_a_missing_prompt_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.yaml cannot be read: No such file"):
        read_prompt(tmp_path / "none.yaml")


def test_a_directory_is_no_prompt_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read: Is a directory"):
        read_prompt(tmp_path)


def test_a_file_of_claims_given_as_a_prompt_is_refused_by_its_size(tmp_path: Path) -> None:
    path = tmp_path / "claims.jsonl"
    with path.open("wb") as file:
        file.truncate(2**20 + 1)
    with pytest.raises(InputError, match="is over 1,048,576 bytes; a prompt file is small"):
        read_prompt(path)


@pytest.mark.parametrize(
    ("written", "ending"),
    [
        (r'"Claim: {claim}\nAnswer: "', " "),
        (r'"Claim: {claim}\nAnswer:\n\n\t "', "\n\n\t "),
        ("|\n  Claim: {claim}\n  Answer:\n", "\n"),
        ("|+\n  Claim: {claim}\n  Answer:\n\n\n", "\n\n\n"),
    ],
)
def test_white_space_at_a_templates_end_is_removed_with_a_note(
    written: str, ending: str, tmp_path: Path
) -> None:
    notes: list[str] = []
    path = write(tmp_path, f"template: {written}")
    mended = read_prompt(path, notes.append)
    meant = PromptSpec(template="Claim: {claim}\nAnswer:")
    assert mended == meant
    assert mended.prompt_id == meant.prompt_id
    (note,) = notes
    assert f"{path}: the template ends in white space ({ending!r})" in note
    assert "`template: |-`" in note


@pytest.mark.parametrize("written", ["|-\n  {claim}\n  Answer:\n", r'"{claim}\nAnswer:"'])
def test_a_template_that_ends_in_text_is_taken_as_it_is(written: str, tmp_path: Path) -> None:
    notes: list[str] = []
    prompt = read_prompt(write(tmp_path, f"template: {written}"), notes.append)
    assert prompt.template == "{claim}\nAnswer:"
    assert notes == []


@pytest.mark.parametrize(
    ("label", "where"),
    [
        ("{name: A, word: Yes}", "labels.0.word"),
        ("{name: NO, word: a}", "labels.0.name"),
        ("{name: A, word: a, aliases: [1, true]}", "labels.0.aliases.1"),
    ],
)
def test_a_word_that_yaml_reads_as_true_or_false_must_be_quoted(
    label: str, where: str, tmp_path: Path
) -> None:
    path = write(tmp_path, f"labels:\n  - {label}\n  - {{name: B, word: b}}\n")
    with pytest.raises(InputError, match=rf"{where}: .*as YAML reads Yes, .*put it in quotes"):
        read_prompt(path)


def test_a_number_is_an_alias_as_its_text(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "labels:\n  - {name: A, word: a, aliases: [1, 2.5]}\n  - {name: B, word: 0}\n",
    )
    first, second = read_prompt(path).labels
    assert (first.aliases, second.word) == (("1", "2.5"), "0")
