"""Records: an engine lives for others as long as its keeper holds its lock, and no longer."""

import fcntl
import json
import os
import stat
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from services.contexts.records import ContextRecord, RecordFile, live_records
from services.contracts import ContextSpec

NAME = "ctx-0011-2233"


def record(
    context: ContextSpec, directory: Path, name: str = NAME, since: float = 1
) -> ContextRecord:
    return ContextRecord(
        name=name,
        context=context,
        device="Xeon",
        state="warm",
        socket=str(directory / f"{name}.sock"),
        log=str(directory / f"{name}.log"),
        since=since,
        last_used=since,
    )


@pytest.fixture
def own(tmp_path: Path) -> Iterator[RecordFile]:
    kept = RecordFile(tmp_path, NAME)
    yield kept
    kept.close()


def leave_behind(directory: Path, context: ContextSpec) -> None:
    """As a keeper does that is killed."""
    pid = os.fork()
    if pid == 0:
        RecordFile(directory, NAME).write(record(context, directory))
        os._exit(0)
    os.waitpid(pid, 0)
    (directory / f"{NAME}.sock").touch()
    (directory / f"{NAME}.log").touch()


def test_a_record_whose_keeper_lives_is_believed(
    tmp_path: Path, context: ContextSpec, own: RecordFile
) -> None:
    own.write(record(context, tmp_path))
    assert live_records(tmp_path) == [record(context, tmp_path)]
    assert live_records(tmp_path) == [record(context, tmp_path)]  # looking does no harm


def test_a_record_of_a_newer_keeper_is_believed_as_far_as_it_is_understood(
    tmp_path: Path, context: ContextSpec, own: RecordFile
) -> None:
    own.write(record(context, tmp_path))
    path = tmp_path / f"{NAME}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "mood": "good"}))
    assert live_records(tmp_path) == [record(context, tmp_path)]


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")  # awake() has a thread
def test_a_record_whose_keeper_was_killed_goes_with_its_socket_and_its_lock(
    tmp_path: Path, context: ContextSpec
) -> None:
    leave_behind(tmp_path, context)
    assert (tmp_path / f"{NAME}.json").exists()
    assert live_records(tmp_path) == []
    # The log may say why.
    assert [path.name for path in tmp_path.iterdir()] == [f"{NAME}.log"]


def test_a_record_without_any_lock_is_stale(tmp_path: Path, context: ContextSpec) -> None:
    (tmp_path / f"{NAME}.json").write_text(record(context, tmp_path).model_dump_json())
    assert live_records(tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_an_engine_that_ended_well_leaves_no_record(tmp_path: Path, context: ContextSpec) -> None:
    kept = RecordFile(tmp_path, NAME)
    kept.write(record(context, tmp_path))
    kept.close()
    assert not list(tmp_path.iterdir())


def test_records_come_in_the_order_in_which_engines_were_first_wanted(
    tmp_path: Path, context: ContextSpec
) -> None:
    kept = [RecordFile(tmp_path, f"ctx-{n}") for n in range(3)]
    for number, since in enumerate((30.0, 10.0, 20.0)):
        kept[number].write(record(context, tmp_path, f"ctx-{number}", since))
    assert [found.name for found in live_records(tmp_path)] == ["ctx-1", "ctx-2", "ctx-0"]
    for one in kept:
        one.close()


def test_two_keepers_never_have_one_record(tmp_path: Path, own: RecordFile) -> None:
    with pytest.raises(BlockingIOError, match="held by another keeper"):
        RecordFile(tmp_path, NAME)


def test_a_lock_that_is_removed_while_it_is_being_taken_is_taken_again(
    tmp_path: Path, context: ContextSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Between opening it and locking it, whoever held it removes it.
    flock, removed = fcntl.flock, []

    def late(descriptor: int, how: int) -> None:
        if not removed:
            removed.append((tmp_path / f"{NAME}.lock").unlink())
        flock(descriptor, how)

    monkeypatch.setattr("services.contracts.locks.fcntl.flock", late)
    kept = RecordFile(tmp_path, NAME)
    kept.write(record(context, tmp_path))
    assert removed and live_records(tmp_path) == [record(context, tmp_path)]
    kept.close()


def test_a_symlink_is_not_believed_and_what_it_leads_to_stays(
    tmp_path: Path, context: ContextSpec
) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(record(context, tmp_path).model_dump_json())
    (tmp_path / f"{NAME}.json").symlink_to(elsewhere)
    lock = RecordFile(tmp_path, NAME)
    assert live_records(tmp_path) == []
    assert elsewhere.exists()
    lock.close()


def test_a_lock_that_is_a_symlink_is_not_followed(tmp_path: Path, context: ContextSpec) -> None:
    (tmp_path / f"{NAME}.json").write_text(record(context, tmp_path).model_dump_json())
    (tmp_path / f"{NAME}.lock").symlink_to(tmp_path / "elsewhere")
    assert live_records(tmp_path) == []
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make another user's file")
def test_another_users_record_is_not_believed(
    tmp_path: Path, context: ContextSpec, own: RecordFile
) -> None:
    own.write(record(context, tmp_path))
    os.chown(tmp_path / f"{NAME}.json", 65534, 65534)
    assert live_records(tmp_path) == []
    assert (tmp_path / f"{NAME}.json").exists()


@pytest.mark.parametrize("nonsense", [b"", b"{", b"\xff", b'{"name": "ctx-1"}', b"[]"])
def test_a_record_that_cannot_be_read_hides_no_other(
    tmp_path: Path, context: ContextSpec, own: RecordFile, nonsense: bytes
) -> None:
    other = RecordFile(tmp_path, "ctx-other")
    other.write(record(context, tmp_path, "ctx-other"))
    (tmp_path / f"{NAME}.json").write_bytes(nonsense)
    assert [found.name for found in live_records(tmp_path)] == ["ctx-other"]
    other.close()


def test_a_reader_never_sees_half_a_record(
    tmp_path: Path, context: ContextSpec, own: RecordFile
) -> None:
    own.write(record(context, tmp_path))
    over = threading.Event()

    def write_on() -> None:
        for number in range(300):
            long = record(context, tmp_path).model_copy(update={"says": "x" * number * 100})
            own.write(long)
        over.set()

    writer = threading.Thread(target=write_on)
    writer.start()
    while not over.is_set():
        assert len(live_records(tmp_path)) == 1
    writer.join()


def test_records_are_for_their_owner_alone(
    tmp_path: Path, context: ContextSpec, own: RecordFile
) -> None:
    own.write(record(context, tmp_path))
    for suffix in ("json", "lock"):
        assert stat.S_IMODE((tmp_path / f"{NAME}.{suffix}").stat().st_mode) == 0o600


def test_a_record_that_cannot_be_written_is_said_once_and_is_written_when_it_can_be(
    tmp_path: Path, context: ContextSpec, own: RecordFile
) -> None:
    new = tmp_path / f"{NAME}.new"
    for _ in range(2):
        new.mkdir()
        with capture_logs() as logs:
            for _ in range(3):
                own.write(record(context, tmp_path))
        assert [entry["event"] for entry in logs] == ["record.unwritable"]
        assert live_records(tmp_path) == []
        new.rmdir()
        own.write(record(context, tmp_path))
        assert live_records(tmp_path) == [record(context, tmp_path)]
        (tmp_path / f"{NAME}.json").unlink()
