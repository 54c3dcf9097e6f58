import io
from collections.abc import Callable
from types import SimpleNamespace

import pytest
from rich.console import Console

from services.cli.live_view import LiveView
from services.cli.screen import duration, line_progress, print_report, status_table
from services.collector import Report, RunStatus
from services.collector.report import Quality, Speed, WorkerShare
from services.collector.startups import Attaches, ColdStarts, Startups
from services.contracts import StartupPhases
from services.producer import Progress
from tests.unit.clock import Clock


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "unknown"),
        (0, "0 s"),
        (0.4, "0 s"),
        (42, "42 s"),
        (59.4, "59 s"),
        (59.6, "1 min 00 s"),
        (60, "1 min 00 s"),
        (185, "3 min 05 s"),
        (3_599.4, "59 min 59 s"),
        (3_599.6, "1 h 00 min"),
        (7_800, "2 h 10 min"),
        (90_000, "25 h 00 min"),
    ],
)
def test_a_duration_is_for_people(seconds: float | None, shown: str) -> None:
    assert duration(seconds) == shown


STATUS = RunStatus(
    run_id="run-0123456789abcdef",
    source="claims.jsonl",
    model="models/small",
    context_id="ctx-0011223344556677",
    prompt="fever",
    total=12_000,
    done=3_456,
    dead=7,
    rejected=8,
    repeated=9,
    duplicates=10,
    returned=13,
    lost_work=14,
    verdicts={"SUPPORTS": 3_000, "REFUTES": 456, "INVALID": 0},
    judged=100,
    correct=60,
    claims_per_second=12.34,
    eta_seconds=185,
    workers_seen=2,
    complete=False,
    cancelled=False,
)
REPORT = Report(
    status=STATUS,
    run=None,
    lines=12_017,
    input=None,
    verdicts={"SUPPORTS": 3_000, "REFUTES": 456, "INVALID": 0},
    dead={"too-long": 7},
    redelivered_batches=11,
    quality=Quality(
        labelled=100,
        correct=60,
        accuracy=0.6,
        accuracy_interval=(0.502, 0.691),
        macro_f1=0.654,
        confusion={"SUPPORTS": {"SUPPORTS": 60, "REFUTES": 40, "INVALID": 0}},
    ),
    speed=Speed(
        wall_seconds=600, claims_per_second=12.34, prompt_tokens=99, tokens_per_second=1_234
    ),
    workers=(
        WorkerShare(
            worker_id="node-1",
            device="Tesla T4",
            verdicts=3_456,
            duplicates=10,
            prompt_tokens=99,
            engine_seconds=1_200.5,
        ),
    ),
    startups=Startups(
        cold=(
            ColdStarts(
                device="Tesla T4",
                count=12,
                median_seconds=61.25,
                longest_seconds=1_090.5,
                phases=StartupPhases(load=9.75, compile=40.5),
            ),
            ColdStarts(
                device="CPU",
                count=1,
                median_seconds=30,
                longest_seconds=30,
                phases=StartupPhases(first_token=0.5),
            ),
        ),
        warm=Attaches(count=3, median_seconds=0.25),
        joined=Attaches(count=2, median_seconds=31.0),
    ),
)


def but(**changes: object) -> RunStatus:
    return RunStatus.model_validate({**STATUS.model_dump(), **changes})


def reported(**changes: object) -> Report:
    return Report.model_validate({**REPORT.model_dump(), **changes})


Seen = Callable[[], str]


@pytest.fixture
def seen(screen: Console) -> Seen:
    def text() -> str:
        assert isinstance(screen.file, io.StringIO)
        return screen.file.getvalue()

    return text


def test_the_status_table_has_a_row_a_run(screen: Console, seen: Seen) -> None:
    screen.print(status_table([STATUS, but(run_id="run-2", complete=True)]))
    header, first, second = seen().splitlines()
    assert header.split() == [
        *("run", "source", "total", "done", "dead", "rejected", "claims/s", "workers", "left")
    ]
    for part in (STATUS.run_id, "claims.jsonl", "12,000", "3,456", "12.3", "3 min 05 s"):
        assert part in first
    assert second.split()[-1] == "complete"
    assert "3 min" not in second


def test_what_is_not_known_yet_is_a_question_mark(screen: Console, seen: Seen) -> None:
    screen.print(status_table([but(source=None, total=None, rejected=None, eta_seconds=None)]))
    row = seen().splitlines()[1]
    assert "not announced" in row
    assert row.split().count("?") == 2
    assert "unknown" in row


