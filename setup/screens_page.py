"""Generate the screens of docs/screens.md with the code that prints them, at 80 columns.

    .venv/bin/python setup/screens_page.py [--check]

A comment, `<!-- screen: NAME -->`, names the screen in the block under it; the text between the
blocks is written by people.
"""

import argparse
import io
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rich.console import RenderableType

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))

from services.cli.broker_view import BrokerSnapshot, broker_tables  # noqa: E402
from services.cli.leaderboard import LeaderboardRow, print_leaderboard  # noqa: E402
from services.cli.live_view import LiveView  # noqa: E402
from services.cli.screen import Screen, print_report, show, status_table  # noqa: E402
from services.contracts import (  # noqa: E402
    ContextDemand,
    ContextSpec,
    StartupPhases,
    WorkerHeartbeat,
)
from services.store import Report, RunStatus  # noqa: E402
from services.store.report import Quality, Speed, WorkerShare, wilson_interval  # noqa: E402
from services.store.startups import ColdStarts, Startups  # noqa: E402

COLUMNS = 80
PAGE = REPOSITORY / "docs" / "screens.md"
_BLOCK = re.compile(r"(<!-- screen: ([a-z ]+) -->\n)(?:```\n.*?\n```\n)?", re.DOTALL)

_RUN = RunStatus(
    run_id="run-a581a8940b873600",
    source="samples/claims.jsonl",
    model="/home/ada/keepwarm/.models/SmolLM2-135M-Instruct",
    context_id="ctx-8776d42cb8c35c4c",
    prompt="fever-3way",
    total=240,
    done=128,
    dead=0,
    rejected=0,
    repeated=0,
    duplicates=0,
    returned=0,
    lost_work=0,
    verdicts={"SUPPORTS": 92, "REFUTES": 33, "NOT ENOUGH INFO": 3, "INVALID": 0},
    judged=128,
    correct=46,
    claims_per_second=11.4,
    eta_seconds=9.8,
    workers_seen=1,
    complete=False,
    cancelled=False,
)
_DONE = _RUN.model_copy(
    update={"done": 238, "dead": 2, "rejected": 3, "complete": True, "proven": True}
)
_OLDER = _RUN.model_copy(
    update={
        "run_id": "run-0c77e15d2f9a4b31",
        "source": "/data/climate-fever/climate-fever-dataset-r1.jsonl",
        "total": 1_535,
        "done": 1_533,
        "dead": 2,
        "claims_per_second": 12.6,
        "complete": True,
        "proven": True,
    }
)
_REPORT = Report(
    status=_DONE,
    run=None,
    lines=243,
    input={"rejected": {"no claim": 2, "no JSON": 1}, "without_evidence": {}, "unknown_labels": {}},
    verdicts={"SUPPORTS": 171, "REFUTES": 61, "NOT ENOUGH INFO": 6, "INVALID": 0},
    dead={"too-long": 2},
    redelivered_batches=0,
    quality=Quality(
        labelled=238,
        correct=87,
        accuracy=0.3655,
        accuracy_interval=(0.307, 0.428),
        macro_f1=0.301,
        confusion={
            "SUPPORTS": {"SUPPORTS": 61, "REFUTES": 18, "NOT ENOUGH INFO": 1},
            "REFUTES": {"SUPPORTS": 58, "REFUTES": 21, "NOT ENOUGH INFO": 0},
            "NOT ENOUGH INFO": {"SUPPORTS": 52, "REFUTES": 22, "NOT ENOUGH INFO": 5},
        },
    ),
    speed=Speed(
        wall_seconds=21, claims_per_second=11.4, prompt_tokens=56_013, tokens_per_second=2_667
    ),
    workers=(
        WorkerShare(
            worker_id="node-7-4711-73fb",
            device="AMD EPYC",
            verdicts=238,
            duplicates=0,
            prompt_tokens=56_013,
            engine_seconds=20.4,
        ),
    ),
    startups=Startups(
        cold=(
            ColdStarts(
                device="AMD EPYC",
                count=1,
                median_seconds=17.3,
                longest_seconds=17.3,
                phases=StartupPhases(imports=8.8, load=1.1, compile=4.0, first_token=0.2),
            ),
        ),
        warm=None,
        joined=None,
    ),
)
_CONTEXT = ContextSpec(model=_RUN.model or "")
_SNAPSHOT = BrokerSnapshot(
    workers=[
        WorkerHeartbeat(
            worker_id=f"gpu-{number}-1201-{name}",
            context_id=_CONTEXT.context_id,
            device="NVIDIA A10",
            state="serving",
            claims_per_second=speed,
            job_id=f"4711_{number}",
            walltime_left_seconds=left,
            claims_in_hand=in_flight,
        )
        for number, name, speed, left, in_flight in (
            (1, "9c1e", 122.4, 7_800, 448),
            (2, "07aa", 118.9, 185, 448),
        )
    ],
    contexts=[
        ContextDemand(context=_CONTEXT, claims_ready=64_000, claims_in_flight=896, workers_warm=2)
    ],
    queues={"verdicts": 3, "returns": 0},
)


