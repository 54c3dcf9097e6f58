from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from services.contracts import Claim, PromptSpec
from services.producer import Source, read_prompt
from services.producer.parse import ParsedClaim, Parser


@pytest.fixture(scope="module")
def prompt(repository: Path) -> PromptSpec:
    return read_prompt(repository / "samples" / "prompt.yaml")


@pytest.fixture(scope="module")
def claims(repository: Path, prompt: PromptSpec) -> list[Claim]:
    with Source.open(str(repository / "samples" / "claims.jsonl")) as source:
        assert source.summarize().records == 240
        parser = Parser(source.name, prompt)
        readings = [reading for line in source.records() for reading in parser.parse(line)]
    assert all(isinstance(reading, ParsedClaim) for reading in readings)
    return [reading.claim for reading in readings]


def test_there_are_eighty_claims_of_each_label(claims: list[Claim], prompt: PromptSpec) -> None:
    assert Counter(claim.gold for claim in claims) == dict.fromkeys(prompt.label_names, 80)


def test_every_sample_has_an_id_of_its_own_and_evidence(claims: list[Claim]) -> None:
    assert len({claim.claim_id for claim in claims}) == 240
    assert len({claim.text for claim in claims}) == 240
    assert all(claim.evidence and claim.evidence.strip() for claim in claims)


def test_samples_are_in_no_order_that_a_model_could_use(claims: list[Claim]) -> None:
    runs = sum(a.gold != b.gold for a, b in pairwise(claims))
    assert runs > 100


def test_the_sample_prompt_shows_an_example_of_each_label(prompt: PromptSpec) -> None:
    assert {prompt.label_of(example.label) for example in prompt.examples} == set(
        prompt.label_names
    )


def test_the_sample_prompt_knows_the_same_labels_as_the_default(prompt: PromptSpec) -> None:
    assert prompt.labels == PromptSpec().labels
