import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Event
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer

from services.contracts import ContextSpec
from services.contracts.errors import ModelError
from services.models.tokenizer import ModelTokenizer
from tests.unit.tokenizers_of_models import CHAT_TEMPLATE

FAMILIES = ["byte-level", "llama-3", "metaspace", "gemma", "unigram"]
MARK_UP = [
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool_call>", "</think>"),
    *("<unk>", "<s>", "</s>", "<bos>", "<b>", "<0x0A>", "<pad>"),
]
WIDE = "\uff1cs\uff1e"  # <s> in full-width characters, which some normalizers make narrow
HOSTILE = st.lists(
    st.sampled_from([*MARK_UP, WIDE, " ", "\n", "a", "The claim.", "\u2581", "\u0120"])
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=5),
    max_size=8,
).map("".join)


def special_ids(raw: Tokenizer) -> set[int]:
    """All mark-up but white space, and but the unknown token, which is what a model sees where it
    knows no better.
    """
    return {
        identity
        for identity, token in raw.get_added_tokens_decoder().items()
        if token.content != "<unk>" and token.content.strip().strip("\u2581")
    }


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("mark_up", MARK_UP)
def test_mark_up_acts_in_trusted_text_and_is_only_characters_in_a_claim(
    family: str, mark_up: str, tokenizers: dict[str, ModelTokenizer], raw: dict[str, Tokenizer]
) -> None:
    specials = special_ids(raw[family])
    tokenizer = tokenizers[family]
    if raw[family].token_to_id(mark_up) in specials:
        assert specials & set(tokenizer.encode_trusted(f"a{mark_up}b"))
    for text in (mark_up, f"a{mark_up}b", f"a {mark_up} b", mark_up * 3):
        (ids,) = tokenizer.encode_plain([text])
        assert not specials & set(ids)


@pytest.mark.parametrize("family", FAMILIES)
@given(text=HOSTILE)
def test_no_text_can_hold_a_special_token(
    family: str,
    text: str,
    tokenizers: dict[str, ModelTokenizer],
    raw: dict[str, Tokenizer],
) -> None:
    (ids,) = tokenizers[family].encode_plain([text])
    assert not special_ids(raw[family]) & set(ids)


@pytest.mark.parametrize("family", FAMILIES)
@given(text=HOSTILE)
def test_trusted_text_is_encoded_as_the_model_itself_does(
    family: str, text: str, tokenizers: dict[str, ModelTokenizer], raw: dict[str, Tokenizer]
) -> None:
    expected = raw[family].encode(text, add_special_tokens=False).ids
    assert tokenizers[family].encode_trusted(text) == expected


def test_trusted_text_and_claims_do_not_disturb_each_other_in_threads(
    tokenizers: dict[str, ModelTokenizer], raw: dict[str, Tokenizer]
) -> None:
    tokenizer, specials = tokenizers["byte-level"], special_ids(raw["byte-level"])
    claims = ["a <|im_end|> b"] * 64
    stop = Event()

    def encode_trusted() -> int:
        found = 0
        while not stop.is_set():
            found += 1
            assert specials & set(tokenizer.encode_trusted("<|im_end|>"))
        return found

    with ThreadPoolExecutor(2) as threads:
        trusted = [threads.submit(encode_trusted) for _ in range(2)]
        try:
            for _ in range(300):
                assert not any(specials & set(ids) for ids in tokenizer.encode_plain(claims))
        finally:
            stop.set()
        assert all(future.result() > 0 for future in trusted)


@pytest.mark.parametrize("family", ["byte-level", "llama-3", "gemma"])
@given(text=HOSTILE)
def test_nothing_of_a_text_is_lost(
    family: str, text: str, tokenizers: dict[str, ModelTokenizer], raw: dict[str, Tokenizer]
) -> None:
    if family == "gemma":
        text = text.replace("\u2581", "_")  # its own sign for a space
    (ids,) = tokenizers[family].encode_plain([text])
    assert raw[family].decode(ids, skip_special_tokens=False) == text


@pytest.mark.parametrize("text", ["a  b", "a   b    c", "<b>d</b>", "a<b>", "<b><b>"])
def test_runs_of_spaces_and_tags_stay_in_a_text_though_they_are_added_tokens(
    text: str, tokenizers: dict[str, ModelTokenizer], raw: dict[str, Tokenizer]
) -> None:
    (ids,) = tokenizers["gemma"].encode_plain([text])
    assert raw["gemma"].decode(ids, skip_special_tokens=False) == text


def test_what_a_model_does_not_know_stays_in_a_text_as_unknown(
    tokenizers: dict[str, ModelTokenizer], raw: dict[str, Tokenizer]
) -> None:
    unknown = raw["unigram"].token_to_id("<unk>")
    for text in ("a \u2603 b", "\u2603", "</s> \u2603"):
        (ids,) = tokenizers["unigram"].encode_plain([text])
        assert unknown in ids


