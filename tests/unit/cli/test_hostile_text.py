"""Text from messages, stores and logs never controls the terminal."""

import ast
import csv
import io
import json
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from services.broker import Delivery
from services.cli.broker_view import BrokerSnapshot, broker_tables
from services.cli.contexts import _description
from services.cli.dead import _list_messages
from services.cli.doctor import _row
from services.cli.live_view import LiveView
from services.cli.logs import configure_logs
from services.cli.printable import printable
from services.cli.screen import Screen, print_report, say, show, status_table
from services.contexts.protocol import ContextRecord
from services.contracts import (
    Claim,
    ContextDemand,
    ContextSpec,
    DeadClaim,
    DeadReason,
    Label,
    PromptSpec,
    Run,
    RunAnnouncement,
    StartupPhases,
    Totals,
    Verdict,
    VerdictBatch,
    WorkerHeartbeat,
    load_settings,
)
from services.store import Incoming, Report, RunStatus, Store, export_run, find_run
from services.store.report import Quality, WorkerShare
from services.store.startups import ColdStarts, Startups
from tests.unit.cli.test_screen import REPORT, STATUS, Worker

# Markup of rich, escape codes in both alphabets, line ends, marks of direction, paths, formulas,
# halves of surrogate pairs, and anything else.
HOSTILE = (
    *("[/red]", "[bold]x", "[link=file:///etc/passwd]x[/link]", "\\[", ":smile:", "{0}", "%s"),
    *("\x1b[2J", "\x1b]0;title\x07", "\x1b]8;;http://evil\x1b\\", "\x9b31m", "\x07", "\x08", "\r"),
    *("a\nkeepwarm: all is well", "\u202egnp.exe", "\u2066x", "\u2028", "\ufeff", "\U000e0041"),
    *("../../etc/passwd", "/etc/passwd", "~root", "=cmd|' /C calc'!A0", "@SUM(1)", "+1+1", "-2+3"),
)
OBEYED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
TEXTS = st.one_of(
    st.sampled_from(HOSTILE),
    st.lists(st.sampled_from(HOSTILE), min_size=2, max_size=3).map("".join),
    st.text(st.characters(exclude_characters="\0"), min_size=1, max_size=30),
)


def texts(count: int) -> st.SearchStrategy[list[str]]:
    return st.lists(TEXTS, min_size=count, max_size=count)


def screens() -> Iterator[Screen]:
    """A pipe, and a terminal that is narrow."""
    yield Screen(file=io.StringIO(), width=160, force_terminal=False)
    yield Screen(file=io.StringIO(), width=80, force_terminal=True, color_system=None)


def assert_harmless(screen: Screen, *expected: str) -> None:
    assert isinstance(screen.file, io.StringIO)
    seen = screen.file.getvalue()
    # On a terminal the live view moves the cursor, and hides it.
    own = re.compile(r"\x1b\[(\?25[lh]|\d*[AKGHJ]|2K|1A)|\r") if screen.is_terminal else None
    assert not OBEYED.search(own.sub("", seen) if own else seen), repr(seen)
    for text in expected:
        assert text in seen


@given(texts(6))
def test_the_status_of_a_hostile_run_is_text(bad: list[str]) -> None:
    run_id, source, model, context_id, prompt, label = bad
    run = RunStatus.model_validate(
        STATUS.model_dump()
        | {"run_id": run_id, "source": source, "model": model, "prompt": prompt}
        | {"context_id": context_id, "verdicts": {label: 3}}
    )
    for screen in screens():
        show(screen, status_table([run, STATUS]))
        assert_harmless(screen, STATUS.run_id)


@given(texts(8))
def test_the_report_of_a_hostile_run_is_text(bad: list[str]) -> None:
    run_id, label, model, reason, worker, device, found, gold = bad
    status = RunStatus.model_validate(
        STATUS.model_dump() | {"run_id": run_id, "source": label, "model": model, "prompt": reason}
    )
    report = Report.model_validate(
        REPORT.model_dump()
        | {
            "status": status.model_dump(),
            "verdicts": {label: 3, "INVALID": 2},
            "dead": {reason: 7},
            "input": {"rejected": {found: 2}, "unknown_labels": {gold: 1}},
            "quality": Quality.model_validate(
                REPORT.quality.model_dump() | {"confusion": {gold: {label: 60, "INVALID": 0}}}
            ).model_dump(),
            "workers": [
                WorkerShare.model_validate(
                    REPORT.workers[0].model_dump() | {"worker_id": worker, "device": device}
                ).model_dump()
            ],
            "startups": Startups(
                cold=(
                    ColdStarts(
                        device=device,
                        count=1,
                        median_seconds=1,
                        longest_seconds=1,
                        phases=StartupPhases(load=1.0),
                    ),
                ),
                warm=None,
                joined=None,
            ).model_dump(),
        }
    )
    for screen in screens():
        print_report(screen, report, full=True)
        assert_harmless(screen, "gold (rows)")


