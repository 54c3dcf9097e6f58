import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.contexts.engine_client import Answer
from services.contracts import INVALID, Claim, PromptSpec, Verdict
from services.gpu_worker.inference import read_verdict

CLAIM = Claim(claim_id="c", position=3, text="C.", evidence="E.", gold="REFUTES")


def verdict(*scores: float | None, text: str = "True", minimum_mass: float = 0.01) -> Verdict:
    prompt = PromptSpec(minimum_mass=minimum_mass)
    return read_verdict(CLAIM, Answer(text, scores), prompt, prompt_tokens=17)


def test_the_verdict_is_the_likeliest_label() -> None:
    found = verdict(math.log(0.2), math.log(0.5), math.log(0.1))
    assert found.label == "REFUTES"
    assert found.probabilities == pytest.approx((0.25, 0.625, 0.125), abs=1e-6)
    assert found.mass == pytest.approx(0.8, abs=1e-6)


def test_the_claim_comes_along_so_that_the_store_needs_no_other_source() -> None:
    found = verdict(-1.0, -2.0, -3.0, text=" True")
    assert (found.claim_id, found.position, found.text, found.gold) == ("c", 3, "C.", "REFUTES")
    assert (found.raw_text, found.prompt_tokens) == (" True", 17)


@pytest.mark.parametrize(
    ("scores", "label"),
    [
        ((-1.0, -2.0, -3.0), "SUPPORTS"),
        ((-2.0, -1.0, -3.0), "REFUTES"),
        ((-3.0, -2.0, -1.0), "NOT ENOUGH INFO"),
        ((-1.0, -1.0, -1.0), "SUPPORTS"),
        ((0.0, -50.0, -50.0), "SUPPORTS"),
    ],
)
def test_labels_are_read_in_the_prompts_order(scores: tuple[float, ...], label: str) -> None:
    assert verdict(*scores).label == label


@pytest.mark.parametrize(
    "scores", [(None, -1.0, -1.0), (-1.0, None, -1.0), (None, None, None), (-1.0, -1.0), ()]
)
def test_a_label_without_a_score_makes_the_answer_invalid(
    scores: tuple[float | None, ...],
) -> None:
    found = verdict(*scores)
    assert (found.label, found.probabilities, found.mass) == (INVALID, (), 0.0)


def test_a_model_that_did_not_answer_the_question_is_invalid_but_its_scores_are_kept() -> None:
    found = verdict(math.log(0.004), math.log(0.003), math.log(0.002))
    assert found.label == INVALID
    assert found.mass == pytest.approx(0.009)
    assert sum(found.probabilities) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(("minimum", "label"), [(0.29, "SUPPORTS"), (0.31, INVALID)])
def test_the_prompt_sets_the_least_mass(minimum: float, label: str) -> None:
    scores = (math.log(0.15), math.log(0.1), math.log(0.05))
    assert verdict(*scores, minimum_mass=minimum).label == label


def test_with_no_minimum_every_scored_answer_has_a_label() -> None:
    assert verdict(-9_999.0, -9_998.0, -9_999.0, minimum_mass=0).label == "REFUTES"


def test_the_models_own_answer_is_cut_and_cleaned() -> None:
    found = verdict(-1.0, -2.0, -3.0, text="a\0b" + "x" * 2_000)
    assert found.raw_text.startswith("abx")
    assert len(found.raw_text) == 1_024


SCORE = st.floats(min_value=-10_000, max_value=1)


@given(SCORE, SCORE, SCORE)
def test_probabilities_are_the_softmax_over_the_labels(a: float, b: float, c: float) -> None:
    found = verdict(a, b, c, minimum_mass=0)
    highest = max(a, b, c)
    weights = [math.exp(score - highest) for score in (a, b, c)]
    assert sum(found.probabilities) == pytest.approx(1, abs=3e-6)
    for probability, weight in zip(found.probabilities, weights, strict=True):
        assert probability == pytest.approx(weight / math.fsum(weights), abs=1e-6)
    assert found.probabilities[PromptSpec().label_names.index(found.label)] == max(
        found.probabilities
    )


@given(st.lists(st.floats(0.001, 1), min_size=4, max_size=4))
def test_the_mass_is_the_labels_share_of_the_whole_vocabulary(shares: list[float]) -> None:
    *labels, rest = shares
    total = math.fsum(shares)
    found = verdict(*(math.log(share / total) for share in labels))
    assert found.mass == pytest.approx(1 - rest / total, abs=1e-6)
    assert 0 <= found.mass <= 1