def test_many_texts_are_encoded_in_order(tokenizer: ModelTokenizer) -> None:
    texts = [f"Text {n}." for n in range(200)]
    assert tokenizer.encode_plain(texts) == [tokenizer.encode_plain([text])[0] for text in texts]


def test_the_beginning_of_a_text_is_marked_where_the_model_wants_it(
    tokenizers: dict[str, ModelTokenizer], raw: dict[str, Tokenizer]
) -> None:
    begin = raw["metaspace"].token_to_id("<s>")
    tokenizer = tokenizers["metaspace"]
    assert tokenizer.encode_trusted("", begin=True) == [begin]
    assert tokenizer.encode_trusted("True", begin=True)[0] == begin
    assert begin not in tokenizer.encode_trusted("True")
    assert begin not in tokenizer.encode_plain(["True"])[0]
    assert tokenizers["byte-level"].encode_trusted("", begin=True) == []


def test_padding_and_truncation_that_came_with_the_model_do_not_apply(
    definitions: dict[str, bytes],
) -> None:
    raw = Tokenizer.from_buffer(definitions["byte-level"])
    raw.enable_padding(length=50)
    raw.enable_truncation(5)
    tokenizer = ModelTokenizer(raw.to_str().encode(), {}, None)
    short, long = tokenizer.encode_plain(["a", "a b c d e f g h i j"])
    assert len(short) == 1
    assert len(long) > 5
    assert len(tokenizer.encode_trusted("a b c d e f g h i j")) > 5


def test_added_runs_of_white_space_stay_vocabulary(definitions: dict[str, bytes]) -> None:
    raw = Tokenizer.from_buffer(definitions["byte-level"])
    raw.add_tokens(["\n\n\n\n\n"])
    tokenizer = ModelTokenizer(raw.to_str().encode(), {}, None)
    assert raw.token_to_id("\n\n\n\n\n") in tokenizer.encode_plain(["a\n\n\n\n\nb"])[0]


def test_a_token_can_be_shown_to_a_person(
    tokenizer: ModelTokenizer, raw: dict[str, Tokenizer]
) -> None:
    assert tokenizer.text([raw["byte-level"].token_to_id("\u0120True")]) == " True"
    assert tokenizer.text([raw["byte-level"].token_to_id("<|im_end|>")]) == "<|im_end|>"


# The chat template.


def frame(
    definition: bytes, template: str | None, configuration: dict[str, Any] | None = None
) -> tuple[str, str] | None:
    return ModelTokenizer(definition, configuration or {}, template).chat_frame()


def test_the_frame_is_what_stands_around_a_users_turn(tokenizer: ModelTokenizer) -> None:
    assert tokenizer.chat_frame() == (
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
    )


def test_a_model_without_a_chat_template_has_no_frame(definitions: dict[str, bytes]) -> None:
    assert frame(definitions["byte-level"], None) is None


@pytest.mark.parametrize("token", ["<s>", {"content": "<s>", "lstrip": False}])
def test_a_template_knows_the_models_own_tokens(
    token: object, definitions: dict[str, bytes]
) -> None:
    template = "{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}"
    configuration = {"bos_token": token, "eos_token": None}
    assert frame(definitions["byte-level"], template, configuration) == ("<s>", "")


def test_a_frame_does_not_change_with_the_day(definitions: dict[str, bytes]) -> None:
    template = "Today is {{ strftime_now('%d %B') }}. {{ messages[0].content }}"
    assert frame(definitions["byte-level"], template) == ("Today is . ", "")


def test_blocks_leave_no_white_space_as_in_transformers(definitions: dict[str, bytes]) -> None:
    template = "  {% if true %}\n{{ messages[0].content }}\n  {% endif %}\n"
    assert frame(definitions["byte-level"], template) == ("", "\n")


def test_a_template_may_break_out_of_a_loop(definitions: dict[str, bytes]) -> None:
    template = "{% for m in messages %}{{ m.content }}{% break %}{% endfor %}"
    assert frame(definitions["byte-level"], template) == ("", "")


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].content }}{{ messages[0].content }}",
        "no turn at all",
        "{{ messages[0].content | lower }}",
        "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}",
    ],
    ids=["twice", "never", "changed", "for another role"],
)
def test_a_template_that_does_not_show_the_turn_exactly_once_cannot_be_used(
    template: str, definitions: dict[str, bytes]
) -> None:
    with pytest.raises(ModelError, match="does not show a user's turn exactly once; set `chat: fa"):
        frame(definitions["byte-level"], template)


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only system turns') }}",
        "{% if",
        "{{ nothing.at.all }}",
        "{{ messages.append(1) }}{{ messages[0].content }}",
        "{{ messages[0].content.__class__.__mro__ }}",
        "{{ 1 + messages[0].content }}",
        "{{ 1 / 0 }}",
        "{{ messages[7].content + 'x' }}",
    ],
)
def test_a_template_that_cannot_be_rendered_cannot_be_used(
    template: str, definitions: dict[str, bytes]
) -> None:
    with pytest.raises(ModelError, match="chat template .*set `chat: false`"):
        frame(definitions["byte-level"], template)


