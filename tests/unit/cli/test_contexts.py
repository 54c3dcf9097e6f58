"""What `keepwarm contexts` understands by a name, with records that nobody's engine wrote."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from services.contexts.records import ContextRecord, OwnRecord
from services.contexts.runtime_dir import open_runtime_dir
from services.contracts import ContextSpec, Settings, load_settings

# Two of one context, as on two GPUs, and one of another with the same beginning.
CONTEXTS = {"ctx-0a-11": "model", "ctx-0a-22": "model", "ctx-0b-11": "other"}


@pytest.fixture
def directory() -> Path:
    return open_runtime_dir(load_settings().runtime_dir)


@pytest.fixture
def warm(directory: Path) -> Iterator[None]:
    kept = []
    for name, model in CONTEXTS.items():
        log = directory / f"{name}.log"
        log.write_text(f"the log of {name}\n")
        own = OwnRecord(directory, name)
        own.write(
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
        kept.append(own)
    yield
    for own in kept:
        own.close()


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
    assert "several engines begin with 'ctx-0'" in capsys.readouterr().err
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
    assert "no engine here begins with 'keeper'; warm on this node: " in capsys.readouterr().err
