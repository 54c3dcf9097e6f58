import io
from collections.abc import Callable
from dataclasses import dataclass

import pytest

from services.cli.live_view import LiveView
from services.cli.screen import Screen, duration, line_progress, print_report, show, status_table
from services.contracts import StartupPhases
from services.store import Report, RunStatus
from services.store.report import Quality, Speed, WorkerShare
from services.store.startups import Attaches, ColdStarts, Startups
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
def seen(screen: Screen) -> Seen:
    def text() -> str:
        assert isinstance(screen.file, io.StringIO)
        return screen.file.getvalue()

    return text


def test_the_status_table_has_a_row_a_run(screen: Screen, seen: Seen) -> None:
    runs = [
        STATUS,
        but(run_id="run-2", complete=True, proven=True, dead=0),
        but(run_id="run-3", complete=True, dead=0),
        but(run_id="run-4", proven=False),
        but(run_id="run-5", nowhere_since=1.0),
        but(run_id="run-6", nowhere_since=1.0, cancelled=True),
    ]
    show(screen, status_table(runs))
    header, first, second, *others = seen().splitlines()
    assert header.split() == ["run", "file", "done", "of", "failed", "claims/s", "left"]
    assert first.split() == [
        *(STATUS.run_id, "claims.jsonl", "3,456", "12,000", "7", "12.3", "3", "min", "05", "s")
    ]
    assert second.split()[-1] == "complete"
    ends = ("complete, unproven", "wrong claims", "claims missing", "cancelled")
    for line, end in zip(others, ends, strict=True):
        assert line.endswith(f"  {end}")


def test_the_status_table_has_no_column_for_failures_that_there_are_not(
    screen: Screen, seen: Seen
) -> None:
    show(screen, status_table([but(dead=0)]))
    assert "failed" not in seen()


@pytest.mark.parametrize("name", ["a-file-of-claims.jsonl", "a-f ile of all the claims.jsonl"])
def test_the_largest_status_fits_eighty_columns(name: str, terminal: Screen, seen: Seen) -> None:
    run = but(source=f"/a/long/path/to/{name}", done=1_234_567, total=10_000_000)
    show(terminal, status_table([run]))
    lines = seen().splitlines()
    assert len(lines) == 2
    assert max(map(len, lines)) <= 80
    for part in (run.run_id, "a-f", "1,234,567", "10,000,000", "12.3", "3 min 05 s"):
        assert part in lines[1]


def test_what_is_not_known_yet_is_a_question_mark(screen: Screen, seen: Seen) -> None:
    show(screen, status_table([but(source=None, total=None, rejected=None, eta_seconds=None)]))
    row = seen().splitlines()[1]
    assert "not announced" in row
    assert row.split().count("?") == 1
    assert "unknown" in row


def test_an_empty_store_is_reported(screen: Screen, seen: Seen) -> None:
    show(screen, status_table([]))
    assert "no runs in this store yet" in seen()


def test_the_report_leads_with_the_result_and_what_went_wrong(screen: Screen, seen: Seen) -> None:
    print_report(screen, reported(verdicts={"SUPPORTS": 3_000, "REFUTES": 456, "INVALID": 5}))
    assert seen().splitlines() == [
        "claims.jsonl, run-0123456789abcdef",
        "accuracy  0.600 (60 of 100 correct; 95 % interval 0.502 to 0.691)",
        "macro-F1  0.654",
        "verdicts  SUPPORTS 3,000, REFUTES 456, INVALID 5",
        "claims    3,456 of 12,000 have a verdict, 8,537 are not done yet; 9 repeated lines left "
        "out",
        "problem   7 claims failed: too-long 7; see keepwarm dead list run-0123456789abcdef",
        "problem   5 INVALID verdicts: the model gave the labels too little probability",
        "problem   8 lines rejected",
        "speed     12.3 claims/s over 10 min 00 s",
        "model     models/small",
        "prompt    fever",
        "more: keepwarm report run-0123456789abcdef --full",
    ]


