"""A model's tokenizer. The text of a claim can never become a special token."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import Lock
from typing import Any

from jinja2 import TemplateError, meta
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment
from pydantic import BaseModel
from tokenizers import AddedToken, Encoding, Tokenizer, models
from tokenizers.decoders import DecodeStream

from services.contracts import ContextSpec
from services.contracts.errors import ModelError
from services.models.files import model_file

_SENTENCEPIECE_SPACE = "\u2581"
_CONTENT = "KEEPWARM CONTENT GOES HERE"
_STANDARD_VARIABLES = {
    *("messages", "add_generation_prompt", "bos_token", "eos_token"),
    *("raise_exception", "strftime_now", "tools", "documents"),
}
_ANSWER = "KEEPWARM ANSWER GOES HERE"


class _Unigram(BaseModel):
    unk_id: int | None = None


class _Definition(BaseModel):
    """The part of tokenizer.json that the library does not expose."""

    model: _Unigram


class ModelTokenizer:
    """A model's tokenizer, for trusted text (chat mark-up) and for text from claims.

    In trusted text `<|im_end|>` is one special token; in a claim it is ten characters. Both modes
    use one `Tokenizer`, since loading a vocabulary twice would delay the worker's start; a lock
    keeps a thread from changing the mode while another encodes.
    """

    def __init__(
        self, definition: bytes, configuration: dict[str, Any], chat_template: str | None
    ) -> None:
        self._tokenizer = Tokenizer.from_buffer(definition)
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        # Make all mark-up special, so that `encode_special_tokens` applies to `<tool_call>` too.
        self._tokenizer.add_special_tokens(
            [added for added in self._added().values() if _is_unmarked_mark_up(added)]
        )
        self._tokenizer.encode_special_tokens = True
        self._in_use = Lock()
        unknown = self._unknown(definition)
        mark_up = {
            number: added.content
            for number, added in self._added().items()
            # Any character that is not in the vocabulary becomes the unknown token.
            if added.special and added.content != unknown
        }
        self._special_ids = frozenset(mark_up)
        # Matches the position after the first character of any mark-up.
        self._inside_mark_up = re.compile(
            "|".join(
                f"(?<={re.escape(text[0])})(?={re.escape(text[1:])})"
                for text in mark_up.values()
                if len(text) > 1
            )
            or r"(?!)"
        )
        self._mark_up = re.compile(
            "|".join(re.escape(added.content) for added in self._added().values() if added.special)
            or r"(?!)"
        )
        self._configuration = configuration
        self._chat_template = chat_template

    @classmethod
    def load(cls, spec: ContextSpec) -> "ModelTokenizer":
        """Load a model's tokenizer. Raises ModelError if it has no fast one or it is unreadable."""
        definition = model_file(spec, "tokenizer.json")
        if definition is None:
            raise ModelError(
                f"{spec.model} has no tokenizer.json; convert its tokenizer with transformers "
                "(AutoTokenizer.from_pretrained(…, use_fast=True).save_pretrained(…))"
            )
        configuration_file = model_file(spec, "tokenizer_config.json")
        template_file = model_file(spec, "chat_template.jinja")
        try:
            configuration = (
                json.loads(configuration_file.read_bytes()) if configuration_file else {}
            )
            template = (
                template_file.read_text(encoding="utf-8")
                if template_file
                else _named_default(configuration.get("chat_template"))
            )
            return cls(definition.read_bytes(), configuration, template)
        except Exception as error:  # tokenizers raises plain Exception
            raise ModelError(f"the tokenizer of {spec.model} cannot be read: {error}") from error

    def _added(self) -> dict[int, AddedToken]:
        added: dict[int, AddedToken] = self._tokenizer.get_added_tokens_decoder()
        return added

    def _unknown(self, definition: bytes) -> str | None:
        """The unknown token, which unigram models give by its index."""
        if not isinstance(self._tokenizer.model, models.Unigram):
            return getattr(self._tokenizer.model, "unk_token", None)
        index = _Definition.model_validate_json(definition).model.unk_id
        return None if index is None else self._tokenizer.id_to_token(index)

    def encode_trusted(self, text: str, *, begin: bool = False) -> list[int]:
        """Encode our own text, with special tokens. `begin` adds those that begin a text."""
        with self._parsing_special_tokens():
            # As a batch: `encode` would keep all other threads from running.
            (encoding,) = self._tokenizer.encode_batch_fast([text], add_special_tokens=begin)
            return list(encoding.ids)

    def encode_plain(self, texts: list[str]) -> list[list[int]]:
        """Encode untrusted texts, without any special token. Uses all cores for many texts."""
        encodings = self._encode_as_characters(texts)
        return [
            ids
            if self._special_ids.isdisjoint(ids := encoding.ids)
            else self._encode_without_special(text)
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def encode_between(self, before: str, texts: list[str], after: str) -> list[list[int]]:
        """Encode each untrusted text together with our own before and after it, so that tokens may
        span the boundaries. Only our own text yields special tokens.
        """
        with self._parsing_special_tokens():
            encodings = self._tokenizer.encode_batch_fast(
                [before + text + after for text in texts], add_special_tokens=False
            )
        ours = self.encode_trusted(before), self.encode_trusted(after)
        expected = sum(map(self._count_special, ours))
        return [
            encoding.ids
            if not self._mark_up.search(text) and self._count_special(encoding.ids) == expected
            else ours[0] + self.encode_plain([text])[0] + ours[1]
            for text, encoding in zip(texts, encodings, strict=True)
        ]

    def _count_special(self, ids: list[int]) -> int:
        return sum(token in self._special_ids for token in ids)

    @contextmanager
    def _parsing_special_tokens(self) -> Iterator[None]:
        with self._in_use:
            self._tokenizer.encode_special_tokens = False
            try:
                yield
            finally:
                self._tokenizer.encode_special_tokens = True

    def _encode_as_characters(self, texts: list[str]) -> list[Encoding]:
        with self._in_use:
            return list(self._tokenizer.encode_batch_fast(texts, add_special_tokens=False))

    def _encode_without_special(self, text: str) -> list[int]:
        """Encode a text in which an ordinary piece is a special token (`</s>` in a unigram model):
        mark-up is split after its first character, and remaining special tokens are left out.
        """
        pieces = [piece for piece in self._inside_mark_up.split(text) if piece]
        return [
            token
            for encoding in self._encode_as_characters(pieces)
            for token in encoding.ids
            if token not in self._special_ids
        ]

    def text(self, tokens: list[int]) -> str:
        """The text of tokens, special ones included."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False))

    def pieces(self, tokens: Sequence[int]) -> list[str]:
        """The text that each token adds to the text before it, special ones included. A token that
        is only a part of a character adds "", and the last of its tokens the whole character.
        """
        stream = DecodeStream(skip_special_tokens=False)
        return [stream.step(self._tokenizer, token) or "" for token in tokens]

    def chat_frame(self, variables: Mapping[str, Any] | None = None) -> tuple[str, str] | None:
        """The text that the model's chat template puts before and after a user's message, up to the
        assistant's answer; None if the model has no chat template. `variables` are passed to the
        template, such as `enable_thinking`.

        White space before the answer is taken from a rendered answer: Llama 2 and Mistral have a
        space there that the generation prompt does not have.
        Raises ModelError if the template cannot be used this way, or has no such variable.
        """
        variables = variables or {}
        if self._chat_template is None:
            if variables:
                raise ModelError(
                    "the model has no chat template, so `chat_template_kwargs` in the prompt file "
                    "have no effect; remove them"
                )
            return None
        question = {"role": "user", "content": _CONTENT}
        try:
            text = self._render([question], variables, add_generation_prompt=True)
        except Exception as error:  # a template is a program and can raise anything
            raise ModelError(
                f"the model's chat template cannot be rendered ({error}); set `chat: false` in the "
                "prompt file"
            ) from error
        unknown = sorted(variables.keys() - self._template_variables())
        if unknown:
            raise ModelError(
                f"the model's chat template knows no variable {unknown[0]!r}; it knows: "
                f"{', '.join(sorted(self._template_variables())) or 'none'}. Correct "
                "`chat_template_kwargs` in the prompt file"
            )
        before, found, after = text.partition(_CONTENT)
        if not found or _CONTENT in after:
            raise ModelError(
                "the model's chat template does not show a user's turn exactly once; set "
                "`chat: false` in the prompt file"
            )
        try:
            answer = {"role": "assistant", "content": _ANSWER}
            answered = self._render([question, answer], variables)
        except Exception:
            return before, after  # the template does not render answers
        _, _, rest = answered.partition(_CONTENT)
        turn, found, _ = rest.partition(_ANSWER)
        return before, turn if found and turn.rstrip() == after.rstrip() else after

    def _template_variables(self) -> set[str]:
        """The variables that the template reads, except those that every template is given."""
        assert self._chat_template is not None
        asked = meta.find_undeclared_variables(_environment().parse(self._chat_template))
        return asked - _STANDARD_VARIABLES

    def _render(
        self,
        messages: list[dict[str, str]],
        variables: Mapping[str, Any],
        *,
        add_generation_prompt: bool = False,
    ) -> str:
        environment = _environment()
        environment.globals["raise_exception"] = _raise
        environment.globals["strftime_now"] = lambda _format: ""  # a prompt must not change daily
        environment.filters["tojson"] = lambda value, **_: json.dumps(value, ensure_ascii=False)
        assert self._chat_template is not None
        return environment.from_string(self._chat_template).render(
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            bos_token=self._special("bos_token"),
            eos_token=self._special("eos_token"),
            **variables,
        )

    def _special(self, name: str) -> str:
        token = self._configuration.get(name) or ""
        return str(token["content"]) if isinstance(token, dict) else str(token)


def _environment() -> ImmutableSandboxedEnvironment:
    return ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )


def _is_unmarked_mark_up(added: AddedToken) -> bool:
    """Whether an added token is mark-up that is not marked special. Runs of white space are not."""
    text = added.content.replace(_SENTENCEPIECE_SPACE, " ")
    return not added.special and bool(text.strip())


def _named_default(template: Any) -> str | None:
    if isinstance(template, list):  # some models have several named templates
        return next((t["template"] for t in template if t.get("name") == "default"), None)
    return template if isinstance(template, str) else None


def _raise(message: str) -> None:
    raise TemplateError(message)
