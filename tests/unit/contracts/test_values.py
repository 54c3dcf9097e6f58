import json
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

import services.contracts  # so that every contract model is known below
from services.contracts.prompts import Reasoning
from services.contracts.values import Value, content_id
from services.contracts.wire import Message

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def models_in(value: object) -> Iterator[BaseModel]:
    if isinstance(value, BaseModel):
        yield value
        for name in type(value).model_fields:
            yield from models_in(getattr(value, name))
    elif isinstance(value, tuple):
        for item in value:
            yield from models_in(item)


def all_kinds(parent: type[Value] = Value) -> set[type[Value]]:
    children = {
        child
        for child in parent.__subclasses__()
        if child.__module__.startswith("services.contracts.")
    }
    return children.union(*(all_kinds(child) for child in children))


@pytest.fixture(scope="session")
def one_of_each(messages: dict[str, Message]) -> dict[type, BaseModel]:
    found = {type(m): m for message in messages.values() for m in models_in(message)}
    return {**found, Reasoning: Reasoning(max_tokens=8)}  # a prompt has examples or reasoning


def test_the_examples_cover_every_contract_model(one_of_each: dict[type, BaseModel]) -> None:
    assert services.contracts.Claim in all_kinds()
    assert one_of_each.keys() == all_kinds() - {Message}


def test_every_contract_model_is_frozen(one_of_each: dict[type, BaseModel]) -> None:
    for kind, example in one_of_each.items():
        for name in kind.model_fields:
            with pytest.raises(ValidationError, match="frozen"):
                setattr(example, name, getattr(example, name))


def test_every_contract_model_refuses_unknown_fields(one_of_each: dict[type, BaseModel]) -> None:
    for kind, example in one_of_each.items():
        with pytest.raises(ValidationError, match="surprise"):
            kind.model_validate({**example.model_dump(), "surprise": 1})


def test_equal_models_have_equal_hashes(one_of_each: dict[type, BaseModel]) -> None:
    for kind, example in one_of_each.items():
        twin = kind.model_validate(example.model_dump())
        assert twin == example
        assert hash(twin) == hash(example)


def test_a_changed_copy_is_checked_like_any_other_value(
    one_of_each: dict[type, BaseModel],
) -> None:
    for kind, example in one_of_each.items():
        assert example.model_copy() == example
        with pytest.raises(ValidationError, match="surprise"):
            example.model_copy(update={"surprise": 1})
        for name in kind.model_fields:
            with pytest.raises(ValidationError, match=name):
                example.model_copy(update={name: object()})


def test_a_content_id_is_what_it_was_when_the_first_results_were_stored() -> None:
    assert content_id("x", {"b": [1, 2.5, None], "a": "Łódź"}) == "x-13f90aca311a1ee8"


@given(st.dictionaries(st.text(), JSON, max_size=6))
def test_a_content_id_does_not_depend_on_the_order_of_fields(value: dict[str, object]) -> None:
    turned = dict(reversed(value.items()))
    assert content_id("x", value) == content_id("x", turned)


@given(JSON, JSON)
def test_other_content_has_another_id(one: object, other: object) -> None:
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (content_id("x", one) == content_id("x", other)) is same


def test_the_prefix_tells_kinds_of_ids_apart() -> None:
    assert content_id("a", 1) != content_id("b", 1)
    assert content_id("ctx", 1).startswith("ctx-")
    assert len(content_id("ctx", 1)) == len("ctx-") + 16
