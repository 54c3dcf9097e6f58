import pytest
from pydantic import ValidationError

from services.contracts import ContextSpec

SPEC = ContextSpec(
    model="org/model",
    revision="abc",
    dtype="float16",
    max_model_tokens=2048,
    engine_arguments=("--quantization=fp8",),
)
OTHERWISE = {
    "model": "org/other",
    "revision": "def",
    "dtype": "float32",
    "max_model_tokens": 1024,
    "engine_arguments": ("--quantization=int8",),
    "adapter": "org/adapter",
    "adapter_revision": "c0ffee",
}


def test_a_context_id_is_what_it_was_when_the_first_queue_was_declared() -> None:
    assert SPEC.context_id == "ctx-34964f0b28b1c452"


def test_a_context_without_an_adapter_is_written_as_it_was_before_there_were_any() -> None:
    assert not {"adapter", "adapter_revision"} & SPEC.model_dump(mode="json").keys()
    assert "adapter" not in SPEC.model_dump_json()


def test_the_base_of_a_context_is_the_same_without_its_adapter() -> None:
    adapted = SPEC.model_copy(update={"adapter": "org/adapter", "adapter_revision": "c0ffee"})
    assert adapted.base == SPEC and adapted.base.context_id == SPEC.context_id
    assert SPEC.base is SPEC
    assert ContextSpec.model_validate_json(adapted.model_dump_json()) == adapted


def test_every_field_of_a_context_is_part_of_its_identity() -> None:
    assert OTHERWISE.keys() == ContextSpec.model_fields.keys()
    ids = {
        ContextSpec(**{**SPEC.model_dump(), field: value}).context_id
        for field, value in OTHERWISE.items()
    }
    assert len(ids | {SPEC.context_id}) == len(OTHERWISE) + 1


def test_the_order_in_which_fields_are_given_does_not_matter() -> None:
    turned = dict(reversed(SPEC.model_dump().items()))
    assert ContextSpec.model_validate(turned).context_id == SPEC.context_id


def test_the_order_of_engine_arguments_matters_for_the_last_one_wins() -> None:
    one = ContextSpec(model="m", engine_arguments=("--seed=1", "--seed=2"))
    other = ContextSpec(model="m", engine_arguments=("--seed=2", "--seed=1"))
    assert one.context_id != other.context_id


def test_a_context_id_survives_the_wire() -> None:
    assert ContextSpec.model_validate_json(SPEC.model_dump_json()).context_id == SPEC.context_id


def test_a_changed_copy_has_its_own_identity_even_when_the_original_was_asked_for_its() -> None:
    first = ContextSpec(model="org/model", revision="abc")
    assert first.context_id  # kept from now on
    copy = first.model_copy(update={"revision": "def"})
    assert copy.context_id == ContextSpec(model="org/model", revision="def").context_id


@pytest.mark.parametrize("tokens", [15, 10_000_001, "many"])
def test_a_context_of_impossible_length_is_refused(tokens: object) -> None:
    with pytest.raises(ValidationError, match="max_model_tokens"):
        ContextSpec(model="m", max_model_tokens=tokens)  # type: ignore[arg-type]
