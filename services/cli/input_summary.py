"""The summary of a file of claims, as text."""

import shlex

from services.cli.screen import plural
from services.contracts.runs import Counts, InputSummary
from services.producer import ClaimsFile
from services.producer.fields import WithoutEvidence, field_of

_SHOWN = 6
_CONTAINERS = {"jsonl": "JSONL", "json": "JSON", "parquet": "Parquet", "arrow": "Arrow"}
_DELIMITERS = {",": "CSV", "\t": "TSV", ";": "semicolon-separated", "|": "pipe-separated"}


def summary_lines(file: ClaimsFile, summary: InputSummary) -> list[str]:
    """Two lines: format and counts, then labels and evidence. Warnings follow."""
    lines = [_counts_line(file, summary), f"{_labels(summary)}; {_evidence(file, summary)}"]
    if summary.other_label:
        without = total(summary.without_evidence) == summary.claims
        lines.append(
            f"Warning: {plural(summary.other_label, 'claim')} repeated with "
            f"{'' if without else 'the same evidence, '}another id and another label"
        )
    for (used, other), count in file.disagreements.items():
        lines.append(
            f"Warning: {used!r} and {other!r} differ in {plural(count, 'record')}; {used!r} is "
            f"used (the other one: --column {field_of(used)}={other})"
        )
    if file.unused_labels:
        listed = ", ".join(map(repr, file.unused_labels))
        lines.append(f"Warning: no record has the label {listed} of --label-map")
    return lines


def _counts_line(file: ClaimsFile, summary: InputSummary) -> str:
    rejected = total(summary.rejected)
    not_selected = f", {file.not_selected:,} not selected" if file.not_selected else ""
    rows = "" if file.rows == file.records else f"{plural(file.rows, 'row')} merged into "
    limited = "" if file.records_to_read == file.records else f"{file.records_to_read:,} of "
    return (
        f"{file.name}: {summary.format} ({kind_of(file)}), {rows}{limited}"
        f"{plural(file.records, 'record')}: {plural(summary.claims, 'claim')}, "
        f"{summary.repeated:,} repeated, {rejected:,} rejected"
        f"{not_selected}"
    )


def kind_of(file: ClaimsFile) -> str:
    """The file's type: JSONL, CSV, CSV without a header, …"""
    source = file.source
    if source.delimiter is None:
        return _CONTAINERS[source.container]
    kind = _DELIMITERS.get(source.delimiter, f"separated by {source.delimiter!r}")
    return kind if source.has_header else f"{kind} without a header"


def _labels(summary: InputSummary) -> str:
    parts = []
    if summary.gold:
        parts.append(f"labels {counted(summary.gold)}")
    if summary.unlabelled:
        none = summary.unlabelled == summary.claims
        part = "no labels" if none else f"{summary.unlabelled:,} without a label"
        kept_back = f" (of these {summary.kept_back:,} with -1)" if summary.kept_back else ""
        parts.append(part + kept_back)
    if summary.unknown_labels:
        first, _ = summary.unknown_labels[0]
        parts.append(
            f"left out of the scores, because the prompt does not have them: "
            f"{counted(summary.unknown_labels)} (map them with "
            f"--label-map {shlex.quote(f'{first}=…')})"
        )
    return "; ".join(parts) or "no labels"


def _evidence(file: ClaimsFile, summary: InputSummary) -> str:
    without = total(summary.without_evidence)
    own = f"; {summary.own_ids:,} share an id and got new ones" if summary.own_ids else ""
    if summary.evidence_partly_used:
        own += f"; only a part of the evidence was used: {summary.evidence_partly_used:,}"
    if not summary.claims:
        return "evidence: no claims"
    if not without:
        return f"evidence: all claims{own}"
    why = counted(summary.without_evidence)
    if without == summary.claims and len(summary.without_evidence) == 1:
        why = summary.without_evidence[0][0]
    return f"without evidence: {without:,} ({why}{_next_step(file, summary)}){own}"


def _next_step(file: ClaimsFile, summary: InputSummary) -> str:
    reasons = dict(summary.without_evidence)
    if WithoutEvidence.REFERENCES in reasons and file.format.corpus:
        return f"; --corpus looks them up in {file.format.corpus}"
    if total(summary.without_evidence) == summary.claims and file.ignored_keys:
        return (
            f"; ignored: {', '.join(file.ignored_keys[:_SHOWN])}; name one with "
            "--column evidence=NAME"
        )
    return ""


def total(counts: Counts) -> int:
    """The sum of all kinds."""
    return sum(count for _, count in counts)


def counted(counts: Counts, shown: int = _SHOWN) -> str:
    """`SUPPORTS: 12, REFUTES: 7, others: 3`."""
    parts = [f"{name}: {count:,}" for name, count in counts[:shown]]
    others = total(counts[shown:])
    return ", ".join([*parts, f"others: {others:,}"] if others else parts)
