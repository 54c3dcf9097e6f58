"""Which weights exactly are meant: whole files, each read once."""

import os
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from services.contracts import ContextSpec
from services.contracts.errors import ModelError
from services.models import fingerprint as module
from services.models.files import pin_model
from services.models.fingerprint import fingerprint, sampled_fingerprint
from tests.safetensors_files import write_safetensors

MIB = 1024 * 1024
LAYERS = 9 * MIB
LONG_AGO = 1_600_000_000


@pytest.fixture
def directory(model_dir: Path) -> Path:
    """A model with a large file of weights."""
    write_safetensors(model_dir / "model.safetensors", {"weight": (LAYERS // 4,)})
    return model_dir


@pytest.fixture(autouse=True)
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if files were written long ago: of those that just changed nothing is remembered."""
    monkeypatch.setattr(module, "_SETTLED_SECONDS", 0.0)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The large files that were opened to be read."""
    opened: list[str] = []
    real = Path.open

    def noted(self: Path, *arguments: object, **options: object) -> object:
        if self.suffix == ".safetensors" and threading.current_thread().name.startswith("weights"):
            opened.append(self.name)
        return real(self, *arguments, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(Path, "open", noted)
    return opened


def change_the_middle(directory: Path) -> None:
    """A fine-tune of some layers: same size, same first and last MiB, same time."""
    weights = directory / "model.safetensors"
    before = weights.stat()
    with weights.open("r+b") as file:
        file.seek(LAYERS // 2)
        file.write(b"fine-tuned")
    os.utime(weights, ns=(before.st_atime_ns, before.st_mtime_ns))


def found(directory: Path, cache: Path | None = None) -> str:
    return fingerprint(directory, cache, lambda done, total: None)


def test_a_change_in_the_middle_of_a_large_file_is_seen(directory: Path, tmp_path: Path) -> None:
    before, sampled = found(directory, tmp_path / "cache"), sampled_fingerprint(directory)
    change_the_middle(directory)
    assert sampled_fingerprint(directory) == sampled  # as it went unseen until now
    assert found(directory) != before
    assert found(directory, tmp_path / "cache") == found(directory)


def test_without_large_files_the_fingerprint_is_what_it_was(model_dir: Path) -> None:
    assert found(model_dir) == sampled_fingerprint(model_dir)


def test_a_known_directory_has_a_known_fingerprint(tmp_path: Path) -> None:
    """Identities of contexts that were stored depend on it."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    assert found(tmp_path / "m") == "files-02fa31253c60b7ce"


def test_a_file_is_read_once(directory: Path, tmp_path: Path, reads: list[str]) -> None:
    cache = tmp_path / "cache"
    first = found(directory, cache)
    assert found(directory, cache) == first and reads == ["model.safetensors"]
    change_the_middle(directory)
    assert found(directory, cache) != first and len(reads) == 2
    assert len(list((cache / "digests").iterdir())) == 1  # the old one is forgotten


def test_a_file_that_just_changed_is_read_again(
    directory: Path, tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_SETTLED_SECONDS", 3600.0)
    assert found(directory, tmp_path / "cache") == found(directory, tmp_path / "cache")
    assert len(reads) == 2


@pytest.mark.parametrize("text", ["", "0" * 63, "x" * 64, "\x00\xff"])
def test_a_broken_entry_of_the_cache_is_not_believed(
    text: str, directory: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    right = found(directory, cache)
    (entry,) = (cache / "digests").iterdir()
    entry.write_text(text, encoding="latin-1")
    assert found(directory, cache) == right


def test_without_a_place_for_the_cache_it_is_read_each_time(
    directory: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    assert found(directory, tmp_path / "file" / "cache") == found(directory)


def test_progress_is_reported_and_the_caller_can_end_it(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_PROGRESS_SECONDS", 0.0)
    told: list[tuple[int, int]] = []
    with pytest.raises(KeyboardInterrupt):

        def on_progress(done: int, total: int) -> None:
            told.append((done, total))
            raise KeyboardInterrupt

        for _ in range(1_000):  # a fast disk may be done before anybody looks
            fingerprint(directory, tmp_path / "cache", on_progress)
            (directory / "model.safetensors").touch()
    size = (directory / "model.safetensors").stat().st_size
    assert told[0][1] == size and 0 <= told[0][0] <= size
    assert not threading.active_count() > 1 or all(
        not each.name.startswith("weights") for each in threading.enumerate()
    )


def test_a_file_that_cannot_be_read_is_reported(
    open_dir: Path, unprivileged: Callable[[], object]
) -> None:
    (open_dir / "config.json").write_text("{}")
    with (open_dir / "model.safetensors").open("wb") as file:
        file.truncate(LAYERS)
    (open_dir / "model.safetensors").chmod(0)
    with unprivileged(), pytest.raises(ModelError, match=r"cannot be read: .*model\.safetensors"):  # type: ignore[attr-defined]
        pin_model(ContextSpec(model=str(open_dir)))


# Runs that were submitted before whole files were read.


def test_an_older_runs_pin_is_kept_where_its_files_are_here(directory: Path) -> None:
    old = sampled_fingerprint(directory)
    spec = ContextSpec(model=str(directory), revision=old)
    assert pin_model(spec) == spec
    assert pin_model(spec.model_copy(update={"revision": None})).revision == found(directory) != old


def test_an_older_runs_pin_is_refused_where_its_files_are_not(directory: Path) -> None:
    spec = ContextSpec(model=str(directory), revision=sampled_fingerprint(directory))
    (directory / "config.json").write_text('{"model_type": "other"}')
    with pytest.raises(ModelError, match="its files changed"):
        pin_model(spec)
