"""The prompt: instructions, examples and label words. Prompts are not contexts; many share one."""

import re
from functools import cached_property
from string import Formatter
from typing import Annotated, Self

from pydantic import (
    BeforeValidator,
    Field,
    PlainSerializer,
    StringConstraints,
    field_validator,
    model_validator,
)

from services.contracts.bounds import (
    MAX_CONSTANT_CHARS,
    MAX_EXAMPLES,
    MAX_FIELD_USES,
    MAX_LABELS,
    MAX_REASONING_TOKENS,
    ClaimText,
    EvidenceText,
    Name,
    PromptText,
)
from services.contracts.values import Value, content_id

INVALID = "INVALID"
"""The label of a verdict whose answer could not be read; no prompt may use it."""


def _label_as_text(value: object) -> object:
    """Numbers are accepted as text. YAML's true and false are refused: their spelling is lost, and
    a label word must be spelled as the model writes it.
    """
    if isinstance(value, bool):
        raise ValueError(
            "it is true or false, as YAML reads Yes, No, On, Off, true and false; put it in quotes"
        )
    return str(value) if isinstance(value, int | float) else value


LabelName = Annotated[
    str,
    StringConstraints(strip_whitespace=True, min_length=1, max_length=64, pattern=r"^[^\x00]*$"),
]


