"""Small real tokenizers of the common families."""

import json

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

from services.contracts import PromptSpec

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


LLAMA_2_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
"""Llama 2's and Mistral's, without their system turns: an answer stands after a space."""

MISTRAL_1_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}{% endfor %}"
)
"""That of Mistral 7B's first version: an answer stands after nothing, in the template."""

_SPOKEN = "True False Unknown Judge by the evidence Evidence Claim Answer [INST] [/INST] A claim"


def _sentencepiece(special: list[str]) -> Tokenizer:
    """BPE as SentencePiece makes it: words with their spaces, single characters, and bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always", split=True),
            pre_tokenizers.Split("(", "isolated"),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=1_200,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=list("\u2581abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.:[]/"),
        show_progress=False,
    )
    # With a space before them and without: `True` after a bracket is a token, too.
    words = [*_SPOKEN.split(), "(True", "(False", "(Unknown"]
    tokenizer.train_from_iterator(words * 5, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    definition = json.loads(tokenizer.to_str())
    definition["added_tokens"] = definition["added_tokens"][: len(special)]
    return Tokenizer.from_str(json.dumps(definition))


def llama_2() -> Tokenizer:
    """As Llama 2's own file: spaces are made and put before each piece of text by a normalizer."""
    tokenizer = _sentencepiece(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    definition = json.loads(tokenizer.to_str())
    definition["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(definition))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def mistral_3() -> Tokenizer:
    """As Mistral 7B's third version: its brackets are mark-up; a space stands before a whole text
    alone.
    """
    tokenizer = _sentencepiece(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer
