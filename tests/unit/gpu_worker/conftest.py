"""Small real tokenizers of the common families, a model's directory, and a batch."""

import json
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from tokenizers.pre_tokenizers import PreTokenizer

from services.broker import Delivery, Outgoing
from services.contracts import Claim, ClaimBatch, PromptSpec, Run, encode, topology
from services.gpu_worker import ModelTokenizer

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TEXTS = [
    f"{PromptSpec().instructions}\n\nEvidence: none\nClaim: The quick brown fox.\nAnswer: {word}"
    for word in ("True", "False", "Unknown", "True", "False", "Unknown")
] + [
    "one\n\n\ntwo\n\n\n\nthree  four\n\n\n\n\nsix. Seven.\n\n\nEight.\n\n\n\nNine.\n\nTen.\n",
    "True\nFalse\nUnknown\n",
] * 5


# How Llama 3 splits a text, from its tokenizer.json.
LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_level() -> Tokenizer:
    """As GPT-2 and SmolLM2: bytes, and white space goes to what follows."""
    return bytes_split_by(pre_tokenizers.ByteLevel(add_prefix_space=False))


def llama_3() -> Tokenizer:
    """As Llama 3 and Qwen: bytes, and ends of lines go to the full stop before them."""
    split = pre_tokenizers.Split(Regex(LLAMA_3), "isolated")
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return bytes_split_by(pre_tokenizers.Sequence([split, whole]))


def bytes_split_by(pre_tokenizer: PreTokenizer) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    # Mark-up that the model's makers did not call special.
    tokenizer.add_tokens(["<tool_call>", "</think>"])
    return tokenizer


def metaspace() -> Tokenizer:
    """As Llama 2 and Mistral: a space is put before the text, bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    trainer = trainers.BpeTrainer(
        vocab_size=1_000,
        special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    words = [" True", " False", " Unknown", "Claim:", "Evidence: none"]
    tokenizer.train_from_iterator(words * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    # The bytes are vocabulary, not mark-up.
    definition = json.loads(tokenizer.to_str())
    definition["added_tokens"] = definition["added_tokens"][:3]
    return Tokenizer.from_str(json.dumps(definition))


def gemma() -> Tokenizer:
    """As Gemma: runs of spaces and HTML tags are added tokens, and reached by merging as well."""
    pieces = [
        *("<bos>", "<eos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))),
        *("\u2581", *"abcdeghilnorstuvwxyz", *"ABCDEFKTU", *"</>.:"),
        *("\u2581\u2581", "<b", "<b>", "\u2581T", "\u2581F", "\u2581U"),
    ]
    merges = [("\u2581", "\u2581"), ("<", "b"), ("<b", ">")]
    merges += [("\u2581", letter) for letter in "TFU"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: number for number, piece in enumerate(pieces)},
            merges=merges,
            unk_token="<unk>",
            byte_fallback=True,
            fuse_unk=True,
        )
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_special_tokens(["<bos>", "<eos>", "<unk>"])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in ("\u2581\u2581", "<b>")])
    return tokenizer


def unigram() -> Tokenizer:
    """As T5, XLNet and ALBERT: the likeliest pieces, among which the special ones stand as well."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200,
        special_tokens=["<unk>", "<s>", "</s>"],
        unk_token="<unk>",
        show_progress=False,
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


@pytest.fixture(scope="session")
def definitions() -> dict[str, bytes]:
    """A `tokenizer.json` of each family."""
    families: dict[str, Callable[[], Tokenizer]] = {
        "byte-level": byte_level,
        "llama-3": llama_3,
        "metaspace": metaspace,
        "gemma": gemma,
        "unigram": unigram,
    }
    return {name: make().to_str().encode() for name, make in families.items()}


@pytest.fixture(scope="session")
def raw(definitions: dict[str, bytes]) -> dict[str, Tokenizer]:
    """The same tokenizers without Keepwarm, to compare with."""
    return {name: Tokenizer.from_buffer(definition) for name, definition in definitions.items()}


@pytest.fixture(scope="session")
def tokenizers(definitions: dict[str, bytes]) -> dict[str, ModelTokenizer]:
    """Of each family; those of bytes have a chat template."""
    with_chat = ("byte-level", "llama-3")
    return {
        name: ModelTokenizer(definition, {}, CHAT_TEMPLATE if name in with_chat else None)
        for name, definition in definitions.items()
    }


@pytest.fixture(scope="session")
def tokenizer(tokenizers: dict[str, ModelTokenizer]) -> ModelTokenizer:
    return tokenizers["byte-level"]


@pytest.fixture
def model_dir(tmp_path: Path, definitions: dict[str, bytes]) -> Path:
    """All of a model but its weights."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "tokenizer.json").write_bytes(definitions["byte-level"])
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory


@pytest.fixture(scope="session")
def batch(run: Run) -> ClaimBatch:
    return ClaimBatch(
        run=run,
        submission_id="sub-1",
        batch_id="00000000-0",
        claims=tuple(
            Claim(claim_id=f"c{n}", position=n, text=f"Claim {n}.", evidence=f"Evidence {n}.")
            for n in range(7)
        ),
    )


class RecordingBroker:
    """Consumer and publisher in one: what was settled and published. Confirms when told to."""

    def __init__(self) -> None:
        self.settled: list[tuple[str, int]] = []
        self.messages: list[Outgoing] = []

    def acknowledge(self, deliveries: Iterable[Delivery]) -> None:
        self.settled += [("acknowledged", delivery.tag) for delivery in deliveries]

    def give_back(self, deliveries: Iterable[Delivery]) -> None:
        self.settled += [("given back", delivery.tag) for delivery in deliveries]

    def publish(self, message: Outgoing) -> None:
        self.messages.append(message)

    def confirm(self, message: Outgoing) -> None:
        assert message.on_confirmed is not None
        message.on_confirmed()

    def to(self, queue: str) -> list[Outgoing]:
        return [message for message in self.messages if message.routing_key == queue]


@pytest.fixture
def broker() -> RecordingBroker:
    return RecordingBroker()


def delivered(
    batch: ClaimBatch, *, earlier: int = 0, failures: int = 0, **changes: object
) -> Delivery:
    """The batch as the broker hands it over, with `earlier` deliveries before this one."""
    delivery = Delivery(
        queue=topology.claims_queue(batch.run.context.context_id),
        body=encode(batch),
        headers={"x-delivery-count": earlier, topology.FAILURES_HEADER: failures},
        message_id="m-1",
        redelivered=earlier > 0,
        tag=7,
        epoch=1,
        kind="ClaimBatch",
    )
    return replace(delivery, **changes)  # type: ignore[arg-type]


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Shorter than pytest's own: engines' sockets are made here, and a path may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="kw-") as name:
        yield Path(name)