@given(texts(4))
def test_texts_of_workers_and_collectors_are_printed_as_text(bad: list[str]) -> None:
    device, host, model, fault = bad
    worker = WorkerHeartbeat(
        worker_id="node-1",
        context_id="ctx-1",
        device=device,
        state="serving",
        claims_per_second=None,
        host=host,
    )
    demand = ContextDemand(
        context=ContextSpec(model=model), claims_ready=1, claims_in_flight=0, workers_warm=0
    )
    for screen in screens():
        show(screen, broker_tables(BrokerSnapshot([worker], [demand], {"verdicts": 1}, fault)))
        assert_harmless(screen, "node-1")


@given(texts(3))
def test_dead_messages_are_text(bad: list[str]) -> None:
    reason, origin, number = bad
    delivery = Delivery(
        queue="dead-messages",
        body=b"\x1b[2J",
        headers={"keepwarm-reason": reason, "keepwarm-origin": origin},
        message_id="",
        redelivered=False,
        tag=1,
        epoch=1,
    )
    for screen in screens():
        _list_messages(screen, type("Messages", (), {"first": lambda _: {number: delivery}})())  # type: ignore[arg-type]
        assert_harmless(screen)


@given(texts(4))
def test_engines_checks_and_progress_are_text(bad: list[str]) -> None:
    model, says, device, state = bad
    record = ContextRecord(
        name="ctx-1-1",
        context=ContextSpec(model=model),
        device=device,
        state="starting",
        says=says,
        socket="s",
        log="l",
        since=0.0,
        last_used=0.0,
    )
    assert not OBEYED.search(printable(_description(record)))
    for screen in screens():
        show(screen, _row("broker", "warning", says))
        say(screen, says)
        with LiveView(screen, claims=10) as view:
            view.show(STATUS, [Worker(state=state)], waiting_for=says)
        assert_harmless(screen)


@given(texts(2))
def test_events_in_the_log_are_text(bad: list[str]) -> None:
    stream = io.StringIO()
    configure_logs(load_settings(), stream)
    structlog.get_logger().warning("context.refused", reason=bad[0], listed=[bad[1]], a=1)
    structlog.reset_defaults()
    line = stream.getvalue()
    assert not OBEYED.search(line), repr(line)


# What comes out of a store.


def hostile_run(bad: list[str], run: Run) -> Incoming:
    claim_id, claim, label, raw, device, detail, source = bad
    labels = (label[:64].strip() or "A", "other")
    prompt = PromptSpec(labels=(Label(name=labels[0], word="a"), Label(name="other", word="b")))
    run = run.model_copy(update={"source": source, "prompt": prompt})
    verdict = Verdict(
        claim_id=claim_id,
        position=0,
        text=claim,
        label=labels[0],
        probabilities=(0.5, 0.5),
        mass=0.9,
        raw_text=raw,
        prompt_tokens=1,
    )
    batch = VerdictBatch(
        run_id=run.run_id,
        batch_id="1",
        labels=prompt.label_names,
        verdicts=(verdict,),
        worker_id="node-1",
        device=device,
        attempt=1,
        engine_seconds=1.0,
    )
    dead = DeadClaim(
        run_id=run.run_id,
        claim=Claim(claim_id=f"{claim_id}-dead"[-256:], position=1, text=claim),
        reason=DeadReason.TOO_LONG,
        detail=detail,
        worker_id="node-1",
        attempt=1,
    )
    announced = RunAnnouncement(
        run=run,
        submission_id="sub-1",
        totals=Totals(lines=2, claims=2, repeated=0, rejected=0),
    )
    return Incoming([announced], [batch], [dead])


