"""What all tests share: where things are, and a model directory made on the spot."""

import json
import shutil
import signal
import sqlite3
import sys
import tempfile
import warnings
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import psutil
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.interpreters import interpreter

# Under nohup it is ignored, and would be by every process that tests start and signal.
signal.signal(signal.SIGHUP, signal.SIG_DFL)

REPOSITORY = Path(__file__).resolve().parent.parent
DEMO_MODEL = REPOSITORY / ".models" / "SmolLM2-135M-Instruct"
SHARED_DATA = REPOSITORY.parent / "shared" / "data"

CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


class _Connection(sqlite3.Connection):
    """Warns as Python 3.13 does when it is dropped while it is open, and pytest fails the test."""

    is_open = False

    def __init__(self, *arguments: object, **options: object) -> None:
        super().__init__(*arguments, **options)
        self.is_open = True

    def close(self) -> None:
        super().close()
        self.is_open = False

    def __del__(self) -> None:
        if self.is_open:
            warnings.warn(f"unclosed database in {self!r}", ResourceWarning, 1, self)


@pytest.fixture(autouse=True, scope="session")
def _unclosed_databases_are_reported() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if sys.version_info < (3, 13):
            connect = partial(sqlite3.connect, factory=_Connection)
            patch.setattr(sqlite3, "connect", connect)
            patch.setattr(sqlite3.dbapi2, "connect", connect)
        yield


def sample_lines() -> list[dict[str, str]]:
    text = (REPOSITORY / "samples" / "claims.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture
def runtime_dir() -> Iterator[Path]:
    """A directory with a short name: the path of a unix socket may have 107 bytes. A keeper that
    commands have left there is ended with the test.
    """
    with tempfile.TemporaryDirectory(prefix="kw-") as name:
        directory = Path(name) / "run"
        yield directory
        if directory.is_dir():
            end_keeper(directory)


def end_keeper(directory: Path) -> None:
    """It drains; by force where it does not."""
    keepers = [
        process for process in psutil.process_iter() if holds(process, directory / "keeper.lock")
    ]
    for keeper in keepers:
        try:
            left = [keeper, *keeper.children(recursive=True)]
            keeper.terminate()
        except psutil.NoSuchProcess:  # it ended meanwhile, and all that it started with it
            continue
        _, alive = psutil.wait_procs(left, timeout=60)
        for process in alive:
            process.kill()
        assert not alive, f"a keeper did not end what it started: {alive}"


def remove_at_once(directory: Path) -> None:
    """Remove a directory in which another process makes and removes files meanwhile."""
    aside = directory.rename(directory.with_name(f"{directory.name}.removed"))
    shutil.rmtree(aside, ignore_errors=True)


def holds(process: psutil.Process, file: Path) -> bool:
    try:
        return any(opened.path == str(file) for opened in process.open_files())
    except psutil.Error:
        return False


@pytest.fixture(scope="session")
def doubles_python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For KEEPWARM_ENGINE_PYTHON: an interpreter with the tests' engine in vLLM's place."""
    return interpreter(tmp_path_factory.mktemp("doubles"))


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with what a worker reads of a model: configuration, tokenizer, chat template.

    The tokenizer is a byte-level BPE, trained on the samples; there are no weights.
    """
    directory = tmp_path_factory.mktemp("small-model")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2_000,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"{line['claim']} {line['evidence']} True False Unknown" for line in sample_lines()]
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "config.json").write_text('{"model_type": "small"}')
    (directory / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "<|im_end|>", "chat_template": CHAT_TEMPLATE})
    )
    return directory