_RESERVED = ("messages", "add_generation_prompt", "bos_token", "eos_token")
_VariableName = Annotated[
    str, StringConstraints(max_length=64, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")
]
_VariableValue = bool | int | float | Annotated[str, StringConstraints(max_length=1_024)]


def _sorted_pairs(variables: object) -> object:
    if not isinstance(variables, dict):
        return variables
    for name, value in variables.items():
        if not isinstance(name, str) or not isinstance(value, (bool, int, float, str)):
            raise ValueError(f"{name!r} must be a name with a text, a number, true or false")
    return tuple(sorted(variables.items()))


# A mapping in files and messages, and a tuple in memory: values must be hashable.
TemplateVariables = Annotated[
    tuple[tuple[_VariableName, _VariableValue], ...],
    BeforeValidator(_sorted_pairs),
    PlainSerializer(dict),
]


_WHOLE_NUMBER = re.compile(r"\s*([+-]?\d+)(?:\.0*)?\s*")


def whole_number(text: str) -> str | None:
    """`1`, `1.0` and ` 1 ` are "1", `-1.0` is "-1"; None for any other text."""
    found = _WHOLE_NUMBER.fullmatch(text)
    return str(int(found[1])) if found else None


def _key(spelling: str) -> str:
    # Numbers first: their hyphen is a sign.
    number = whole_number(spelling)
    return number or " ".join(spelling.replace("_", " ").replace("-", " ").upper().split())


WrittenLabel = Annotated[LabelName, BeforeValidator(_label_as_text)]
"""A label in a YAML file."""


class Label(Value):
    """One answer: its name in results, the word that the model writes, other spellings in files."""

    name: WrittenLabel
    word: WrittenLabel
    aliases: Annotated[tuple[WrittenLabel, ...], Field(max_length=16)] = ()


class Example(Value):
    """A labelled claim that the model sees before the one to verify."""

    claim: ClaimText
    evidence: EvidenceText | None = None
    label: LabelName


class Reasoning(Value):
    """What the engine writes before the label words are scored.

    It writes at most `max_tokens` tokens, the likeliest one each time, and stops at `until`. The
    label words are scored after `until`, which is added if the engine did not write it.
    """

    max_tokens: Annotated[int, Field(ge=1, le=MAX_REASONING_TOKENS)]
    until: Annotated[str, StringConstraints(max_length=64, pattern=r"^[^\x00]*$")] = "Answer:"

    @field_validator("until")
    @classmethod
    def _a_label_word_may_follow(cls, until: str) -> str:
        end = until.rstrip("\n")
        if not end or end[-1].isspace():
            raise ValueError(
                "it must be a text that ends in no white space but line ends, because a label word "
                "hardly ever follows a space"
            )
        return until


FEVER_LABELS = (
    Label(name="SUPPORTS", word="True", aliases=("SUPPORT", "SUPPORTED", "ENTAILMENT")),
    Label(
        name="REFUTES", word="False", aliases=("REFUTE", "REFUTED", "CONTRADICT", "CONTRADICTION")
    ),
    Label(
        name="NOT ENOUGH INFO", word="Unknown", aliases=("NEI", "NEUTRAL", "NOT ENOUGH EVIDENCE")
    ),
)


class PromptSpec(Value):
    """How a claim is presented to the model and how its answer is read.

    The constant part (instructions, examples) comes first, so that an engine's prefix cache holds
    it once. `template` is filled for each claim; its only fields are `{claim}` and `{evidence}`.
    With `chat` the text becomes a user's turn in the model's chat template, if it has one.

    The verdict is the label whose word's first token is the likeliest of all label words. It is
    INVALID when all label words together have less than `minimum_mass` of the probability: then the
    model did not answer the question. With `reasoning` the model writes a text first.
    """

    name: Name = "fever"
    instructions: PromptText = (
        "Decide whether the evidence supports the claim. Answer with one word: True if the "
        "evidence supports the claim, False if it contradicts it, Unknown if it does not decide."
    )
    examples: Annotated[tuple[Example, ...], Field(max_length=MAX_EXAMPLES)] = ()
    template: PromptText = "Evidence: {evidence}\nClaim: {claim}\nAnswer:"
    no_evidence: EvidenceText = "none"
    labels: Annotated[tuple[Label, ...], Field(min_length=2, max_length=MAX_LABELS)] = FEVER_LABELS
    chat: bool = True
    minimum_mass: Annotated[float, Field(ge=0, le=1)] = 0.01
    # Excluded if empty, so that ids and messages without variables do not change.
    chat_template_kwargs: Annotated[
        TemplateVariables, Field(max_length=32, exclude_if=lambda variables: not variables)
    ] = ()
    """Variables for the model's chat template, named as in vLLM and transformers."""
    # Excluded if None, for the same reason.
    reasoning: Annotated[Reasoning | None, Field(exclude_if=lambda value: value is None)] = None

    @field_validator("template")
    @classmethod
    def _fields_are_known(cls, template: str) -> str:
        try:
            parts = [part for part in Formatter().parse(template) if part[1] is not None]
        except ValueError as error:
            raise ValueError(f"braces do not pair up ({error}); write {{{{ for a brace") from error
        fields = [field for _, field, _, _ in parts]
        if any(specification or conversion for _, _, specification, conversion in parts):
            raise ValueError("fields are written {claim} and {evidence}, without `!` or `:`")
        unknown = sorted({str(field) for field in fields} - {"claim", "evidence"})
        if unknown:
            raise ValueError(f"unknown fields {unknown}; use only {{claim}} and {{evidence}}")
        if "claim" not in fields:
            raise ValueError("it must contain {claim}")
        for field in ("claim", "evidence"):
            if fields.count(field) > MAX_FIELD_USES:
                raise ValueError(
                    f"{{{field}}} occurs {fields.count(field):,} times; use it at most "
                    f"{MAX_FIELD_USES} times"
                )
        return template

    @model_validator(mode="after")
    def _constant_part_is_bounded(self) -> Self:
        claims, evidence = self.template.count("{claim}"), self.template.count("{evidence}")
        chars = len(self.instructions) + sum(
            len(self.template)
            + claims * len(example.claim)
            + evidence * len(example.evidence or self.no_evidence)
            for example in self.examples
        )
        if chars > MAX_CONSTANT_CHARS:
            raise ValueError(
                f"instructions and examples have {chars:,} characters in this template; at most "
                f"{MAX_CONSTANT_CHARS:,} are allowed: use fewer or shorter examples"
            )
        return self

    @model_validator(mode="after")
    def _labels_are_distinct(self) -> Self:
        spellings: dict[str, str] = {}
        for label in self.labels:
            if _key(label.name) == INVALID:
                raise ValueError(f"{INVALID} is reserved for answers that cannot be read")
            for spelling in {_key(text) for text in (label.name, *label.aliases)}:
                if spelling in spellings:
                    raise ValueError(
                        f"{spelling!r} names both {spellings[spelling]!r} and {label.name!r}"
                    )
                spellings[spelling] = label.name
        for example in self.examples:
            if self.label_of(example.label) is None:
                raise ValueError(
                    f"an example has the label {example.label!r}, which is not declared"
                )
        return self

    @model_validator(mode="after")
    def _reasoning_can_be_written(self) -> Self:
        if self.reasoning is None:
            return self
        if self.examples:
            raise ValueError(
                "examples cannot be used with reasoning, because they would show answers without "
                "it; leave out one of the two"
            )
        until = self.reasoning.until.rstrip()
        if self.template.rstrip().endswith(until):
            raise ValueError(
                f"the template ends in {until!r}, the end of the reasoning, so none would be "
                "written; end the template otherwise, or choose another `until`"
            )
        return self

    @model_validator(mode="after")
    def _variables_have_a_use(self) -> Self:
        if self.chat_template_kwargs and not self.chat:
            raise ValueError("chat_template_kwargs are for the chat template: they need chat: true")
        for name, _ in self.chat_template_kwargs:
            if name in _RESERVED:
                raise ValueError(f"chat_template_kwargs: {name} is set by Keepwarm")
        return self

    @cached_property
    def _names_by_spelling(self) -> dict[str, str]:
        return {
            _key(text): label.name for label in self.labels for text in (label.name, *label.aliases)
        }

    def label_of(self, spelling: str) -> str | None:
        """The name of the label with this spelling (ignoring case, `_` and `-`), or None."""
        return self._names_by_spelling.get(_key(spelling))

    @cached_property
    def label_names(self) -> tuple[str, ...]:
        return tuple(label.name for label in self.labels)

    @cached_property
    def prompt_id(self) -> str:
        return content_id("prm", self.model_dump(mode="json"))
