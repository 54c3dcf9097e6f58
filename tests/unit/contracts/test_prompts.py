import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from services.contracts import INVALID, Label, PromptSpec
from services.contracts.bounds import MAX_EVIDENCE_CHARS
from services.contracts.prompts import FEVER_LABELS, Example

YES_NO = (Label(name="YES", word="yes"), Label(name="NO", word="no"))
PROMPT = PromptSpec(
    name="p",
    instructions="Judge.",
    examples=(Example(claim="c", evidence="e", label="YES"),),
    template="{evidence} {claim}",
    no_evidence="-",
    labels=YES_NO,
    chat=True,
    minimum_mass=0.5,
)
OTHERWISE = {
    "name": "q",
    "instructions": "Judge again.",
    "examples": (),
    "template": "{claim}",
    "no_evidence": "none",
    "labels": (Label(name="YES", word="yes"), Label(name="NO", word="No")),
    "chat": False,
    "minimum_mass": 0.25,
    "chat_template_kwargs": {"enable_thinking": False},
    "reasoning": {"max_tokens": 8},
}


def test_a_prompt_id_is_what_it_was_when_the_first_results_were_stored() -> None:
    assert PromptSpec().prompt_id == "prm-4cdf195523d233c9"


def test_every_field_of_a_prompt_is_part_of_its_identity() -> None:
    assert OTHERWISE.keys() == PromptSpec.model_fields.keys()
    ids = {
        PromptSpec.model_validate(
            {**PROMPT.model_dump(), field: value}
            # Reasoning excludes examples.
            | ({"examples": (), "name": "r"} if field == "reasoning" else {})
        ).prompt_id
        for field, value in OTHERWISE.items()
    }
    assert len(ids | {PROMPT.prompt_id}) == len(OTHERWISE) + 1


def test_the_order_in_which_fields_are_given_does_not_matter() -> None:
    turned = dict(reversed(PROMPT.model_dump().items()))
    assert PromptSpec.model_validate(turned).prompt_id == PROMPT.prompt_id


def test_a_whole_number_means_the_same_as_its_decimal_spelling() -> None:
    assert PromptSpec(minimum_mass=0).prompt_id == PromptSpec(minimum_mass=0.0).prompt_id


@pytest.mark.parametrize("template", ["{claim}", "{{}} {evidence}: {claim}", "{claim}\n{claim}"])
def test_a_template_with_the_claim_and_literal_braces_is_taken(template: str) -> None:
    assert PromptSpec(template=template).template == template


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("", "must contain {claim}"),
        ("{evidence}", "must contain {claim}"),
        ("{{claim}}", "must contain {claim}"),
        ("{claim} {source}", "unknown fields ['source']"),
        ("{claim} {}", "unknown fields ['']"),
        ("{claim} {0}", "unknown fields ['0']"),
        ("{claim.__class__}", "unknown fields ['claim.__class__']"),
        ("{claim[0]}", "unknown fields ['claim[0]']"),
        ("{claim", "braces do not pair up"),
        ("claim}", "braces do not pair up"),
        ("{claim} { }", "unknown fields [' ']"),
    ],
)
def test_a_template_that_cannot_be_filled_is_refused_with_the_reason(
    template: str, says: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        PromptSpec(template=template)
    assert says in str(refused.value)


@pytest.mark.parametrize(
    "template",
    ["{claim!x}", "{claim:d}", "{claim:{nope}}", "{claim:{evidence}}", "{claim:>99999999}"],
)
def test_a_template_whose_conversion_or_format_would_fail_or_blow_up_is_refused(
    template: str,
) -> None:
    with pytest.raises(ValidationError, match="template"):
        PromptSpec(template=template)


@pytest.mark.parametrize("field", ["claim", "evidence"])
def test_a_template_that_multiplies_what_it_shows_is_refused(field: str) -> None:
    often = f"{{{field}}} " * 1_000
    with pytest.raises(ValidationError, match=rf"{{{field}}} occurs 1,000 times; use it at most 4"):
        PromptSpec(template="{claim}" * (field != "claim") + often)
    PromptSpec(template="{claim} " * 4 + "{evidence} " * 4)


def test_examples_that_a_template_multiplies_are_bounded_together() -> None:
    example = Example(claim="c", evidence="e" * MAX_EVIDENCE_CHARS, label="SUPPORTS")
    assert PromptSpec(examples=(example,) * 63)
    with pytest.raises(ValidationError, match="characters in this template; at most 4,194,304"):
        PromptSpec(examples=(example,) * 63, template="{evidence} {evidence} {claim}")


PIECES = ("{claim}", "{evidence}", "{{", "}}", "{", "}", "{claim!r}", "{claim!x}", "{claim:>4}")
MORE_PIECES = ("{claim:d}", "{claim:{evidence}}", "{}", "{other}", "{claim.x}", "text", "\n", "!")


@given(st.lists(st.sampled_from(PIECES + MORE_PIECES), max_size=6).map("".join))
def test_every_template_that_is_taken_can_be_filled(template: str) -> None:
    try:
        prompt = PromptSpec(template=template)
    except ValidationError:
        return
    assert "a {claim}" in prompt.template.format(claim="a {claim}", evidence="an {evidence}")


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"name": "YES"}, {"name": "yes"}),
        ({"name": "NOT ENOUGH INFO"}, {"name": "not_enough-info"}),
        ({"name": "YES", "aliases": ("Y",)}, {"name": "NO", "aliases": ("y",)}),
        ({"name": "YES", "aliases": ("no",)}, {"name": "NO"}),
    ],
)
def test_one_spelling_cannot_mean_two_labels(one: dict, other: dict) -> None:
    with pytest.raises(ValidationError, match="names both"):
        PromptSpec(labels=(Label(word="a", **one), Label(word="b", **other)))


