"""A prompt made ready for one model: claims become token ids, label words become first tokens."""

from collections.abc import Sequence
from string import Formatter

from services.contracts import Claim, PromptSpec
from services.contracts.errors import ModelError
from services.gpu_worker.tokenizer import ModelTokenizer


class CompiledPrompt:
    """A `PromptSpec` under a tokenizer.

    The constant part is encoded once and comes first, so that the engine's prefix cache serves it.
    `label_tokens` are the first tokens of the label words, in the order of `spec.labels`.
    """

    def __init__(self, spec: PromptSpec, tokenizer: ModelTokenizer) -> None:
        """Raises ModelError when two label words start with the same token."""
        self.spec = spec
        self._tokenizer = tokenizer
        frame = tokenizer.chat_frame() if spec.chat else None
        before, after = frame or ("", "")
        constant, self._template = _split(spec)
        # A frame from a chat template already holds the begin-of-text token, where there is one.
        self._head = tokenizer.encode_trusted(before, begin=frame is None)
        self._tail = tokenizer.encode_trusted(after)
        self._constant = constant
        if self._boundary_is_clean():
            self._head += tokenizer.encode_plain([constant])[0] if constant else []
            self._constant = ""
        self.label_tokens = self._first_tokens(after)

    def encode(self, claims: Sequence[Claim]) -> list[list[int]]:
        """One list of token ids per claim, in order."""
        texts = [self._constant + self._fill(claim.text, claim.evidence) for claim in claims]
        return [self._head + middle + self._tail for middle in self._tokenizer.encode_plain(texts)]

    def _fill(self, claim: str, evidence: str | None) -> str:
        return self._template.format(claim=claim, evidence=evidence or self.spec.no_evidence)

    def _boundary_is_clean(self) -> bool:
        """Whether encoding in two pieces is encoding the whole; some tokenizers prepend a space."""
        variable = self._fill("A claim.", "Evidence.")
        together, first, second = self._tokenizer.encode_plain(
            [self._constant + variable, self._constant, variable]
        )
        return together == first + second

    def _first_tokens(self, after: str) -> tuple[int, ...]:
        if after:
            words = [label.word for label in self.spec.labels]
            lead = after
        else:
            words = [" " + label.word for label in self.spec.labels]
            lead = self.spec.template.rsplit("}", 1)[-1]
        lead_ids = self._tokenizer.encode_trusted(lead)
        tokens = []
        for word in words:
            with_word = self._tokenizer.encode_trusted(lead + word)
            # The word may melt into what precedes it; then its own first token must do.
            clean = with_word[: len(lead_ids)] == lead_ids and len(with_word) > len(lead_ids)
            tokens.append(
                with_word[len(lead_ids)] if clean else self._tokenizer.encode_trusted(word)[0]
            )
        for index, token in enumerate(tokens):
            if token in tokens[:index]:
                earlier = self.spec.labels[tokens.index(token)]
                label = self.spec.labels[index]
                raise ModelError(
                    f"prompt {self.spec.name!r}: the label words {earlier.word!r} "
                    f"({earlier.name}) and {label.word!r} ({label.name}) start with the same token "
                    f"{self._tokenizer.token_text(token)!r} under this model's tokenizer, so one "
                    "token cannot tell them apart; choose words that begin differently"
                )
        return tuple(tokens)


def _split(spec: PromptSpec) -> tuple[str, str]:
    """The constant text, and the template of what follows it.

    Cut after the last line that no claim can change: a line's end is a token boundary.
    """
    shown = [
        spec.template.format(claim=e.claim, evidence=e.evidence or spec.no_evidence)
        + " "
        + next(label.word for label in spec.labels if label.name == spec.label_of(e.label))
        for e in spec.examples
    ]
    preamble = "".join(f"{part}\n\n" for part in (spec.instructions, *shown) if part)
    literal, field, _, _ = next(iter(Formatter().parse(spec.template)))
    cut = literal.rfind("\n") + 1 if field is not None else 0
    constant = preamble + literal[:cut]
    # `literal` is unescaped; in the template a brace counts twice.
    escaped_cut = len(literal[:cut].replace("{", "{{").replace("}", "}}"))
    return constant, spec.template[escaped_cut:]
