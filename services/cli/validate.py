"""`keepwarm validate`: checks a file of claims, without a broker or an engine."""

import json
from array import array
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Annotated, Any

import typer

from services.cli.claims_options import (
    ClaimsOptions,
    ColumnOption,
    CorpusOption,
    EachEvidenceOption,
    EncodingOption,
    FileArgument,
    FormatOption,
    LabelMapOption,
    LimitOption,
    PromptOption,
    SeedOption,
    SplitOption,
    prompt_from_flag,
)
from services.cli.context_options import (
    MaxTokensOption,
    ModelOption,
    RevisionOption,
    context_from_flags,
)
from services.cli.input_summary import counted, kind_of, summary_lines, total
from services.cli.prepare_submission import open_source, read_claims
from services.cli.screen import Screen, line_progress, say
from services.contracts import load_settings
from services.contracts.errors import InputError, ModelError
from services.contracts.runs import InputSummary
from services.models.compiled_prompt import CompiledPrompt
from services.models.tokenizer import ModelTokenizer
from services.producer import ClaimsFile, Rejection

_EXAMPLES = 3
_SHOWN_REJECTIONS = 5


def validate(
    file: FileArgument,
    model: ModelOption = None,
    prompt: PromptOption = None,
    limit: LimitOption = None,
    seed: SeedOption = None,
    format: FormatOption = None,
    column: ColumnOption = None,
    label_map: LabelMapOption = None,
    each_evidence: EachEvidenceOption = False,
    corpus: CorpusOption = None,
    encoding: EncodingOption = None,
    split: SplitOption = None,
    revision: RevisionOption = None,
    max_model_tokens: MaxTokensOption = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Check a file of claims, without a broker or an engine.

    Prints the format, claims by label, evidence, lengths in tokens with the model's tokenizer,
    repeated and rejected records with their reasons, and three claims as the model sees them. The
    exit code is 3 when no record is a claim.
    """
    settings = load_settings()
    console = Screen(stderr=True)
    prompt_spec = prompt_from_flag(prompt)
    options = ClaimsOptions.from_flags(
        prompt_spec,
        format=format,
        column=column,
        label_map=label_map,
        each_evidence=each_evidence,
        corpus=corpus,
        encoding=encoding,
        split=split,
        limit=limit,
        seed=seed,
    )
    with open_source(console, file, options) as source:
        claims = read_claims(console, source, prompt_spec, options)
        rejections: list[Rejection] = []

        def keep(rejection: Rejection) -> None:
            if len(rejections) < _SHOWN_REJECTIONS:
                rejections.append(rejection)

        with line_progress(console, "checking", claims.records_to_read) as checking:
            summary = claims.inspect(keep, checking)
        tokens: dict[str, int] = {}
        examples: list[str] = []
        no_tokenizer: str | None = None
        try:
            context = context_from_flags(
                settings, model, revision, "bfloat16", max_model_tokens, None
            )
            compiled = CompiledPrompt(prompt_spec, ModelTokenizer.load(context))
        except ModelError as error:
            no_tokenizer = str(error)  # the file is checked anyway
        else:
            if summary.claims:
                limit = max_model_tokens - compiled.reserved_tokens
                with line_progress(console, "counting tokens", claims.records_to_read) as counting:
                    tokens = token_lengths(claims, compiled, limit, counting)
                examples = [compiled.render(claim).text for claim in islice(claims, _EXAMPLES)]
    if as_json:
        print(json.dumps(_as_json(claims, summary, tokens, no_tokenizer)))
    else:
        _print(claims, summary, rejections, tokens, no_tokenizer, examples)
    if summary.claims == 0:
        raise InputError(
            f"{claims.name}: none of its {claims.records_to_read:,} records is a claim; correct "
            "the file, or name its columns with --column"
        )


def token_lengths(
    claims: ClaimsFile, compiled: CompiledPrompt, limit: int, on_records: Callable[[int], None]
) -> dict[str, int]:
    """The lengths of a file's prompts, which must be one at least: `median`, `percentile_95`,
    `longest` and `total`; and `too_long`, how many are over the `limit`.
    """
    lengths = array("I")
    for read, chunk in claims.claims(claims.new_counts()):
        lengths.extend(map(len, compiled.encode(chunk)))
        on_records(read)
    ordered = sorted(lengths)
    return {
        "median": ordered[len(ordered) // 2],
        "percentile_95": ordered[len(ordered) * 95 // 100],
        "longest": ordered[-1],
        "total": sum(ordered),
        "limit": limit,
        "too_long": sum(length > limit for length in lengths),
    }


def _as_json(
    file: ClaimsFile, summary: InputSummary, tokens: dict[str, int], no_tokenizer: str | None
) -> dict[str, Any]:
    return {
        "format": file.format.name,
        "container": kind_of(file),
        "lines": file.records_to_read,
        "rows": file.rows,
        "records": summary.records,
        "claims": summary.claims,
        "rejected": dict(summary.rejected),
        "without_evidence": total(summary.without_evidence),
        "without_evidence_because": dict(summary.without_evidence),
        "evidence_partly_used": summary.evidence_partly_used,
        "labels": dict(summary.gold),
        "unlabelled": summary.unlabelled,
        "unknown_labels": dict(summary.unknown_labels),
        "repeated": summary.repeated,
        "same_content": summary.same_content,
        "other_label": summary.other_label,
        "own_ids": summary.own_ids,
        "ignored": list(file.ignored_keys),
        "disagreements": [
            {"used": used, "other": other, "records": count}
            for (used, other), count in file.disagreements.items()
        ],
        "tokens": tokens or None,
        "tokenizer_error": no_tokenizer,
    }


def _print(
    file: ClaimsFile,
    summary: InputSummary,
    rejections: Sequence[Rejection],
    tokens: dict[str, int],
    no_tokenizer: str | None,
    examples: Sequence[str],
) -> None:
    console = Screen()
    for line in summary_lines(file, summary):
        say(console, line)
    if file.ignored_keys:
        say(console, f"ignored: {', '.join(file.ignored_keys)}")
    if summary.rejected:
        say(console, f"rejected: {counted(summary.rejected, 20)}")
        for rejection in rejections:
            say(
                console,
                f"  line {rejection.line}: {rejection.reason}; {rejection.next_step}\n"
                f"    {rejection.content[:160]}",
            )
    if no_tokenizer is not None:
        say(console, f"tokens: not counted: {no_tokenizer}")
    elif tokens:
        say(
            console,
            f"tokens: median {tokens['median']:,}, 95 % up to {tokens['percentile_95']:,}, longest "
            f"{tokens['longest']:,}; over the limit of {tokens['limit']:,}: {tokens['too_long']:,}"
            + (" (they become dead claims; see --max-model-tokens)" if tokens["too_long"] else ""),
        )
    for number, example in enumerate(examples, 1):
        say(console, f"\n--- claim {number}, as the model sees it ---\n{example}")
