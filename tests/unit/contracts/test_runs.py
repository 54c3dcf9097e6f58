import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from services.contracts import ContextSpec, PromptSpec, Run, Totals

RUN = Run(
    source="claims.jsonl",
    source_digest="src-1",
    context=ContextSpec(model="org/model", revision="abc"),
    prompt=PromptSpec(),
    limit=200,
    seed=7,
)
OTHERWISE = {
    "source_digest": "src-2",
    "context": ContextSpec(model="org/model", revision="def"),
    "prompt": PromptSpec(minimum_mass=0.5),
    "limit": 201,
    "seed": 8,
}


def changed_run(**changes: object) -> Run:
    """The same run with something changed."""
    fields = {name: getattr(RUN, name) for name in Run.model_fields}
    return Run.model_validate({**fields, **changes})


def test_a_run_id_is_what_it_was_when_the_first_results_were_stored() -> None:
    assert RUN.run_id == "run-e2b8436d36765519"


def test_everything_but_the_source_is_part_of_a_runs_identity() -> None:
    assert OTHERWISE.keys() | {"source"} == Run.model_fields.keys()
    ids = {changed_run(**{field: value}).run_id for field, value in OTHERWISE.items()}
    assert len(ids | {RUN.run_id}) == len(OTHERWISE) + 1


def test_where_a_file_lies_does_not_change_its_run() -> None:
    assert changed_run(source="/mnt/other/name.jsonl").run_id == RUN.run_id


def test_a_seed_of_zero_is_a_seed() -> None:
    assert changed_run(seed=0).run_id != changed_run(seed=None).run_id


def test_the_order_in_which_fields_are_given_does_not_matter() -> None:
    turned = dict(reversed(RUN.model_dump().items()))
    assert Run.model_validate(turned).run_id == RUN.run_id


def test_a_run_id_survives_the_wire() -> None:
    assert Run.model_validate_json(RUN.model_dump_json()).run_id == RUN.run_id


def test_a_run_of_no_claims_is_refused() -> None:
    with pytest.raises(ValidationError, match="limit"):
        changed_run(limit=0)


COUNT = st.integers(min_value=0, max_value=10**12)


@given(COUNT, COUNT, COUNT)
def test_totals_that_add_up_are_taken(claims: int, repeated: int, rejected: int) -> None:
    lines = claims + repeated + rejected
    totals = Totals(lines=lines, claims=claims, repeated=repeated, rejected=rejected)
    assert totals.lines == lines


@given(COUNT, COUNT, COUNT, COUNT)
def test_totals_that_do_not_add_up_are_refused(
    lines: int, claims: int, repeated: int, rejected: int
) -> None:
    if lines == claims + repeated + rejected:
        lines += 1
    with pytest.raises(ValidationError, match="lines must equal claims"):
        Totals(lines=lines, claims=claims, repeated=repeated, rejected=rejected)


def test_a_count_cannot_be_negative() -> None:
    with pytest.raises(ValidationError, match="repeated"):
        Totals(lines=1, claims=2, repeated=-1, rejected=0)