def test_a_label_may_repeat_its_own_name_as_an_alias() -> None:
    label = Label(name="YES", word="yes", aliases=("yes", "Yes", "y"))
    assert PromptSpec(labels=(label, YES_NO[1])).label_of("y") == "YES"


@pytest.mark.parametrize("name", [INVALID, "invalid", " Invalid "])
def test_invalid_is_not_a_label_that_a_prompt_may_use(name: str) -> None:
    with pytest.raises(ValidationError, match="reserved for answers that cannot be read"):
        PromptSpec(labels=(Label(name=name, word="a"), YES_NO[0]))


def test_an_example_with_a_label_that_is_not_declared_is_refused() -> None:
    with pytest.raises(ValidationError, match="'MAYBE', which is not declared"):
        PromptSpec(examples=(Example(claim="c", label="MAYBE"),))


def test_an_example_may_spell_its_label_by_an_alias() -> None:
    assert PromptSpec(examples=(Example(claim="c", label="entailment"),)).examples


@pytest.mark.parametrize("labels", [(), (Label(name="YES", word="yes"),)])
def test_fewer_than_two_labels_are_no_question(labels: tuple[Label, ...]) -> None:
    with pytest.raises(ValidationError, match="labels"):
        PromptSpec(labels=labels)


@pytest.mark.parametrize(
    ("spelling", "label"),
    [
        ("SUPPORTS", "SUPPORTS"),
        ("supports", "SUPPORTS"),
        (" Supported ", "SUPPORTS"),
        ("entailment", "SUPPORTS"),
        ("REFUTED", "REFUTES"),
        ("contradiction", "REFUTES"),
        ("NOT ENOUGH INFO", "NOT ENOUGH INFO"),
        ("NOT_ENOUGH_INFO", "NOT ENOUGH INFO"),
        ("not-enough-info", "NOT ENOUGH INFO"),
        ("Not  Enough\tInfo", "NOT ENOUGH INFO"),
        ("NEI", "NOT ENOUGH INFO"),
        ("neutral", "NOT ENOUGH INFO"),
        ("True", None),
        ("", None),
        ("NOTENOUGHINFO", None),
        (INVALID, None),
    ],
)
def test_a_label_is_known_by_its_spellings(spelling: str, label: str | None) -> None:
    assert PromptSpec().label_of(spelling) == label


def test_label_names_keep_the_order_of_the_labels() -> None:
    assert PromptSpec().label_names == tuple(label.name for label in FEVER_LABELS)
    assert PromptSpec(labels=FEVER_LABELS[::-1]).label_names == PromptSpec().label_names[::-1]


