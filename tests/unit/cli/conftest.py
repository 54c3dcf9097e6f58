"""The command, run in this process, with nothing of the person's own in reach."""

import gc
import io
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import structlog

from services.cli.main import main
from services.cli.screen import Screen
from services.contracts import Run, RunAnnouncement, Totals, Verdict, VerdictBatch, load_settings
from services.store import Incoming, Store


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No model, no store and no terminal of the person's; and what a command sets is set back."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("KEEPWARM_RUNTIME_DIR", str(tmp_path / "runtime"))
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("NO_COLOR", "1")
    for name in ("FORCE_COLOR", "GITHUB_ACTIONS", "PY_COLORS"):
        monkeypatch.delenv(name, raising=False)
    threshold = gc.get_threshold()
    handlers = {
        number: signal.getsignal(number)
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    }
    yield
    gc.set_threshold(*threshold)
    for number, handler in handlers.items():
        signal.signal(number, handler)
    structlog.reset_defaults()


@pytest.fixture
def keepwarm(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """`keepwarm("status", "--json")` gives the exit code."""

    def run_command(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["keepwarm", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        code = ended.value.code
        return 0 if code is None else int(code)

    return run_command


@pytest.fixture
def screen() -> Screen:
    """A console that remembers; `screen.file.getvalue()` is what a person would see."""
    return Screen(file=io.StringIO(), width=160, force_terminal=False)


@pytest.fixture
def incoming(run: Run) -> Incoming:
    """A run as it is announced."""
    totals = Totals(lines=3, claims=3, repeated=0, rejected=0)
    return Incoming([RunAnnouncement(run=run, submission_id="sub-1", totals=totals)])


@pytest.fixture
def stored(run: Run, tmp_path: Path) -> Path:
    """A store with a run of three claims, two of them done."""
    path = tmp_path / "store.sqlite"
    store = Store.open(load_settings(store_url=str(path)))
    verdicts = tuple(
        Verdict(
            claim_id=f"c{n}",
            position=n,
            text=f"Claim {n}.",
            gold="SUPPORTS",
            label=label,
            probabilities=(0.5, 0.25, 0.25),
            mass=0.75,
            raw_text="True",
            prompt_tokens=10,
        )
        for n, label in enumerate(("SUPPORTS", "REFUTES"))
    )
    batch = VerdictBatch(
        run_id=run.run_id,
        batch_id="b",
        labels=run.prompt.label_names,
        verdicts=verdicts,
        worker_id="node-1",
        device="Tesla T4",
        attempt=1,
        engine_seconds=2.0,
    )
    totals = Totals(lines=5, claims=3, repeated=1, rejected=1)
    store.write(
        Incoming([RunAnnouncement(run=run, submission_id="sub-1", totals=totals)], [batch], [])
    )
    store.close()
    return path
