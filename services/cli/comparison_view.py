"""A comparison of runs on the screen, in Markdown and in LaTeX."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from string import ascii_uppercase
from typing import TYPE_CHECKING

from rich.text import Text

from services.cli.screen import Screen, add_numbers, plain_table, plural, say, show

if TYPE_CHECKING:  # importing it takes most of a second
    from services.analysis import Comparison
    from services.analysis.comparison import ComparedRun
    from services.analysis.scores import Estimate, Scores

_SCORES = ("accuracy", "balanced accuracy", "macro-F1")
_CORRECTIONS = {"holm": "Holm", "bh": "Benjamini-Hochberg"}
_MAX_PAIRS = 15
# benchmarks/intervals.py: with 25, the 95 % intervals held the truth in 94 %.
_FEW_CLUSTERS = 40
_MAX_LISTED = 5
_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": "$<$",
    ">": "$>$",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}
_LATEX_SPECIAL = re.compile(r"[\\~^<>&%$#_{}]|(?<![\w])[+-](?=\d)")


@dataclass(frozen=True)
class _Table:
    """Cells of text. The first `texts` columns are text, the others numbers."""

    texts: int
    header: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]


def print_comparison(console: Screen, result: "Comparison") -> None:
    """At most 80 columns wide, unless a run has a rank of more than 9."""
    show(console, Text(_summary(result)))
    tables = (_legend(result), _scores(result), *_pairs(result, _MAX_PAIRS))
    for table in (*tables, *_calibration(result)):
        shown = plain_table()
        for name in table.header[: table.texts]:
            shown.add_column(name, overflow="ellipsis", no_wrap=True)
        add_numbers(shown, *table.header[table.texts :])
        for row in table.rows:
            shown.add_row(*(Text(cell) for cell in row))
        say(console, "")
        show(console, shown)
    say(console, "")
    for note in _notes(result):
        show(console, Text(note))
    if len(result.pairs) > _MAX_PAIRS:
        show(console, Text(f"All {len(result.pairs)} pairs: --json, --markdown or --latex."))


def as_markdown(result: "Comparison") -> str:
    """The tables of the screen, with all pairs, and the notes as a list."""

    def row(cells: Sequence[str]) -> str:
        return f"| {' | '.join(map(_markdown, cells))} |"

    def table(table: _Table) -> str:
        ends = ["---"] * table.texts + ["---:"] * (len(table.header) - table.texts)
        return "\n".join([row(table.header), row(ends), *map(row, table.rows)])

    notes = "\n".join(f"- {note}" for note in (_summary(result), *_names(result), *_notes(result)))
    return "\n\n".join([*map(table, _wide_tables(result)), notes])


def as_latex(result: "Comparison") -> str:
    """The tables of the screen, with all pairs, for the package booktabs; notes are comments."""

    def row(cells: Sequence[str]) -> str:
        return " & ".join(_latex(cell) for cell in cells) + r" \\"

    def table(table: _Table) -> str:
        columns = "l" * table.texts + "r" * (len(table.header) - table.texts)
        return "\n".join(
            [
                rf"\begin{{tabular}}{{{columns}}}",
                r"\toprule",
                row(table.header),
                r"\midrule",
                *map(row, table.rows),
                r"\bottomrule",
                r"\end{tabular}",
            ]
        )

    notes = "\n".join(
        f"% {_one_line(note)}" for note in (_summary(result), *_names(result), *_notes(result))
    )
    return "\n\n".join([notes, *map(table, _wide_tables(result))])


def _markdown(cell: str) -> str:
    return re.sub(r"([|\\])", r"\\\1", _one_line(cell))


def _latex(text: str) -> str:
    return _LATEX_SPECIAL.sub(lambda found: _LATEX.get(found[0], f"${found[0]}$"), _one_line(text))


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _wide_tables(result: "Comparison") -> list[_Table]:
    """The scores with prompts and models beside them, and all pairs."""
    legend, scores = _legend(result), _scores(result)
    named = _Table(
        texts=3,
        header=("", *legend.header[2:], *scores.header[1:]),
        rows=[
            (row[0], *names, *row[1:])
            for row, names in zip(
                scores.rows, [*(row[2:] for row in legend.rows), ("", "")], strict=True
            )
        ],
    )
    return [named, *_pairs(result, len(result.pairs)), *_calibration(result)]


def _summary(result: "Comparison") -> str:
    every = "" if len(result.runs) == 1 else " in every run"
    return (
        f"{plural(result.claims, 'claim')} with gold label and verdict{every}, in "
        f"{plural(result.clusters, 'cluster')}"
    )


def _legend(result: "Comparison") -> _Table:
    rows = [
        (
            _letter(index),
            run.run_id,
            run.prompt or "not known yet",
            PurePath(run.model or "not known yet").name + _adapter(run),
        )
        for index, run in enumerate(result.runs)
    ]
    return _Table(texts=4, header=("", "run", "prompt", "model"), rows=rows)


def _adapter(run: "ComparedRun") -> str:
    return f" + {PurePath(run.adapter).name}" if run.adapter else ""


def _names(result: "Comparison") -> Iterator[str]:
    for index, run in enumerate(result.runs):
        yield f"{_letter(index)}: {run.run_id}"


def _scores(result: "Comparison") -> _Table:
    rows = [
        (_letter(index), _rank(run.rank), *_score_cells(run.scores))
        for index, run in enumerate(result.runs)
    ]
    majority = ("majority", "", *_score_cells(result.majority))
    return _Table(texts=1, header=("", "rank", *_SCORES), rows=[*rows, majority])


def _rank(rank: tuple[int, int]) -> str:
    low, high = rank
    return f"{low}" if low == high else f"{low}-{high}"


def _score_cells(scores: "Scores") -> tuple[str, ...]:
    return tuple(map(_score, (scores.accuracy, scores.balanced_accuracy, scores.macro_f1)))


def _score(estimate: "Estimate") -> str:
    if estimate.interval is None:
        return f"{estimate.value:.3f}"
    low, high = estimate.interval
    return f"{estimate.value:.3f} [{low:.3f}, {high:.3f}]"


def _pairs(result: "Comparison", most: int) -> list[_Table]:
    """The table of pairs, if there are any; of more than `most` only those with the first run."""
    if not result.pairs:
        return []
    shown = [pair for pair in result.pairs if len(result.pairs) <= most or pair.first == 0]
    rows = [
        (
            f"{_letter(pair.first)} and {_letter(pair.second)}",
            f"{pair.difference:+.3f}",
            "" if pair.interval is None else "[{:+.3f}, {:+.3f}]".format(*pair.interval),
            f"{pair.only_first_correct:,}",
            f"{pair.only_second_correct:,}",
            _p_value(pair.adjusted_p_value),
            "" if pair.detectable is None else f"{pair.detectable:.3f}",
        )
        for pair in shown
    ]
    header = ("pair", "difference", "95 % interval", "only 1st", "only 2nd", "p", "detectable")
    return [_Table(texts=1, header=header, rows=rows)]


def _calibration(result: "Comparison") -> list[_Table]:
    rows = []
    for index, run in enumerate(result.runs):
        if (found := run.calibration) is None:
            continue
        for name, numbers in (
            ("as stored", found.raw),
            ("batch calibration", found.batch),
            (f"temperature {found.temperature:.2f}", found.scaled),
        ):
            values = (numbers.accuracy, numbers.ece, numbers.brier, numbers.negative_log_likelihood)
            rows.append((_letter(index), name, *(f"{value:.3f}" for value in values)))
    header = ("", "probabilities", "accuracy", "ECE", "Brier", "NLL")
    return [_Table(texts=2, header=header, rows=rows)] if rows else []


def _p_value(value: float) -> str:
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def _notes(result: "Comparison") -> Iterator[str]:
    """What the numbers mean, and what they leave out."""
    yield f"majority: {result.majority_label} to every claim."
    if result.pairs:
        yield (
            f"p: whole clusters exchanged, corrected for {plural(len(result.pairs), 'pair')} "
            f"({_CORRECTIONS[result.correction]}). rank: what pairs with p of at most 0.05 leave "
            "open."
        )
        yield "detectable: the least difference that these claims show with 80 % probability."
    if any(run.calibration for run in result.runs):
        yield (
            "probabilities: temperatures are fitted on one half of the clusters; the numbers are "
            "those of the other half."
        )
    if result.effective_clusters < _FEW_CLUSTERS:
        yield (
            f"These clusters say as much as {result.effective_clusters:.0f} of equal size; with "
            f"fewer than {_FEW_CLUSTERS} the intervals may be too short."
        )
    if result.without_gold:
        yield f"Left out: {plural(result.without_gold, 'claim')} without a gold label in some run."
    if result.gold_differs:
        listed = ", ".join(
            f"{' / '.join(each.labels)} {each.claims:,}"
            for each in result.gold_differs[:_MAX_LISTED]
        )
        number = sum(each.claims for each in result.gold_differs)
        yield f"Left out: {plural(number, 'claim')} whose gold labels differ: {listed}."
    for index, run in enumerate(result.runs):
        if problems := list(_problems(result, run)):
            yield f"{_letter(index)}: {'; '.join(problems)}."


def _problems(result: "Comparison", run: "ComparedRun") -> Iterator[str]:
    if run.verdicts != result.claims:
        yield f"{result.claims:,} of {plural(run.verdicts, 'verdict')} are compared"
    if run.dead:
        yield f"{plural(run.dead, 'dead claim')}, left out"
    if run.invalid:
        yield f"{plural(run.invalid, 'INVALID verdict')}, counted as wrong"
    if run.calibration is not None and run.calibration.left_out:
        yield f"calibration without {plural(run.calibration.left_out, 'claim')} (no probabilities)"
    if run.unknown_evidence:
        yield (
            f"the evidence of {plural(run.unknown_evidence, 'claim')} is not known, because an "
            "older Keepwarm stored or sent them, so the intervals may be too short"
        )


def _letter(index: int) -> str:
    """A to Z, then AA, AB, …"""
    more, last = divmod(index, len(ascii_uppercase))
    return (_letter(more - 1) if more else "") + ascii_uppercase[last]
