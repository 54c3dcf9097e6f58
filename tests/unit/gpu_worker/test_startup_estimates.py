"""How soon a context is ready on a node, and which contexts failed there."""

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.contexts.caches import EngineCaches, PastStart
from services.contexts.plan import EnginePlan
from services.contexts.protocol import ContextRecord, State
from services.contracts import ContextSpec, StartupPhases, load_settings
from services.contracts.errors import EngineStartError, KeeperError, ModelError
from services.gpu_worker import scheduling
from services.gpu_worker.scheduling import StartupEstimates
from services.node.device import Device
from tests.unit.clock import Clock

DEVICE = Device("cpu", "Xeon", 2**34, (0,))


@pytest.fixture
def estimates(tmp_path: Path, clock: Clock) -> StartupEstimates:
    settings = load_settings(runtime_dir=tmp_path / "run", cache_dir=tmp_path / "cache")
    return StartupEstimates(DEVICE, settings, clock)


# Contexts that failed here.


def test_a_context_that_failed_is_left_alone_for_a_while_and_then_comes_back(
    estimates: StartupEstimates, clock: Clock
) -> None:
    pause = estimates.failed("ctx-a", EngineStartError("it was evicted"))
    assert 0 < pause <= 10
    assert not estimates.may_try("ctx-a") and estimates.may_try("ctx-b")
    clock.now += pause
    assert estimates.may_try("ctx-a")


def test_each_failure_in_a_row_makes_the_pause_longer_to_a_bound(
    estimates: StartupEstimates,
) -> None:
    pauses = [estimates.failed("ctx-a", ModelError("no such model")) for _ in range(12)]
    assert all(10 <= later * 2**-number <= 20 for number, later in enumerate(pauses[1:5]))
    assert all(900 <= pause <= 1800 for pause in pauses[9:])


def test_what_failed_is_forgotten_once_the_context_answers(estimates: StartupEstimates) -> None:
    for _ in range(8):
        estimates.failed("ctx-a", EngineStartError("out of memory"))
    estimates.answered("ctx-a")
    assert estimates.failed("ctx-a", EngineStartError("out of memory")) <= 10


def test_a_keeper_that_cannot_be_used_keeps_no_context_away_for_long(
    estimates: StartupEstimates,
) -> None:
    assert all(estimates.failed("ctx-a", KeeperError("it restarts")) <= 10 for _ in range(12))


# The time until a context is ready.

A, B, STRANGER = (ContextSpec(model=f"org/{name}", revision="r") for name in ("a", "b", "c"))


def name_of(spec: ContextSpec) -> str:
    return EnginePlan.of(spec, DEVICE, load_settings()).name


def started(directory: Path, spec: ContextSpec, **phases: float) -> None:
    """The engine of `spec` was started here before."""
    caches = EngineCaches(directory / "cache")
    with caches.starting(name_of(spec)):
        pass
    past = PastStart(phases=StartupPhases(**phases), memory_bytes=2**30)
    caches.save_start(name_of(spec), past)


def seconds_of(estimates: StartupEstimates) -> list[float | None]:
    known = estimates.seconds([A, B, STRANGER])
    return [known.get(spec.context_id) for spec in (A, B, STRANGER)]


def test_nothing_is_known_of_contexts_where_none_ever_was(estimates: StartupEstimates) -> None:
    assert seconds_of(estimates) == [None, None, None]


def test_a_context_that_was_here_before_needs_no_fetch_and_a_new_one_does(
    estimates: StartupEstimates, tmp_path: Path
) -> None:
    started(tmp_path, A, imports=30, fetch=300, total=320)
    started(tmp_path, B, imports=0, total=50)
    (tmp_path / "run" / "fork-server-0011.sock").touch()
    assert seconds_of(estimates) == [20, 50, 320]


def test_imports_are_added_if_there_is_no_fork_server(
    estimates: StartupEstimates, tmp_path: Path
) -> None:
    started(tmp_path, A, imports=30, total=50)
    started(tmp_path, B, imports=0, total=40)
    assert seconds_of(estimates) == [50, 70, 70]


@pytest.mark.parametrize(("state", "seconds"), [("warm", 0), ("asleep", 5), ("starting", 20)])
def test_one_that_is_here_is_ready_as_soon_as_its_state_allows(
    state: State,
    seconds: float,
    estimates: StartupEstimates,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started(tmp_path, A, imports=0, total=20)
    record = ContextRecord(
        name=name_of(A),
        context=A,
        device=DEVICE.name,
        state=state,
        socket="",
        log="",
        since=0.0,
        last_used=0.0,
    )
    monkeypatch.setattr(scheduling, "engines", lambda *_: (record,))
    assert estimates.seconds([A]) == {A.context_id: seconds}


@pytest.fixture
def hung_keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """A keeper that accepts no connection: the kernel does, and nobody answers."""
    monkeypatch.setattr(scheduling, "_KEEPER_ANSWER_SECONDS", 0.1)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "run" / "keeper.sock"))
        listener.listen()
        listener.setblocking(False)
        yield listener


def test_a_keeper_that_does_not_answer_has_no_engines_and_is_left_alone_for_a_while(
    estimates: StartupEstimates, hung_keeper: socket.socket, tmp_path: Path, clock: Clock
) -> None:
    started(tmp_path, A, imports=0, total=20)
    for _ in range(3):
        assert estimates.seconds([A]) == {A.context_id: 20}
    hung_keeper.accept()[0].close()
    with pytest.raises(BlockingIOError):
        hung_keeper.accept()
    clock.now += 60
    assert estimates.seconds([A]) == {A.context_id: 20}
    hung_keeper.accept()[0].close()


def test_the_keeper_is_not_asked_when_no_other_context_has_claims(
    estimates: StartupEstimates, hung_keeper: socket.socket
) -> None:
    assert estimates.seconds([]) == {}
    with pytest.raises(BlockingIOError):
        hung_keeper.accept()
