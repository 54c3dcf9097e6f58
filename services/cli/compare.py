"""`keepwarm compare`."""

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from services.cli.comparison_view import as_latex, as_markdown, print_comparison
from services.cli.options import StoreOption
from services.cli.printable import printable
from services.cli.screen import Screen
from services.cli.stores import store_of_run
from services.contracts import Settings, load_settings
from services.contracts.errors import UsageError

if TYPE_CHECKING:  # importing it takes most of a second
    from services.analysis import LabelCodes, RunOutcomes

RunsArgument = Annotated[
    list[str],
    typer.Argument(
        metavar="RUN...", help="The runs: ids, their beginnings, or directories of `keepwarm run`."
    ),
]


def compare(
    runs: RunsArgument,
    store: StoreOption = None,
    correction: Annotated[
        Literal["holm", "bh"],
        typer.Option(
            help="For the number of pairs: holm keeps the probability of any false difference "
            "under 5 %, bh (Benjamini-Hochberg) the share of false ones among those found."
        ),
    ] = "holm",
    calibration: Annotated[
        bool,
        typer.Option(
            "--calibration",
            help="Also how well label probabilities are calibrated: as stored, after batch "
            "calibration and after temperature scaling.",
        ),
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables.")] = False,
    latex: Annotated[
        bool, typer.Option("--latex", help="Print LaTeX tables, for the package booktabs.")
    ] = False,
) -> None:
    """Compare runs on their common claims: accuracy, balanced accuracy and macro-F1 with 95 %
    intervals, differences of each pair with tests, and the ranks that these leave open.

    Common are the claims (by id and text) with a verdict and the same gold label in every run; an
    INVALID verdict is wrong. Claims that share evidence count as one cluster, because they are not
    independent. A run is searched for in the stores that `keepwarm status` lists;
    `keepwarm compare results/*` compares all runs in results/.
    """
    if as_json + markdown + latex > 1:
        raise UsageError("--json, --markdown and --latex exclude each other; use one of them")
    from services.analysis import LabelCodes, compare_runs
    from services.analysis.pairs import Correction

    codes = LabelCodes()
    outcomes = _read(load_settings(store_url=store), runs, codes, probabilities=calibration)
    result = compare_runs(outcomes, codes, Correction(correction))
    if as_json:
        print(json.dumps(result.model_dump(mode="json"), indent=2))
    elif markdown or latex:
        print(printable(as_markdown(result) if markdown else as_latex(result)))
    else:
        print_comparison(Screen(), result)


def _read(
    settings: Settings, runs: list[str], codes: "LabelCodes", *, probabilities: bool
) -> "Iterator[RunOutcomes]":
    from services.analysis import read_outcomes

    read: set[tuple[str, str]] = set()
    for wanted in runs:
        with store_of_run(settings, wanted) as (database, known):
            if (database.name, known.run_id) in read:
                raise UsageError(f"{wanted} names a run that is named before; name each run once")
            read.add((database.name, known.run_id))
            yield read_outcomes(database, known, codes, probabilities=probabilities)
