"""What the unit tests share: no settings from outside, a run, and a way to be nobody."""

import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple

import hypothesis
import psutil
import pytest
from tokenizers import Tokenizer

from services.contracts import ContextSpec, PromptSpec, Run
from services.models.tokenizer import ModelTokenizer
from tests.unit.clock import Clock
from tests.unit.tokenizers_of_models import (
    CHAT_TEMPLATE,
    byte_level,
    gemma,
    llama_3,
    metaspace,
    unigram,
)

# The same examples every time: a green tree stays green. HYPOTHESIS_PROFILE=search looks further.
hypothesis.settings.register_profile("unit", max_examples=40, deadline=None, derandomize=True)
hypothesis.settings.register_profile("search", max_examples=2_000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "unit"))

_NOBODY = 65534


@pytest.fixture(autouse=True)
def _no_settings_from_outside(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.upper().startswith("KEEPWARM_"):
            monkeypatch.delenv(name)


@pytest.fixture(scope="session")
def context() -> ContextSpec:
    return ContextSpec(model="models/small", revision="files-0011223344556677")


@pytest.fixture(scope="session")
def prompt() -> PromptSpec:
    return PromptSpec()


@pytest.fixture(scope="session")
def run(context: ContextSpec, prompt: PromptSpec) -> Run:
    return Run(source="claims.jsonl", source_digest="src-00", context=context, prompt=prompt)


@pytest.fixture
def spec(model_dir: Path) -> ContextSpec:
    return ContextSpec(model=str(model_dir))


@pytest.fixture(scope="session")
def raw(definitions: dict[str, bytes]) -> dict[str, Tokenizer]:
    """The same tokenizers without Keepwarm, to compare with."""
    return {name: Tokenizer.from_buffer(definition) for name, definition in definitions.items()}


@pytest.fixture(scope="session")
def tokenizers(definitions: dict[str, bytes]) -> dict[str, ModelTokenizer]:
    """Of each family; those of bytes have a chat template."""
    with_chat = ("byte-level", "llama-3")
    return {
        name: ModelTokenizer(definition, {}, CHAT_TEMPLATE if name in with_chat else None)
        for name, definition in definitions.items()
    }


@pytest.fixture(scope="session")
def tokenizer(tokenizers: dict[str, ModelTokenizer]) -> ModelTokenizer:
    return tokenizers["byte-level"]


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).resolve().parents[2]


@pytest.fixture
def open_dir() -> Iterator[Path]:
    """A directory that every user may look into, unlike `tmp_path`."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


@pytest.fixture
def unprivileged() -> Callable[[], AbstractContextManager[None]]:
    """`with unprivileged():` permissions count, for root as well."""

    @contextmanager
    def without_privileges() -> Iterator[None]:
        if os.geteuid() != 0:
            yield
            return
        os.seteuid(_NOBODY)
        try:
            yield
        finally:
            os.seteuid(0)

    return without_privileges


@pytest.fixture(scope="session")
def definitions() -> dict[str, bytes]:
    """A `tokenizer.json` of each family."""
    families: dict[str, Callable[[], Tokenizer]] = {
        "byte-level": byte_level,
        "llama-3": llama_3,
        "metaspace": metaspace,
        "gemma": gemma,
        "unigram": unigram,
    }
    return {name: make().to_str().encode() for name, make in families.items()}


@pytest.fixture
def model_dir(tmp_path: Path, definitions: dict[str, bytes]) -> Path:
    """All of a model but its weights."""
    directory = tmp_path / "model"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "tokenizer.json").write_bytes(definitions["byte-level"])
    (directory / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    return directory


@pytest.fixture
def tmp_path() -> Iterator[Path]:
    """Shorter than pytest's own: engines' sockets are made here, and a path may have 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="kw-") as name:
        yield Path(name)


@pytest.fixture
def clock() -> Clock:
    return Clock()


class _Partition(NamedTuple):
    mountpoint: str
    fstype: str


@pytest.fixture
def mounted(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, str], None]:
    """`mounted(path, "nfs4")`: a file system of this type is mounted there."""

    def mount(path: Path, kind: str) -> None:
        mounts = [_Partition("/", "ext4"), _Partition(str(path), kind)]
        monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)

    return mount
