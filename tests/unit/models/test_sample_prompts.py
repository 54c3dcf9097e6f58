"""The prompts of samples/prompts: usable with the demo model, each with its source."""

import re
from itertools import pairwise
from pathlib import Path

import pytest

from services.contracts import Claim, ContextSpec
from services.models.compiled_prompt import CompiledPrompt
from services.models.tokenizer import ModelTokenizer
from services.producer import read_prompt
from tests.conftest import DEMO_MODEL, REPOSITORY

PROMPTS = sorted((REPOSITORY / "samples" / "prompts").glob("*.yaml"))
SPELLINGS = ("SUPPORTS", "REFUTES", "NOT ENOUGH INFO", "supported", "contradiction", "nei")


@pytest.fixture(scope="module")
def demo_tokenizer() -> ModelTokenizer:
    if not DEMO_MODEL.is_dir():
        pytest.skip("make setup makes the demo model")
    return ModelTokenizer.load(ContextSpec(model=str(DEMO_MODEL)))


@pytest.mark.parametrize("path", PROMPTS, ids=lambda path: path.stem)
def test_every_label_is_scored_by_a_token_that_is_its_whole_word(
    path: Path, demo_tokenizer: ModelTokenizer
) -> None:
    corrected: list[str] = []
    spec = read_prompt(path, corrected.append)
    assert corrected == []
    claim = Claim(claim_id="c", position=0, text="It is old.", evidence="It was lit in 1874.")
    rendered = CompiledPrompt(spec, demo_tokenizer).render(claim)
    assert [token.text for (token,) in rendered.label_tokens] == [
        f" {label.word}" for label in spec.labels
    ]
    scored = [token for (token,) in rendered.label_tokens]
    words = dict(zip(spec.label_names, scored, strict=True))
    ends = [
        token
        for before, token in pairwise(rendered.tokens)
        if before.text == ":" and token in scored
    ]
    # Examples end in the tokens that are scored.
    assert ends == [words[example.label] for example in spec.examples]


@pytest.mark.parametrize("path", PROMPTS, ids=lambda path: path.stem)
def test_a_sample_prompt_has_its_files_name_a_source_and_the_labels_of_the_sample_claims(
    path: Path,
) -> None:
    spec = read_prompt(path)
    assert spec.name == path.stem
    assert None not in map(spec.label_of, SPELLINGS)
    comment = path.read_text(encoding="utf-8").partition("\nname:")[0]
    assert re.search(r"Sources? of the idea: .+\(arXiv:\d{4}\.\d{5}\)", comment, re.DOTALL)


def test_every_sample_prompt_is_in_the_documentation() -> None:
    page = (REPOSITORY / "docs" / "prompts.md").read_text(encoding="utf-8")
    assert PROMPTS
    assert all(f"`{path.name}`" in page for path in PROMPTS)
