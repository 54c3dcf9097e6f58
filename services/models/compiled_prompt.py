"""A prompt compiled for one tokenizer: turns claims into token ids, label words into tokens."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from string import Formatter

from services.contracts import Claim, PromptSpec
from services.contracts.errors import ModelError
from services.models.tokenizer import ModelTokenizer

_SHORTEST = Claim(claim_id="shortest", position=0, text="x", evidence="x")


@dataclass(frozen=True, slots=True)
class Token:
    """A token, and the text that it adds to the text before it."""

    id: int
    text: str


@dataclass(frozen=True, slots=True)
class RenderedPrompt:
    """The prompt of one claim as the engine gets it."""

    text: str
    tokens: tuple[Token, ...]
    label_tokens: tuple[tuple[Token, ...], ...]
    """For each label of the prompt, in order: the tokens that are scored for it, one for each of
    its spellings."""


class CompiledPrompt:
    """A `PromptSpec` under a tokenizer.

    The constant part is encoded once and comes first, so that the engine's prefix cache holds it.
    `label_tokens` are the tokens whose probabilities are requested from the engine: the first token
    of each label word, in the order of `spec.labels`. In a chat each label may have a second
    spelling; those tokens follow in the same order, and `scores` adds the two probabilities. If
    the prompt reasons first, the engine gets a second prompt, `after_reasoning`, to score them.
    """

    def __init__(self, spec: PromptSpec, tokenizer: ModelTokenizer) -> None:
        """Raises ModelError when two label words start with the same token."""
        self.spec = spec
        self._tokenizer = tokenizer
        frame = tokenizer.chat_frame(dict(spec.chat_template_kwargs)) if spec.chat else None
        before, turn = frame or ("", "")
        self._plain = not turn
        self.in_chat = frame is not None
        """Whether the text is a turn in the model's chat template."""
        # Prompt files are corrected when they are read; a prompt in a message may not be.
        template = spec.template.rstrip() if self._plain else spec.template
        preamble, lead, template = _split(spec.model_copy(update={"template": template}))
        others: tuple[int, ...] = ()
        self._until = "" if spec.reasoning is None else spec.reasoning.until
        self._until_tokens = tokenizer.encode_trusted(self._until) if self._until else []
        if self._until:
            # The model begins its turn itself: the space before an answer is its own.
            after = turn.rstrip(" ")
            first_tokens = self._first_tokens(self._until, "" if self._until[-1] == "\n" else " ")
        elif self._plain:
            after = ""
            # The end of a claim must not decide how a label word is tokenized, so a full stop
            # stands for it.
            first_tokens = self._first_tokens(template.rsplit("}", 1)[-1] or ".", " ")
        else:
            after, first_tokens = self._cut(turn)
            if after == turn:
                others = self._other_spellings(first_tokens)
        self.label_tokens = (*first_tokens, *others)
        text = preamble + lead
        self._before, self._after = before, after
        self._template = _escaped(text) + template
        self._encode_whole = frame is not None and not self._frame_cuts_cleanly()
        # The text of a chat template already contains the begin-of-text token, if there is one.
        self._head = tokenizer.encode_trusted(before, begin=frame is None)
        self._tail = tokenizer.encode_trusted(after)
        if not self._encode_whole:
            self._encode_constant(text, template)
        (shortest,) = self.encode([_SHORTEST])
        self.least_tokens = len(shortest)
        """The tokens of the shortest possible prompt: those of its instructions and examples."""
        self.reserved_tokens = 1 + len(self._until_tokens)
        """The most tokens that may follow a prompt: those of the reasoning, and the answer's."""
        if spec.reasoning is not None:
            self.reserved_tokens += spec.reasoning.max_tokens

    def _encode_constant(self, text: str, template: str) -> None:
        """Move the constant start of all prompts into `_head`."""
        # Tokenizers join white space to the text after it (GPT-2) or to the full stop before it
        # (Llama 3). If neither cut gives the same tokens, the whole is encoded for every claim.
        for constant in (text, text.rstrip()):
            rest = _escaped(text[len(constant) :]) + template
            if constant and self._cuts_cleanly(constant, rest):
                self._head += self._tokenizer.encode_plain([constant])[0]
                self._template = rest
                break

    def encode(self, claims: Sequence[Claim]) -> list[list[int]]:
        """One list of token ids per claim, in order."""
        texts = [self._fill(self._template, claim.text, claim.evidence) for claim in claims]
        if self._encode_whole:
            return self._tokenizer.encode_between(self._before, texts, self._after)
        return [self._head + middle + self._tail for middle in self._tokenizer.encode_plain(texts)]

    def render(self, claim: Claim) -> RenderedPrompt:
        """The claim's prompt in text and tokens, for people."""
        (ids,) = self.encode([claim])
        texts = self._tokenizer.pieces(ids)
        before = [*ids, *self._until_tokens]
        scored = [
            Token(token, self._tokenizer.pieces([*before, token])[-1])
            for token in self.label_tokens
        ]
        labels = len(self.spec.labels)
        return RenderedPrompt(
            text=self._tokenizer.text(ids),
            tokens=tuple(map(Token, ids, texts)),
            label_tokens=tuple(tuple(scored[label::labels]) for label in range(labels)),
        )

    def after_reasoning(
        self, prompt: Sequence[int], written: Sequence[int]
    ) -> tuple[list[int], str]:
        """The prompt after which the label words are scored, at most `reserved_tokens` - 1 longer
        than `prompt`, and the text of the reasoning, which ends before `until`. `written` are the
        tokens that the model wrote after `prompt`.
        """
        pieces = self._tokenizer.pieces(written)
        text = "".join(pieces)
        found = text.find(self._until)
        if found < 0:
            return [*prompt, *written, *self._until_tokens], text
        kept = length = 0
        for count, piece in enumerate(pieces, 1):
            if length + len(piece) > found:
                break
            length += len(piece)
            if piece:  # else it is a part of the next character
                kept = count
        # A token may hold the end of the reasoning and the start of `until`: it is divided.
        end = self._until_tokens
        if length < found:
            (divided,) = self._tokenizer.encode_between("", [text[length:found]], self._until)
            if kept + len(divided) <= len(written) + len(end):
                end = divided
        return [*prompt, *written[:kept], *end], text[:found]

    def scores(self, logprobs: Sequence[float]) -> tuple[float, ...]:
        """The log probability of each label, from those of `label_tokens`."""
        labels = len(self.spec.labels)
        firsts, others = logprobs[:labels], logprobs[labels:]
        if not others:
            return tuple(firsts)
        return tuple(_log_sum(first, other) for first, other in zip(firsts, others, strict=True))

    def _fill(self, template: str, claim: str, evidence: str | None) -> str:
        text = template.format(claim=claim, evidence=evidence or self.spec.no_evidence)
        # If the template ends in a claim or in evidence, their white space ends the prompt.
        return text.rstrip() if self._plain else text

    def _cuts_cleanly(self, constant: str, template: str) -> bool:
        """Whether the two parts, encoded separately, give the tokens of the whole. They do not if
        the tokenizer prepends a space to each text.
        """
        (first,) = self._tokenizer.encode_plain([constant])
        for start in ("", " ", "\n", "\n\n\n"):  # a claim may begin with any of these
            variable = self._fill(template, f"{start}A claim.", f"{start}Evidence.")
            together, second = self._tokenizer.encode_plain([constant + variable, variable])
            if together != first + second:
                return False
        return True

    def _frame_cuts_cleanly(self) -> bool:
        """Whether the chat's frame and the text, encoded separately, give the tokens of the whole.
        They do not if the tokenizer prepends a space to each text (Llama 2, Mistral).
        """
        apart = self._tokenizer.encode_trusted
        for start in ("", " ", "\n"):
            text = self._fill(self._template, f"{start}A claim.", f"{start}Evidence.")
            pieces = [
                *apart(self._before),
                *self._tokenizer.encode_plain([text])[0],
                *apart(self._after),
            ]
            if self._tokenizer.encode_between(self._before, [text], self._after) != [pieces]:
                return False
        return True

    def _cut(self, turn: str) -> tuple[str, tuple[int, ...]]:
        """The part of the assistant's turn that belongs to the prompt, and the first token of each
        label word after it.

        White space that is part of a word's first token (` True`) stays out of the prompt: after a
        prompt that ends in that space, the model would not generate the token.
        """
        bare = turn.rstrip()
        words = [label.word for label in self.spec.labels]
        for end in range(len(turn), len(bare) - 1, -1):
            tokens = [self._follows(turn[:end], turn[end:] + word) for word in words]
            if None not in tokens and len(set(tokens)) == len(words):
                return turn[:end], tuple(token for token in tokens if token is not None)
        return turn, self._first_tokens(turn, "")

    def _first_tokens(self, before: str, space: str) -> tuple[int, ...]:
        """The first token of each label word after `before`. Raises ModelError if two are equal."""
        tokens: list[int] = []
        for label in self.spec.labels:
            token = self._follows(before, space + label.word)
            if token is None:
                # The tokenizer joins the word to the text before it.
                token = self._tokenizer.encode_trusted(space + label.word)[0]
            if token in tokens:
                earlier = self.spec.labels[tokens.index(token)]
                raise ModelError(
                    f"prompt {self.spec.name!r}: the label words {earlier.word!r} "
                    f"({earlier.name}) and {label.word!r} ({label.name}) start with the same token "
                    f"{self._tokenizer.text([token])!r} under this model's tokenizer, so one "
                    "token cannot tell them apart; choose words that begin differently"
                )
            tokens.append(token)
        return tuple(tokens)

    def _follows(self, before: str, text: str) -> int | None:
        """The first token of `text` after `before`; None if a token spans the two."""
        ids = self._tokenizer.encode_trusted(before)
        together = self._tokenizer.encode_trusted(before + text)
        begins = len(together) > len(ids) and together[: len(ids)] == ids
        return together[len(ids)] if begins else None

    def _other_spellings(self, first_tokens: tuple[int, ...]) -> tuple[int, ...]:
        """The first tokens of the label words as separate texts, if they differ from those in turn.

        A tokenizer that prepends a space to each text has tokens for both `True` and ` True`. If
        the chat template has no space before the answer, the model may have been trained on either,
        because answers were often encoded separately from their questions. Empty if these tokens do
        not distinguish the labels.
        """
        encoded = [self._tokenizer.encode_trusted(label.word)[:1] for label in self.spec.labels]
        others = tuple(token for ids in encoded for token in ids)
        clashes = set(others) & set(first_tokens) or len(set(others)) < len(first_tokens)
        blank = any(not self._tokenizer.text([token]).strip() for token in others)
        return () if clashes or blank else others


def _log_sum(first: float, other: float) -> float:
    """log(exp(first) + exp(other)), without overflow."""
    high, low = max(first, other), min(first, other)
    return high + math.log1p(math.exp(low - high))


def _split(spec: PromptSpec) -> tuple[str, str, str]:
    """Split a prompt into its instructions and examples, the first lines of the template that
    contain no field (both as plain text), and the rest of the template.
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
    """Text as part of a format template, with doubled braces."""
    return text.replace("{", "{{").replace("}", "}}")