def test_an_empty_store_is_told(screen: Console, seen: Seen) -> None:
    screen.print(status_table([]))
    assert "no run is in this store yet" in seen()


def test_the_report_shows_quality_speed_and_workers(screen: Console, seen: Seen) -> None:
    print_report(screen, REPORT)
    shown = seen()
    for part in (
        "run-0123456789abcdef",
        "12,000 of 12,017 lines (9 repeated, 8 rejected); 3,456 verdicts, 7 dead",
        "SUPPORTS 3,000, REFUTES 456, INVALID 0",
        "too-long 7",
        "0.600 (95 % interval 0.502 to 0.691; 60 of 100)",
        "0.654",
        "12.3 claims/s, 1,234 prompt tokens/s over 10 min 00 s",
        "10 verdicts came twice and were ignored; 11 batches were delivered again",
        "gold (rows) and verdict (columns)",
        "Tesla T4",
        "1,200.5",
    ):
        assert part in shown


def test_the_report_shows_what_starts_took_phase_by_phase(screen: Console, seen: Seen) -> None:
    print_report(screen, REPORT)
    lines = seen().splitlines()
    assert any("3 workers found the model warm, after 0.25 s (median)" in line for line in lines)
    assert any("2 workers waited for another's start, or for a wake" in line for line in lines)
    header = next(line.split() for line in lines if "longest" in line)
    assert header == [
        *("device", "starts", "median", "longest", "load", "compile"),
        "first",
        "token",
    ]
    rows = [line.split() for line in lines if "1,090.5" in line or line.split()[:1] == ["CPU"]]
    assert rows == [
        ["Tesla", "T4", "12", "61.2", "1,090.5", "9.8", "40.5"],
        ["CPU", "1", "30.0", "30.0", "0.5"],
    ]


def test_a_report_without_starts_says_nothing_of_them(screen: Console, seen: Seen) -> None:
    print_report(screen, reported(startups=None))
    assert "warm" not in seen()
    assert "cold starts" not in seen()


def test_a_report_without_gold_labels_has_no_accuracy(screen: Console, seen: Seen) -> None:
    print_report(screen, reported(quality=None, speed=None, workers=(), dead={}, lines=None))
    shown = seen()
    assert "accuracy" not in shown
    assert "claims/s" not in shown
    assert "3,456 done; the producer has not sent all of them yet" in shown


@pytest.mark.parametrize("name", ["claims[final].jsonl", "data[/x]/claims.jsonl", "a[bold].csv"])
def test_a_name_with_brackets_is_shown_as_it_is(name: str, screen: Console, seen: Seen) -> None:
    screen.print(status_table([but(source=name)]))
    print_report(screen, reported(status=but(source=name, model=f"/models/{name}")))
    assert seen().count(name) == 3


def test_progress_of_lines_is_silent_where_there_is_no_terminal(
    screen: Console, seen: Seen
) -> None:
    with line_progress(screen, "reading", None) as moved:
        moved(100_000)
    assert seen().strip() == ""


def test_progress_without_a_terminal_is_a_line_now_and_then(
    screen: Console, seen: Seen, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    monkeypatch.setattr("services.cli.live_view.time", SimpleNamespace(monotonic=clock))
    with LiveView(screen, lines=20_000) as view:
        view.show(None, Progress(0, 0, 0), ["starting"])
        clock.now += 4.9
        view.show(STATUS, Progress(5_000, 4_000, 8), ["warm", "draining"])
        assert seen() == "0 of 20,000, 0.0 claims/s, unknown left; engine: starting\n"
        clock.now += 0.2
        view.show(STATUS, Progress(5_000, 4_000, 8), ["warm", "draining"])
    assert seen().endswith("engine: warm, draining\n")


@pytest.mark.parametrize(
    ("status", "published", "shown"),
    [
        (STATUS, Progress(9, 9, 8), "3,463 of 12,000, 12.3 claims/s, 11 min 32 s left"),
        (but(total=None), Progress(9, 9, 8), "3,463 of 19,992, 12.3 claims/s, 22 min 19 s left"),
        (but(claims_per_second=0), Progress(9, 9, 8), "3,463 of 12,000, 0.0 claims/s, unknown"),
    ],
)
def test_the_live_view_says_how_far_it_is(
    status: RunStatus, published: Progress, shown: str, screen: Console, seen: Seen
) -> None:
    with LiveView(screen, lines=20_000) as view:
        view.show(status, published, ["warm"])
    assert seen().startswith(shown)
