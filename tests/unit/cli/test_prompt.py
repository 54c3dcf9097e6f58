"""`keepwarm prompt show`: what it shows is what the engine gets."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.contracts import Claim, ContextSpec
from services.models.compiled_prompt import CompiledPrompt
from services.models.tokenizer import ModelTokenizer
from services.producer import read_prompt
from tests.unit.cli.test_hostile_text import HOSTILE, OBEYED

PROMPT = """\
name: shown
instructions: Judge.
examples:
  - {claim: Grass is green., evidence: It is green., label: SUPPORTS}
chat: false
"""
CHAT = PROMPT.replace("chat: false", "chat: true")

Show = Callable[..., int]


@pytest.fixture
def show(
    keepwarm: Callable[..., int], model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """`show("--claim", "C.")`; `prompt` is the text of the prompt file."""
    monkeypatch.setenv("COLUMNS", "80")

    def run_command(*arguments: str, prompt: str = PROMPT) -> int:
        Path("prompt.yaml").write_text(prompt, encoding="utf-8")
        return keepwarm("prompt", "show", "prompt.yaml", "--model", str(model_dir), *arguments)

    return run_command


def as_json(show: Show, capsys: pytest.CaptureFixture[str], *arguments: str, **files: str) -> Any:
    assert show(*arguments, "--json", **files) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("prompt", [PROMPT, CHAT], ids=["plain", "chat"])
def test_the_tokens_are_those_of_the_engine(
    prompt: str, show: Show, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = as_json(
        show, capsys, "--claim", "It is old.", "--evidence", "1874: Łódź", prompt=prompt
    )
    spec = read_prompt(Path("prompt.yaml"))
    compiled = CompiledPrompt(spec, ModelTokenizer.load(ContextSpec(model=str(model_dir))))
    claim = Claim(claim_id="c", position=0, text="It is old.", evidence="1874: Łódź")
    assert [[token["id"] for token in shown["tokens"]]] == compiled.encode([claim])
    assert (shown["prompt_id"], shown["count"]) == (spec.prompt_id, len(shown["tokens"]))
    assert "".join(token["text"] for token in shown["tokens"]) == shown["text"]
    scored = [token["id"] for label in shown["labels"] for token in label["scored"]]
    assert tuple(scored) == compiled.label_tokens


def test_a_label_token_has_the_space_that_the_model_generates_with_it(
    show: Show, capsys: pytest.CaptureFixture[str]
) -> None:
    for prompt, text in ((PROMPT, " True"), (CHAT, "True")):
        label, *_ = as_json(show, capsys, "--claim", "C.", prompt=prompt)["labels"]
        assert [token["text"] for token in label["scored"]] == [text]
        assert (label["name"], label["word"], label["aliases"][0]) == (
            "SUPPORTS",
            "True",
            "SUPPORT",
        )


def test_the_screen_has_text_tokens_and_labels_within_80_columns(
    show: Show, capsys: pytest.CaptureFixture[str]
) -> None:
    found = as_json(show, capsys, "--claim", "It is old.")
    assert show("--claim", "It is old.") == 0
    shown = capsys.readouterr().out
    assert found["text"] in shown
    entries = [f"{token['id']} {token['text']!r}" for token in found["tokens"]]
    assert all(entry in shown for entry in entries)
    (label, *_) = found["labels"]
    number = label["scored"][0]["id"]
    assert shown.count(f"[{number} ' True']") == 1  # in the solved example
    assert "SUPPORTS" in shown.rpartition("---")[2] and f"{number}  ' True'" in shown
    assert (
        max(map(len, shown.partition("--- text")[2].partition("also read")[0].splitlines())) <= 80
    )


def test_a_prompt_that_reasons_first_shows_what_the_answer_is_scored_after(
    show: Show, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = (
        "template: '{claim} Reasoning:'\nchat: false\nreasoning: {max_tokens: 7, until: 'So:'}\n"
    )
    found = as_json(show, capsys, "--claim", "C.", prompt=prompt)
    assert found["text"].endswith("C. Reasoning:")
    assert found["labels"][0]["scored"][0]["text"] == " True"
    assert found["limit"] < 1023 - 7
    assert show("--claim", "C.", prompt=prompt) == 0
    assert "then the model writes up to 7 tokens, and 'So:'" in capsys.readouterr().out


def test_a_corrected_prompt_is_shown_as_it_is_used_with_a_note(
    show: Show, capsys: pytest.CaptureFixture[str]
) -> None:
    prompt = f'{PROMPT}template: "{{claim}} Answer: "\n'
    found = as_json(show, capsys, "--claim", "C.", prompt=prompt)
    assert found["text"].endswith("Answer:")
    (note,) = found["notes"]
    assert "the template ends in white space" in note
    assert show("--claim", "C.", prompt=prompt) == 0
    assert f"Note: {note}" in capsys.readouterr().err


def test_notes_tell_of_a_missing_chat_template_and_of_too_many_tokens(
    show: Show, model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model_dir / "chat_template.jinja").unlink()
    found = as_json(show, capsys, "--claim", "C.", "--max-model-tokens", "16", prompt=CHAT)
    assert [note.partition(",")[0] for note in found["notes"]] == [
        "the model has no chat template",
        f"the prompt has {found['count']} tokens",
    ]


def test_the_first_claim_of_a_file_may_be_shown(
    show: Show, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("claims.jsonl").write_text(
        '{"claim": ""}\n{"claim": "First.", "evidence": "Seen."}\n{"claim": "Second."}\n'
    )
    text = as_json(show, capsys, "--file", "claims.jsonl")["text"]
    assert text.endswith("Evidence: Seen.\nClaim: First.\nAnswer:")


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ((), 2, "name a claim with --claim TEXT"),
        (("--evidence", "E."), 2, "name a claim with --claim TEXT"),
        (("--claim", "C.", "--file", "f"), 2, "leave out --claim and --evidence"),
        (("--claim", " "), 2, "--claim: "),
        (("--claim", "C.", "--evidence", "e" * 65_537), 2, "--evidence: "),
        (("--claim", "C.", "--model", "/no/such"), 4, "there is no model at /no/such"),
        (("--file", "none.jsonl"), 3, "none.jsonl does not exist"),
        (("--file", "bad.jsonl"), 3, "none of its 1 records is a claim"),
    ],
)
def test_a_fault_has_its_exit_code_and_a_next_step(
    arguments: tuple[str, ...],
    code: int,
    says: str,
    show: Show,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("bad.jsonl").write_text('{"claim": ""}\n')
    assert show(*arguments) == code
    assert says in capsys.readouterr().err


def test_words_that_one_token_cannot_tell_apart_end_with_4(
    show: Show, capsys: pytest.CaptureFixture[str]
) -> None:
    labels = 'labels: [{name: A, word: "True"}, {name: B, word: "Trueish"}]\n'
    prompt = PROMPT.replace("SUPPORTS", "A") + labels
    assert show("--claim", "C.", prompt=prompt) == 4
    assert "start with the same token" in capsys.readouterr().err


def test_hostile_text_is_text(show: Show, capsys: pytest.CaptureFixture[str]) -> None:
    bad = "".join(text for text in HOSTILE if text != "{0}")
    named = yaml.safe_dump({"name": bad, "template": f"{bad}{{claim}}"}, allow_unicode=False)
    prompt = PROMPT.replace("name: shown\n", named)
    for flags in ((), ("--json",)):
        assert show(f"--claim={bad}", f"--evidence={bad}", *flags, prompt=prompt) == 0
        seen = capsys.readouterr()
        assert not OBEYED.search(seen.out + seen.err), repr(seen.out)