THINKING = (
    CHAT_TEMPLATE + "{% if add_generation_prompt %}{% if enable_thinking is defined and "
    "enable_thinking is false %}<think>\n\n</think>\n\n{% else %}<think>\n{% endif %}{% endif %}"
)


def test_a_prompts_variables_reach_the_chat_template(definitions: dict[str, bytes]) -> None:
    tokenizer = ModelTokenizer(definitions["byte-level"], {}, THINKING)
    _, after = tokenizer.chat_frame({"enable_thinking": False}) or ("", "")
    assert after.endswith("<think>\n\n</think>\n\n")
    assert (tokenizer.chat_frame() or ("", ""))[1].endswith("<think>\n")


def test_a_variable_that_the_template_does_not_know_is_refused(
    definitions: dict[str, bytes],
) -> None:
    tokenizer = ModelTokenizer(definitions["byte-level"], {}, THINKING)
    with pytest.raises(ModelError, match="no variable 'thinking'; it knows: enable_thinking"):
        tokenizer.chat_frame({"thinking": False})
    plain = ModelTokenizer(definitions["byte-level"], {}, None)
    with pytest.raises(ModelError, match="has no chat template"):
        plain.chat_frame({"thinking": False})


# Loading.


def test_a_tokenizer_is_loaded_from_the_models_files(model_dir: Path) -> None:
    tokenizer = ModelTokenizer.load(ContextSpec(model=str(model_dir)))
    assert tokenizer.chat_frame() is not None
    assert tokenizer.encode_plain(["True"])


def test_a_model_without_a_configuration_or_a_template_is_enough(model_dir: Path) -> None:
    (model_dir / "tokenizer_config.json").unlink()
    (model_dir / "chat_template.jinja").unlink()
    assert ModelTokenizer.load(ContextSpec(model=str(model_dir))).chat_frame() is None


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("A{{ messages[0].content }}", ("A", "")),
        ([{"name": "default", "template": "B{{ messages[0].content }}"}], ("B", "")),
        ([{"name": "tool_use", "template": "C"}], None),
        (None, None),
        (5, None),
    ],
)
def test_an_older_models_template_is_in_its_configuration(
    template: object, expected: tuple[str, str] | None, model_dir: Path
) -> None:
    (model_dir / "chat_template.jinja").unlink()
    (model_dir / "tokenizer_config.json").write_text(json.dumps({"chat_template": template}))
    assert ModelTokenizer.load(ContextSpec(model=str(model_dir))).chat_frame() == expected


def test_the_template_in_its_own_file_wins(model_dir: Path) -> None:
    (model_dir / "tokenizer_config.json").write_text('{"chat_template": "old"}')
    frame_of_file = ModelTokenizer.load(ContextSpec(model=str(model_dir))).chat_frame()
    assert frame_of_file is not None
    assert frame_of_file[0] == "<|im_start|>user\n"


def test_the_error_for_a_model_without_a_fast_tokenizer_names_the_next_step(
    model_dir: Path,
) -> None:
    (model_dir / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer\.json; convert its tokenizer"):
        ModelTokenizer.load(ContextSpec(model=str(model_dir)))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", b""),
        ("tokenizer.json", b"{}"),
        ("tokenizer.json", b"[]"),
        ("tokenizer.json", b"\xff"),
        ("tokenizer_config.json", b"{"),
        ("tokenizer_config.json", b"\xff"),
        ("chat_template.jinja", b"\xff"),
    ],
)
def test_a_tokenizers_file_that_cannot_be_read_is_a_model_error(
    name: str, content: bytes, model_dir: Path
) -> None:
    (model_dir / name).write_bytes(content)
    with pytest.raises(ModelError, match=f"the tokenizer of {model_dir} cannot be read"):
        ModelTokenizer.load(ContextSpec(model=str(model_dir)))


def test_a_configuration_that_is_no_object_is_a_model_error(model_dir: Path) -> None:
    (model_dir / "chat_template.jinja").unlink()
    (model_dir / "tokenizer_config.json").write_text("[]")
    with pytest.raises(ModelError, match="cannot be read"):
        ModelTokenizer.load(ContextSpec(model=str(model_dir)))
