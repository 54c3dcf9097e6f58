"""What `keepwarm contexts` understands by a name, with records of no keeper's engines."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from services.contexts.protocol import ContextRecord
from services.contracts import ContextSpec, Settings, load_settings
from services.contracts.errors import KeeperError
from services.node.runtime_dir import open_runtime_dir

# Two of one context, as on two GPUs, and one of another with the same beginning.
CONTEXTS = {"ctx-0a-11": "model", "ctx-0a-22": "model", "ctx-0b-11": "other"}


@pytest.fixture
def directory() -> Path:
    return open_runtime_dir(load_settings().runtime_dir)


@pytest.fixture
def warm(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = []
    for name, model in CONTEXTS.items():
        log = directory / f"{name}.log"
        log.write_text(f"the log of {name}\n")
        records.append(
            ContextRecord(
                name=name,
                context=ContextSpec(model=model),
                device="H100",
                state="warm",
                socket=str(directory / f"{name}.sock"),
                log=str(log),
                since=1.0,
                last_used=1.0,
            )
        )
    monkeypatch.setattr("services.cli.contexts.engines", lambda _: records)


@pytest.fixture
def evicted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the keeper was asked to end. It ends all but what ends with 22, in time."""
    asked: list[str] = []

    def evict(_: Settings, wanted: tuple[str, ...]) -> tuple[str, ...]:
        asked.extend(wanted)
        return tuple(name for name in wanted if not name.endswith("22"))

    monkeypatch.setattr("services.cli.contexts.evict_engines", evict)
    return asked


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize(
    ("wanted", "going"),
    [
        ("ctx-0a", ["ctx-0a-11", "ctx-0a-22"]),
        ("0a", ["ctx-0a-11", "ctx-0a-22"]),
        ("ctx-0a-1", ["ctx-0a-11"]),
        ("ctx-0b", ["ctx-0b-11"]),
    ],
)
def test_all_engines_of_a_context_are_evicted_by_its_name(
    keepwarm: Callable[..., int],
    evicted: list[str],
    capsys: pytest.CaptureFixture[str],
    wanted: str,
    going: list[str],
) -> None:
    assert keepwarm("contexts", "evict", wanted) == 0
    assert evicted == going
    assert capsys.readouterr().out.split() == [name for name in going if not name.endswith("22")]


@pytest.mark.usefixtures("warm")
def test_a_beginning_of_several_contexts_is_refused(
    keepwarm: Callable[..., int], evicted: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert keepwarm("contexts", "evict", "ctx-0") == 2
    assert "several engine names begin with 'ctx-0'" in capsys.readouterr().err
    assert evicted == []


@pytest.mark.usefixtures("warm")
def test_the_log_of_one_engine_is_shown_and_never_that_of_several(
    keepwarm: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert keepwarm("contexts", "logs", "ctx-0a-2") == 0
    assert capsys.readouterr().out == "the log of ctx-0a-22\n"
    assert keepwarm("contexts", "logs", "ctx-0a") == 2
    assert "name one: ctx-0a-11, ctx-0a-22" in capsys.readouterr().err


@pytest.mark.usefixtures("warm")
def test_what_an_engine_left_that_never_came_up_is_shown_where_no_live_one_is_meant(
    keepwarm: Callable[..., int], directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (directory / "ctx-0c-11.log").write_text("RuntimeError: out of memory\n")
    (directory / "ctx-0a-23.log").write_text("long ago\n")
    assert keepwarm("contexts", "logs", "ctx-0c") == 0
    assert keepwarm("contexts", "logs", "ctx-0a-2") == 0
    assert capsys.readouterr().out == "RuntimeError: out of memory\nthe log of ctx-0a-22\n"
    (directory / "ctx-0c-22.log").touch()
    assert keepwarm("contexts", "logs", "ctx-0c") == 2
    assert "name one: ctx-0c-11, ctx-0c-22" in capsys.readouterr().err
    assert keepwarm("contexts", "logs", "keeper") == 2
    assert (
        "no engine's name begins with 'keeper'; engines on this node: " in capsys.readouterr().err
    )


def test_a_log_is_shown_though_the_keeper_does_not_answer(
    keepwarm: Callable[..., int],
    directory: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hang(_: Path) -> None:
        raise KeeperError("this node's keeper did not answer within 10 s")

    monkeypatch.setattr("services.cli.contexts.engines", hang)
    (directory / "ctx-0c-11.log").write_text("its last words\n")
    assert keepwarm("contexts", "logs", "ctx-0c") == 0
    assert capsys.readouterr().out == "its last words\n"
    assert keepwarm("contexts", "list") == 4
    assert "did not answer" in capsys.readouterr().err


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Unused for 40 days, for 10, and for 40 again, but that is of an engine that is here."""
    monkeypatch.setenv("KEEPWARM_CACHE_DIR", str(tmp_path / "cache"))
    for name, days in (("ctx-0c-11", 40), ("ctx-0d-11", 10), ("ctx-0a-11", 40)):
        kernel = tmp_path / "cache" / name / "kernel"
        kernel.parent.mkdir(parents=True)
        kernel.write_bytes(b"x" * 2**20)
        then = time.time() - days * 86_400
        for path in (kernel, kernel.parent):
            os.utime(path, (then, then))
    return tmp_path / "cache"


@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize(
    ("flags", "removed"),
    [
        ([], ["ctx-0c-11"]),
        (["--older-than", "50"], []),
        (["--older-than", "0"], ["ctx-0c-11", "ctx-0d-11"]),
    ],
)
def test_prune_removes_caches_that_were_unused_for_long_and_are_not_in_use(
    keepwarm: Callable[..., int],
    caches: Path,
    capsys: pytest.CaptureFixture[str],
    flags: list[str],
    removed: list[str],
) -> None:
    before = {path.name for path in caches.iterdir() if path.is_dir()}
    assert keepwarm("contexts", "prune", "--dry-run", *flags) == 0
    listed, summary = capsys.readouterr()
    assert [line.split()[0] for line in listed.splitlines()] == removed
    assert f"{len(removed)}.0 MiB would be removed, {3 - len(removed)}.0 MiB are left in" in summary
    assert {path.name for path in caches.iterdir() if path.is_dir()} == before
    assert keepwarm("contexts", "prune", *flags) == 0
    assert capsys.readouterr().out == listed
    assert {path.name for path in caches.iterdir() if path.is_dir()} == before - {*removed}
    if removed:
        assert listed.splitlines()[0] == "ctx-0c-11  1.0 MiB, unused for 40 d"