def test_the_report_lists_what_was_wrong_with_the_file(screen: Screen, seen: Seen) -> None:
    found = {
        "rejected": {"no claim": 6, "no JSON": 2},
        "without_evidence": {"only references": 40},
        "unknown_labels": {"DISPUTED": 3, "mixture": 9},
    }
    print_report(screen, reported(input=found))
    for line in (
        "problem   8 lines rejected: no claim 6, no JSON 2",
        "problem   40 claims had no evidence: only references 40",
        "problem   12 claims left out of the scores, because the prompt does not have their "
        "labels: mixture 9, DISPUTED 3",
    ):
        assert line in seen().splitlines()


def test_the_full_report_has_the_details_as_well(screen: Screen, seen: Seen) -> None:
    print_report(screen, REPORT, full=True)
    shown = seen()
    for part in (
        "0.600 (60 of 100 correct",
        "12,017: 12,000 claims, 9 repeated, 8 rejected",
        "1,234 prompt tokens/s",
        "10 verdicts (the first one counts), 11 batches",
        "returned by preempted workers: 13; recomputed: at most 14",
        "gold (rows) and verdict (columns)",
        "Tesla T4",
        "1,200.5",
    ):
        assert part in shown
    assert "more:" not in shown


def test_the_full_report_shows_what_starts_took_phase_by_phase(screen: Screen, seen: Seen) -> None:
    print_report(screen, REPORT, full=True)
    lines = seen().splitlines()
    assert any("3 workers found the model loaded, in 0.25 s (median)" in line for line in lines)
    assert any("2 workers joined a start in progress" in line for line in lines)
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


def test_a_report_without_starts_has_no_row_for_them(screen: Screen, seen: Seen) -> None:
    print_report(screen, reported(startups=None), full=True)
    assert "warm starts" not in seen()
    assert "cold starts" not in seen()


def test_a_report_without_gold_labels_has_no_accuracy(screen: Screen, seen: Seen) -> None:
    incomplete = but(total=None, dead=0, rejected=None)
    print_report(
        screen,
        reported(status=incomplete, quality=None, speed=None, workers=(), dead={}, lines=None),
        full=True,
    )
    shown = seen()
    assert "accuracy" not in shown
    assert "claims/s" not in shown
    assert "problem" not in shown
    assert "3,456 done; not all of the file is sent yet" in shown


@pytest.mark.parametrize("name", ["claims[final].jsonl", "data[x].jsonl", "a[bold].csv"])
def test_a_name_with_brackets_is_shown_as_it_is(name: str, screen: Screen, seen: Seen) -> None:
    show(screen, status_table([but(source=name)]))
    print_report(screen, reported(status=but(source=name, model=f"/models/{name}")))
    assert seen().count(name) == 3


def test_piped_output_is_neither_wrapped_nor_padded(screen: Screen, seen: Seen) -> None:
    path = "/scratch/" + "a-very-long-directory/" * 12 + "claims.jsonl"
    print_report(screen, reported(status=but(model=path)), full=True)
    show(screen, status_table([but(source=path)]))
    lines = seen().splitlines()
    assert any(line.endswith(path) for line in lines)
    assert all(line == line.rstrip() for line in lines)


def test_progress_of_lines_is_silent_where_there_is_no_terminal(screen: Screen, seen: Seen) -> None:
    with line_progress(screen, "reading", None) as moved:
        moved(100_000)
    assert seen().strip() == ""


@dataclass(frozen=True)
class Worker:
    """What the live view asks of a worker."""

    state: str = "working"
    answered: int = 0
    losses: int = 0


LOADING = Worker("loading the model, 12 s")


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def terminal(screen: Screen) -> Screen:
    return Screen(file=screen.file, width=80, force_terminal=True, color_system=None)


def drawn(view: LiveView, console: Screen) -> list[str]:
    lines = console.render_lines(view.renderable(), pad=False)
    return ["".join(segment.text for segment in line) for line in lines]


def test_progress_without_a_terminal_is_a_line_now_and_then(
    screen: Screen, seen: Seen, clock: Clock
) -> None:
    with LiveView(screen, claims=20_000, clock=clock) as view:
        view.show(None, [LOADING])
        clock.now += 4.9
        view.show(STATUS, [Worker()])
        assert seen() == "0 %: 0 of 20,000 claims: loading the model, 12 s\n"
        clock.now += 0.2
        view.show(STATUS, [Worker()])
        assert seen().splitlines()[1:] == ["29 %: 3,463 of 12,000 claims"]
        clock.now += 0.1
        view.show(STATUS, [Worker(answered=1)])
    # The last word is not lost, though it came early.
    assert seen().splitlines()[2].startswith("29 %: 3,464 of 12,000 claims")


