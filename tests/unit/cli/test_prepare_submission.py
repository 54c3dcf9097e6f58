import io
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from services.cli.claims_options import ClaimsOptions
from services.cli.input_summary import counted
from services.cli.prepare_submission import inspect_claims, prepared_submission
from services.cli.screen import Screen
from services.contracts import ContextSpec, Label, PromptSpec
from services.contracts.errors import InputError, ModelError, UsageError


@pytest.fixture
def claims(tmp_path: Path) -> Path:
    path = tmp_path / "claims.csv"
    path.write_text("statement,author,label\nOne.,Me,NEI\nTwo.,Me,NEI\n")
    return path


@pytest.fixture
def context(tmp_path: Path) -> Callable[[], ContextSpec]:
    """A model that spells letter by letter, with the space that stands before a capital."""
    pieces = [*"\u0120TFUabcdefghijklmnopqrstuvw:", *("\u0120T", "\u0120F", "\u0120U")]
    vocabulary = {piece: number for number, piece in enumerate(pieces)}
    merges = [("\u0120", letter) for letter in "TFU"]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    (tmp_path / "model").mkdir()
    tokenizer.save(str(tmp_path / "model" / "tokenizer.json"))
    return lambda: ContextSpec(model=str(tmp_path / "model"))


def prompt(*words: str) -> PromptSpec:
    labels = tuple(Label(name=f"L{n}", word=word) for n, word in enumerate(words))
    return PromptSpec(template="{claim}:", labels=labels, chat=False)


def prepare(screen: Screen, file: Path, context: Callable[[], ContextSpec], **how: Any) -> Any:
    asked = how.pop("prompt", PromptSpec())
    flags = {"column": ["claim=statement"], "limit": None, "seed": None, "format": None}
    flags |= {
        "label_map": None,
        "each_evidence": False,
        "corpus": None,
        "split": None,
        "encoding": None,
    } | how
    options = ClaimsOptions.from_flags(asked, **flags)
    return prepared_submission(screen, str(file), context=context, prompt=asked, options=options)


def never() -> ContextSpec:
    raise AssertionError("the model was asked for")


def test_a_file_becomes_a_run_of_the_prompt_on_the_context(
    claims: Path, context: Callable[[], ContextSpec], screen: Screen, tmp_path: Path
) -> None:
    asked = prompt("True", "False")
    how = {"prompt": asked, "column": ["claim=statement"], "limit": 1}
    with prepare(screen, claims, context, **how) as submission:
        assert submission.file.records_to_read == 1
        assert submission.run.context == context()
        assert submission.run.prompt == asked
        inspect_claims(screen, submission, tmp_path / "rejected.jsonl")
    assert isinstance(screen.file, io.StringIO)
    first, second = screen.file.getvalue().splitlines()
    assert first.endswith(
        "claims.csv: claims (CSV), 1 of 2 records: 1 claim, 0 repeated, 0 rejected"
    )
    assert second == (
        "left out of the scores, because the prompt does not have them: NEI: 1 (map them "
        "with --label-map 'NEI=…'); without evidence: 1 (the record has none; ignored: "
        "author; name one with --column evidence=NAME)"
    )
    assert not (tmp_path / "rejected.jsonl").exists()


def test_two_labels_of_one_claim_and_a_map_of_no_label_are_warned_of(
    context: Callable[[], ContextSpec], screen: Screen, tmp_path: Path
) -> None:
    path = tmp_path / "claims.jsonl"
    row = '{{"id": {}, "claim": "A.", "label": "{}"}}\n'
    path.write_text(
        row.format(1, "SUPPORTS") + row.format(2, "REFUTES") + row.format(3, "SUPPORTS")
    )
    how = {"prompt": PromptSpec(), "column": [], "label_map": ["DISPUTD=NEI", "supports=SUPPORTS"]}
    with prepare(screen, path, context, **how) as submission:
        inspect_claims(screen, submission, tmp_path / "rejected.jsonl")
    assert isinstance(screen.file, io.StringIO)
    shown = screen.file.getvalue()
    # This file has no evidence.
    assert "Warning: 1 claim repeated with another id and another label" in shown
    assert "Warning: no record has the label 'DISPUTD' of --label-map" in shown


def test_a_file_that_is_not_there_is_known_before_the_model_is_asked_for(
    screen: Screen, tmp_path: Path
) -> None:
    with (
        pytest.raises(InputError, match="does not exist"),
        prepare(screen, tmp_path / "none.jsonl", never),
    ):
        pass


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"seed": 1}, "set --limit as well"),
        ({"column": ["claim"]}, "write it like claim=text"),
        ({"format": "fevre"}, "--format fevre: there is no such format; name one of jsonl, "),
        ({"encoding": "utf-7.5"}, "--encoding utf-7.5: no such text encoding"),
        ({"encoding": "hex"}, "--encoding hex: no such text encoding"),
        ({"label_map": ["DISPUTED"]}, 'write it like "DISPUTED=NOT ENOUGH INFO"'),
        ({"label_map": ["DISPUTED=MAYBE"]}, "has no label 'MAYBE'; it has SUPPORTS, REFUTES, NOT"),
    ],
)
def test_a_bad_flag_is_known_before_anything_is_opened(
    how: dict[str, Any], says: str, screen: Screen, tmp_path: Path
) -> None:
    with (
        pytest.raises(UsageError, match=says),
        prepare(screen, tmp_path / "none.jsonl", never, **how),
    ):
        pass


def test_label_words_that_one_token_cannot_tell_apart_are_known_before_the_file_is_read(
    claims: Path, context: Callable[[], ContextSpec], screen: Screen
) -> None:
    with (
        pytest.raises(ModelError, match="start with the same token"),
        prepare(screen, claims, context, prompt=prompt("True", "Then")),
    ):
        pass


def test_a_model_without_a_tokenizer_is_known_before_the_file_is_read(
    claims: Path, context: Callable[[], ContextSpec], screen: Screen, tmp_path: Path
) -> None:
    shutil.rmtree(tmp_path / "model")
    with (
        pytest.raises(ModelError, match=r"has no tokenizer\.json"),
        prepare(screen, claims, context),
    ):
        pass


def test_the_kinds_that_are_not_shown_are_counted_together() -> None:
    counts = tuple((f"k{number}", 10) for number in range(8))
    assert counted(counts, 2) == "k0: 10, k1: 10, others: 60"
    assert counted(counts[:2], 2) == "k0: 10, k1: 10"