def test_white_space_around_a_label_is_not_part_of_it() -> None:
    assert Label(name=" YES\n", word=" yes ") == Label(name="YES", word="yes")


# Variables for the chat template.


def test_a_prompt_without_variables_is_written_as_it_was_before_there_were_any() -> None:
    assert "chat_template_kwargs" not in PromptSpec().model_dump(mode="json")
    assert "chat_template_kwargs" not in PromptSpec().model_dump_json()


def test_variables_keep_their_types_on_the_wire() -> None:
    spec = PromptSpec(chat_template_kwargs={"b": 0, "a": False, "d": "low", "c": 0.5})
    assert '"chat_template_kwargs":{"a":false,"b":0,"c":0.5,"d":"low"}' in spec.model_dump_json()
    back = PromptSpec.model_validate_json(spec.model_dump_json())
    assert list(map(repr, dict(back.chat_template_kwargs).values())) == [
        "False",
        "0",
        "0.5",
        "'low'",
    ]
    assert back.prompt_id == spec.prompt_id


@pytest.mark.parametrize(
    ("variables", "chat", "says"),
    [
        ({"enable_thinking": False}, False, "need chat: true"),
        ({"messages": "x"}, True, "messages is set by Keepwarm"),
        ({"add_generation_prompt": False}, True, "add_generation_prompt is set by Keepwarm"),
        ({"not a name": 1}, True, "String should match pattern"),
        ({"tools": [1]}, True, "'tools' must be a name with a text, a number, true or false"),
        ({1: 1, "a": 1}, True, "1 must be a name with"),
        ({"a": None}, True, "'a' must be a name with"),
    ],
)
def test_variables_that_can_have_no_effect_are_refused(
    variables: dict[object, object], chat: bool, says: str
) -> None:
    with pytest.raises(ValidationError) as refused:
        PromptSpec.model_validate({"chat_template_kwargs": variables, "chat": chat})
    assert says in str(refused.value)


REASONS = {"template": "{claim}\nReasoning:", "reasoning": {"max_tokens": 8}}


def test_each_part_of_the_reasoning_is_part_of_the_identity() -> None:
    without = {"template": REASONS["template"]}
    ids = {
        PromptSpec.model_validate(fields).prompt_id
        for fields in (
            without,
            REASONS,
            {**REASONS, "reasoning": {"max_tokens": 9}},
            {**REASONS, "reasoning": {"max_tokens": 8, "until": "Verdict:"}},
        )
    }
    assert len(ids) == 4
    assert "reasoning" not in PromptSpec.model_validate(without).model_dump(mode="json")


@pytest.mark.parametrize("until", ["Answer:", "</think>", "</think>\n\n", "a b", "."])
def test_reasoning_may_end_in_a_text_or_a_line_end(until: str) -> None:
    prompt = PromptSpec.model_validate({**REASONS, "reasoning": {"max_tokens": 1, "until": until}})
    assert prompt.reasoning is not None and prompt.reasoning.until == until


@pytest.mark.parametrize("until", ["", "\n", "Answer: ", "Answer: \n", "Answer:\t", "\0"])
def test_reasoning_that_ends_where_no_label_word_can_follow_is_refused(until: str) -> None:
    with pytest.raises(ValidationError, match="until"):
        PromptSpec.model_validate({**REASONS, "reasoning": {"max_tokens": 1, "until": until}})


@pytest.mark.parametrize("max_tokens", [0, -1, 4_097, "many"])
def test_the_length_of_reasoning_is_bounded(max_tokens: object) -> None:
    with pytest.raises(ValidationError, match="max_tokens"):
        PromptSpec.model_validate({**REASONS, "reasoning": {"max_tokens": max_tokens}})


def test_a_template_after_which_no_reasoning_could_come_is_refused() -> None:
    with pytest.raises(ValidationError, match="the template ends in 'Answer:'"):
        PromptSpec.model_validate({"reasoning": {"max_tokens": 8}})


def test_examples_without_reasoning_are_refused_with_it() -> None:
    example = {"claim": "c", "label": "SUPPORTS"}
    with pytest.raises(ValidationError, match="examples cannot be used with reasoning"):
        PromptSpec.model_validate({**REASONS, "examples": [example]})
