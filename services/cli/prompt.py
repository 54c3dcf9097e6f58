"""`keepwarm prompt show`: one claim as the engine gets it, and the tokens that are its answer."""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.cells import cell_len
from rich.text import Text

from services.cli.claims_options import ClaimsOptions
from services.cli.context_options import (
    MaxTokensOption,
    ModelOption,
    RevisionOption,
    context_from_flags,
)
from services.cli.prepare_submission import open_source, read_claims
from services.cli.screen import Screen, add_numbers, plain_table, plural, say
from services.cli.screen import show as show_on
from services.contracts import Claim, PromptSpec, load_settings
from services.contracts.errors import InputError, UsageError
from services.models.compiled_prompt import CompiledPrompt, RenderedPrompt, Token
from services.models.tokenizer import ModelTokenizer
from services.producer import Selection, read_prompt


def show(
    prompt: Annotated[
        Path, typer.Argument(metavar="PROMPT", help="A prompt file like samples/prompt.yaml.")
    ],
    model: ModelOption = None,
    claim: Annotated[
        str | None, typer.Option("--claim", help="The claim to show.", show_default=False)
    ] = None,
    evidence: Annotated[
        str | None, typer.Option("--evidence", help="The claim's evidence.", show_default=False)
    ] = None,
    file: Annotated[
        str | None,
        typer.Option(
            "--file",
            metavar="CLAIMS",
            help="Show the first claim of this file instead.",
            show_default=False,
        ),
    ] = None,
    revision: RevisionOption = None,
    max_model_tokens: MaxTokensOption = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show a claim as the engine gets it, without a broker or an engine.

    Prints the text, its tokens, and the tokens that are scored for each label word. Wherever one
    of these occurs in the prompt, as in a solved example, it is in brackets.
    """
    settings = load_settings()
    console = Screen(stderr=True)
    notes: list[str] = []
    spec = read_prompt(prompt, notes.append)
    if file is None:
        shown = _claim(claim, evidence)
    elif claim is not None or evidence is not None:
        raise UsageError("--file takes the claim from a file; leave out --claim and --evidence")
    else:
        shown = _first_claim(console, file, spec)
    context = context_from_flags(settings, model, revision, "bfloat16", max_model_tokens, None)
    compiled = CompiledPrompt(spec, ModelTokenizer.load(context))
    rendered = compiled.render(shown)
    limit = max_model_tokens - compiled.reserved_tokens
    if spec.chat and not compiled.in_chat:
        notes.append("the model has no chat template, so the text is not a turn of a chat")
    if len(rendered.tokens) > limit:
        notes.append(
            f"the prompt has {len(rendered.tokens):,} tokens, over the limit of {limit:,}: this "
            "becomes a dead claim; shorten the evidence, or see --max-model-tokens"
        )
    if as_json:
        print(json.dumps(_as_json(spec, context.model, rendered, limit, notes)))
        return
    for note in notes:
        say(console, f"Note: {note}")
    _print(Screen(), spec, context.model, rendered, limit)


def _claim(text: str | None, evidence: str | None) -> Claim:
    if text is None:
        raise UsageError("name a claim with --claim TEXT, or a file of claims with --file CLAIMS")
    try:
        return Claim(claim_id="shown", position=0, text=text, evidence=evidence)
    except ValidationError as error:
        fault = error.errors(include_url=False, include_input=False)[0]
        flag = "--evidence" if fault["loc"] == ("evidence",) else "--claim"
        raise UsageError(f"{flag}: {fault['msg']}; correct the text") from error


def _first_claim(console: Screen, file: str, spec: PromptSpec) -> Claim:
    options = ClaimsOptions(container=None, encoding=None, split=None, selection=Selection())
    with open_source(console, file, options) as source:
        claims = read_claims(console, source, spec, options)
        for claim in claims:
            return claim
        raise InputError(
            f"{claims.name}: none of its {claims.records_to_read:,} records is a claim; "
            "`keepwarm validate` reports why"
        )


def _as_json(
    spec: PromptSpec, model: str, rendered: RenderedPrompt, limit: int, notes: Sequence[str]
) -> dict[str, Any]:
    return {
        "prompt": spec.name,
        "prompt_id": spec.prompt_id,
        "model": model,
        "text": rendered.text,
        "tokens": [_fields(token) for token in rendered.tokens],
        "count": len(rendered.tokens),
        "limit": limit,
        "labels": [
            {
                "name": label.name,
                "word": label.word,
                "aliases": label.aliases,
                "scored": [_fields(token) for token in tokens],
            }
            for label, tokens in zip(spec.labels, rendered.label_tokens, strict=True)
        ],
        "reasoning": None if spec.reasoning is None else spec.reasoning.model_dump(),
        "notes": notes,
    }


def _fields(token: Token) -> dict[str, Any]:
    return {"id": token.id, "text": token.text}


def _print(
    console: Screen, spec: PromptSpec, model: str, rendered: RenderedPrompt, limit: int
) -> None:
    scored = {token.id for tokens in rendered.label_tokens for token in tokens}
    say(console, f"prompt {spec.name}, {spec.prompt_id}\nmodel {model}")
    say(console, f"\n--- text ---\n{rendered.text}")
    say(
        console,
        f"\n--- {plural(len(rendered.tokens), 'token')}, of at most {limit:,}; those of label "
        "words in [ ] ---",
    )
    entries = (
        f"[{token.id} {token.text!r}]" if token.id in scored else f"{token.id} {token.text!r}"
        for token in rendered.tokens
    )
    for line in _wrapped(entries, console.width):
        say(console, line)
    if spec.reasoning is not None:
        say(
            console,
            f"\n--- then the model writes up to {plural(spec.reasoning.max_tokens, 'token')}, and "
            f"{spec.reasoning.until!r} ---",
        )
    say(console, "\n--- scored as the next token ---")
    table = plain_table()
    for name in ("label", "word"):
        table.add_column(name, overflow="fold")
    add_numbers(table, "token")
    for name in ("its text", "also read in files"):
        table.add_column(name, overflow="fold")
    for label, tokens in zip(spec.labels, rendered.label_tokens, strict=True):
        cells = [label.name, label.word, ", ".join(label.aliases)]
        for token in tokens:
            label_cell, word, aliases = map(Text, cells)
            table.add_row(label_cell, word, str(token.id), Text(repr(token.text)), aliases)
            cells = ["", "", ""]
    show_on(console, table)


def _wrapped(entries: Iterable[str], width: int) -> Iterator[str]:
    """Lines of entries, two spaces between them. An entry is never divided."""
    line = ""
    for entry in entries:
        if line and cell_len(line) + 2 + cell_len(entry) > width:
            yield line
            line = entry
        else:
            line = f"{line}  {entry}" if line else entry
    if line:
        yield line