def test_the_bar_the_percentage_and_the_time_left_fit_eighty_columns(
    terminal: Screen, clock: Clock
) -> None:
    view = LiveView(terminal, claims=10_000_000, clock=clock)
    large = but(total=10_000_000, done=1_234_000, dead=0)
    for answered in (0, 1, 600):
        clock.now += 0.5
        view.show(large, [Worker(answered=answered)])
    (line,) = drawn(view, terminal)
    assert len(line) <= 80
    assert line.count("\N{BOX DRAWINGS HEAVY HORIZONTAL}") >= 1
    assert "12% 1,234,600 of 10,000,000 claims, 1,198.0/s, 2 h 01 min left" in line


def test_progress_moves_with_every_answered_claim(terminal: Screen, clock: Clock) -> None:
    view = LiveView(terminal, claims=240, clock=clock)
    run = but(total=240, done=0, dead=0)
    shown = []
    for answered in (0, 1, 2, 3):
        clock.now += 0.25
        view.show(run, [Worker(answered=answered)])
        shown.append(drawn(view, terminal)[0].partition("% ")[2].partition(" of 240")[0])
    assert shown == ["0", "1", "2", "3"]


def test_what_a_lost_worker_had_answered_and_not_published_does_not_count(
    terminal: Screen, clock: Clock
) -> None:
    view = LiveView(terminal, claims=240, clock=clock)
    run = but(total=240, done=64, dead=0)
    view.show(run, [Worker(answered=0)])
    view.show(run, [Worker(answered=30)])
    assert " 94 of 240" in drawn(view, terminal)[0]
    view.show(run, [Worker("starting", answered=30, losses=1)])
    assert " 64 of 240 claims: starting" in drawn(view, terminal)[0]
    view.show(run, [Worker(answered=31, losses=1)])
    assert " 65 of 240" in drawn(view, terminal)[0]


def test_what_others_answered_counts_once_it_is_stored(terminal: Screen, clock: Clock) -> None:
    view = LiveView(terminal, claims=240, clock=clock)
    view.show(but(total=240, done=0, dead=0), [Worker()])
    view.show(but(total=240, done=100, dead=3), [Worker(answered=10)])
    assert " 103 of 240" in drawn(view, terminal)[0]


@pytest.mark.parametrize(
    ("workers", "lines"),
    [
        ([LOADING], ["0 of 240 claims: loading the model, 12 s"]),
        ([LOADING, LOADING], ["0 of 240 claims: 2 workers: 2 loading the model"]),
        ([Worker()], ["0 of 240 claims"]),
        (
            [Worker(), Worker(), LOADING],
            ["0 of 240 claims", "3 workers: 2 working, 1 loading the model"],
        ),
        ([Worker(answered=240)], ["240 of 240 claims, storing the last verdicts"]),
    ],
)
def test_it_shows_what_is_waited_for(
    workers: list[Worker], lines: list[str], terminal: Screen, clock: Clock
) -> None:
    view = LiveView(terminal, claims=240, clock=clock)
    run = but(total=240, done=0, dead=0)
    view.show(run, [Worker("starting") for _ in workers])
    view.show(run, workers)
    first, *others = drawn(view, terminal)
    assert first.partition("% ")[2] == lines[0]
    assert others == lines[1:]


def test_until_all_is_sent_the_claims_of_the_file_are_the_total(
    terminal: Screen, clock: Clock
) -> None:
    view = LiveView(terminal, claims=19_992, clock=clock)
    view.show(but(total=None), [Worker()])
    assert " 3,463 of 19,992 claims" in drawn(view, terminal)[0]


def test_what_the_collector_waits_for_is_shown_once(screen: Screen, seen: Seen) -> None:
    view = LiveView(screen, claims=240)
    for _ in range(3):
        view.show(None, [Worker()], waiting_for="the store is on a full disk")
    assert seen().count("waiting: the store is on a full disk") == 1