def _quality(correct: int, labelled: int) -> Quality:
    return Quality(
        labelled=labelled,
        correct=correct,
        accuracy=correct / labelled,
        accuracy_interval=wilson_interval(correct, labelled),
        macro_f1=0.0,
        confusion={},
    )


def _row(
    prompt: str, model: str, correct: tuple[int, int], error: str | None = None
) -> LeaderboardRow:
    return LeaderboardRow(
        name=f"{prompt}, {model}",
        prompt=prompt,
        model=model,
        run_id="run-a581a8940b873600",
        context_id="ctx-8776d42cb8c35c4c",
        directory="fever-3way-a581a8940b873600",
        claims=2_000,
        done=2_000 if error is None else 1_304,
        dead=0,
        complete=error is None,
        error=error,
        selected=_quality(correct[0], 1_000),
        quality=_quality(correct[1], 1_000),
    )


_ROWS = [
    _row("few-shot", "Qwen3-1.7B", (712, 698)),
    _row("few-shot-without-evidence", "SmolLM2-1.7B-Instruct+fever-lora", (655, 660)),
    _row(
        *("zero-shot", "SmolLM2-1.7B-Instruct+fever-lora", (640, 622)),
        error="run-0c77e15d2f9a4b31 was cancelled; rerun the command to resume it",
    ),
]


@dataclass(frozen=True)
class _Worker:
    state: str
    answered: int = 0
    losses: int = 0


def _live(
    *moments: tuple[float, int, tuple[_Worker, ...]], terminal: bool = True, note: str = ""
) -> str:
    """The progress after these moments: seconds, claims in the store, and the workers."""
    now = 0.0
    console = _console(terminal=terminal)
    view = LiveView(console, claims=240, clock=lambda: now)
    for now, stored, workers in moments:  # noqa: B007  (the clock reads it)
        status = _RUN.model_copy(update={"done": stored})
        view.show(status, workers, note=note)
    if terminal:
        for line in console.render_lines(view.renderable(), pad=False):
            console.file.write("".join(segment.text for segment in line) + "\n")
    return _text(console)


def _shown(draw: RenderableType | Callable[[Screen], None], *, terminal: bool = True) -> str:
    console = _console(terminal=terminal)
    if callable(draw):
        draw(console)
    else:
        show(console, draw)
    return _text(console)


def _console(*, terminal: bool) -> Screen:
    return Screen(
        file=io.StringIO(),
        width=COLUMNS,
        force_terminal=terminal,
        color_system=None,
        _environ={"TERM": "dumb"} if not terminal else {},
    )


def _text(console: Screen) -> str:
    assert isinstance(console.file, io.StringIO)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    return "\n".join(line.rstrip() for line in plain.splitlines())


def _loading(seconds: int) -> tuple[_Worker, ...]:
    return (_Worker(f"loading the model, {seconds} s"),)


def _working(answered: int) -> tuple[_Worker, ...]:
    return (_Worker("working", answered),)


def screens() -> Mapping[str, str]:
    """Each screen of the page, by name."""
    begun = ((0.0, 0, _loading(12)), (5.0, 0, _working(7)))
    mixed = (_Worker("working", 128), _Worker("loading the model, 9 s"))
    return {
        "run loading": _live((0.0, 0, _loading(12))),
        "run working": _live(*begun, (15.0, 128, _working(131))),
        "run with two workers": _live(*begun, (15.0, 128, mixed)),
        "run storing": _live(*begun, (24.5, 192, _working(240))),
        "run piped": _live(
            *((5.0, 0, _loading(5)), (10.0, 0, _loading(10)), (15.0, 0, _working(7))),
            *((20.0, 64, _working(71)), (25.0, 128, _working(131))),
            terminal=False,
        ),
        "sweep working": _live(
            *begun, (15.0, 128, _working(131)), note="zero-shot, SmolLM2-1.7B-Instruct: 8 of 120"
        ),
        "sweep": _shown(lambda console: print_leaderboard(console, _ROWS)),
        "report": _shown(lambda console: print_report(console, _REPORT)),
        "full report": _shown(lambda console: print_report(console, _REPORT, full=True)),
        "status": _shown(status_table([_RUN, _OLDER])),
        "status piped": _shown(status_table([_RUN, _OLDER]), terminal=False),
        "watch": _shown(broker_tables(_SNAPSHOT)),
    }


def render(page: str) -> str:
    """The page with its screens as they are printed now.

    Raises SystemExit when a screen is missing from the page, or unknown.
    """
    drawn = screens()
    named = [block[2] for block in _BLOCK.finditer(page)]
    if sorted(named) != sorted(drawn):
        raise SystemExit(f"{PAGE}: the page must have each screen once: {', '.join(sorted(drawn))}")
    return _BLOCK.sub(lambda found: f"{found[1]}```\n{drawn[found[2]]}\n```\n", page)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--check", action="store_true", help="write nothing; exit with 1 if the page differs"
    )
    arguments = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    rendered = render(page)
    if arguments.check and rendered != page:
        raise SystemExit(f"{PAGE} is out of date; run `make docs`")
    if not arguments.check:
        PAGE.write_text(rendered, encoding="utf-8")


if __name__ == "__main__":
    main()
