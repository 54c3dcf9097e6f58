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
        preamble, lead, template = _split(spec)
        # A frame from a chat template already holds the begin-of-text token, where there is one.
        self._head = tokenizer.encode_trusted(before, begin=frame is None)
        self._tail = tokenizer.encode_trusted(after)
        # Where white space belongs differs by tokenizer: to what follows (GPT-2), or to the full
        # stop before it (Llama 3). Where neither cut is clean, all is encoded for every claim.
        text = preamble + lead
        self._template = _escaped(text) + template
        for constant in (text, text.rstrip()):
            rest = _escaped(text[len(constant) :]) + template
            if constant and self._cuts_cleanly(constant, rest):
                self._head += tokenizer.encode_plain([constant])[0]
                self._template = rest
                break
        self.label_tokens = self._first_tokens(after)

    def encode(self, claims: Sequence[Claim]) -> list[list[int]]:
        """One list of token ids per claim, in order."""
        texts = [self._fill(self._template, claim.text, claim.evidence) for claim in claims]
        return [self._head + middle + self._tail for middle in self._tokenizer.encode_plain(texts)]

    def _fill(self, template: str, claim: str, evidence: str | None) -> str:
        return template.format(claim=claim, evidence=evidence or self.spec.no_evidence)

    def _cuts_cleanly(self, constant: str, template: str) -> bool:
        """Whether encoding in two pieces is encoding the whole; some tokenizers prepend a space."""
        (first,) = self._tokenizer.encode_plain([constant])
        for start in ("", " ", "\n", "\n\n\n"):  # a claim may begin with any of these
            variable = self._fill(template, f"{start}A claim.", f"{start}Evidence.")
            together, second = self._tokenizer.encode_plain([constant + variable, variable])
            if together != first + second:
                return False
        return True

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


def _split(spec: PromptSpec) -> tuple[str, str, str]:
    """The instructions and examples; what the template begins with on lines that no claim can
    change (both as plain text); and the rest of the template.
    """
    shown = [
        spec.template.format(claim=e.claim, evidence=e.evidence or spec.no_evidence)
        + " "
        + next(label.word for label in spec.labels if label.name == spec.label_of(e.label))
        for e in spec.examples
    ]
    preamble = "".join(f"{part}\n\n" for part in (spec.instructions, *shown) if part)
    literal, _, _, _ = next(iter(Formatter().parse(spec.template)))
    lead = literal[: literal.rfind("\n") + 1]
    return preamble, lead, spec.template[len(_escaped(lead)) :]


def _escaped(text: str) -> str:
    """Text as part of a template, where a brace counts twice."""
    return text.replace("{", "{{").replace("}", "}}")