@given(texts(7))
def test_an_export_for_spreadsheets_has_no_formula(
    run: Run, tmp_path_factory: pytest.TempPathFactory, bad: list[str]
) -> None:
    directory = tmp_path_factory.mktemp("export")
    try:
        incoming = hostile_run(bad, run)
    except ValidationError:
        return  # refused at the door: blank, or two labels alike
    with Store.open(load_settings(store_url=str(directory / "s.sqlite"))) as store:
        store.write(incoming)
        known = find_run(store, incoming.announcements[0].run.run_id)
        for format in ("jsonl", "csv", "fever", "parquet"):
            assert export_run(store, known, format, directory / format) >= 1
        export_run(store, known, "csv", directory / "raw", formulas=True)
    with (directory / "csv").open(newline="", encoding="utf-8") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    for cell in cells:
        if cell.lstrip()[:1] in ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20"):
            float(cell)
        assert cell[:1] not in ("\t", "\r", "\n")
    with (directory / "raw").open(newline="", encoding="utf-8") as file:
        raw = list(csv.DictReader(file))
    assert raw[0]["claim_id"] == bad[0] and raw[0]["claim"] == bad[1]
    for line in (directory / "jsonl").read_text(encoding="utf-8").split("\n"):
        assert not line or json.loads(line)["claim"] == bad[1]


def test_dead_claims_are_text(
    run: Run, tmp_path: Path, keepwarm: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    store = ("--store", str(tmp_path / "s.sqlite"))
    dead = []
    with Store.open(load_settings(store_url=store[1])) as database:
        for bad in HOSTILE:
            with suppress(ValidationError):  # blank
                incoming = hostile_run([bad] * 7, run)
                database.write(incoming)
                dead.append((incoming.dead[0].run_id, incoming.dead[0].claim.claim_id))
    assert len(dead) > 20
    assert keepwarm("dead", "list", *store) == 0
    for run_id, claim_id in dead:
        assert keepwarm("dead", "show", *store, "--", run_id, claim_id) == 0
    seen = capsys.readouterr().out
    assert not OBEYED.search(seen), repr(seen)
    assert seen.count("too-long") == 2 * len(dead)


@pytest.mark.parametrize("flags", [(), ("--json",)])
def test_a_hostile_file_of_claims_is_text(
    flags: tuple[str, ...],
    model_dir: Path,
    keepwarm: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = [
        *(
            {"id": f"{n}{bad}", "claim": bad, "evidence": bad, "label": bad, bad: bad}
            for n, bad in enumerate(HOSTILE)
        ),
        *({"claim": "", "id": bad} for bad in HOSTILE),
    ]
    name = "\x1b[2J[red].jsonl"
    Path(name).write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    assert keepwarm("validate", name, "--model", str(model_dir), *flags) == 0
    seen = capsys.readouterr()
    assert "claims" in seen.out and not OBEYED.search(seen.out + seen.err)


@pytest.mark.parametrize("run_id", ["../../elsewhere/x", "/tmp/x", "..", "[/red]", "a\x1b[2Jb"])
def test_a_store_of_a_strangers_names_no_file_elsewhere(
    run_id: str,
    stored: Path,
    keepwarm: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    with closing(sqlite3.connect(stored)) as connection, connection:
        connection.execute("UPDATE runs SET run_id = ?", (run_id,))
    before = set(Path.cwd().iterdir())
    for verb in (("export", "--format", "csv"), ("report", "--full"), ("cancel",)):
        assert keepwarm(verb[0], run_id, *verb[1:], "--store", str(stored)) == 0
    assert keepwarm("status", "--store", str(stored)) == 0
    (made,) = set(Path.cwd().iterdir()) - before
    assert made.name.endswith(".csv") and made.is_file()
    seen = capsys.readouterr()
    assert not OBEYED.search(seen.out + seen.err)


# Everything that a command prints.


def calls(path: Path) -> Iterator[ast.Call]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            yield node


def _is_harmless(argument: ast.expr) -> bool:
    if isinstance(argument, ast.Constant):
        return True
    return isinstance(argument, ast.Call) and ast.unparse(argument.func) in (
        "printable",
        "json.dumps",
    )


def test_commands_print_only_printable_text(repository: Path) -> None:
    for path in sorted((repository / "services" / "cli").glob("*.py")):
        for call in calls(path):
            name: Any = ast.unparse(call.func)
            if name == "print":
                assert call.args and _is_harmless(call.args[0]), (path.name, ast.unparse(call))
            # mypy sees to it that functions get a Screen.
            assert name != "Console", (path.name, ast.unparse(call))
