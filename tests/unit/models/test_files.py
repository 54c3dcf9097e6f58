import errno
import os
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from services.contracts import ContextSpec
from services.contracts.errors import ModelError, UsageError
from services.models import hub
from services.models.files import is_local, model_file, pin_model, weights_bytes
from services.models.fingerprint import fingerprint as fingerprint_of_files
from tests.safetensors_files import write_safetensors

MIB = 1024**2


def fingerprint(directory: Path) -> str:
    return fingerprint_of_files(directory, None, lambda done, total: None)


@pytest.mark.parametrize(
    ("model", "local"),
    [
        ("./model", True),
        ("../model", True),
        ("/models/m", True),
        ("~/model", True),
        ("here", True),
        ("org/model", False),
        ("gpt2", False),
    ],
)
def test_a_directory_and_a_name_on_the_hub_are_distinguished(
    model: str, local: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path)
    assert is_local(model) is local


def test_a_local_model_is_pinned_by_its_path_and_its_files(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model_dir.parent)
    pinned = pin_model(ContextSpec(model="./model", dtype="float32"))
    assert pinned.model == str(model_dir)
    assert pinned.revision == fingerprint(model_dir)
    assert pinned.dtype == "float32"


def test_a_model_in_the_home_directory_is_found(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(model_dir.parent))
    assert pin_model(ContextSpec(model="~/model")).model == str(model_dir)


def test_pinning_again_changes_nothing(model_dir: Path) -> None:
    pinned = pin_model(ContextSpec(model=str(model_dir)))
    assert pin_model(pinned) == pinned


def test_the_same_files_have_the_same_fingerprint_wherever_they_lie(
    model_dir: Path, tmp_path: Path
) -> None:
    before = fingerprint(model_dir)
    assert before.startswith("files-")
    assert fingerprint(model_dir.rename(tmp_path / "moved")) == before


def change(directory: Path) -> None:
    (directory / "config.json").write_text('{"model_type": "Llama"}')


def add(directory: Path) -> None:
    (directory / "more.json").write_text("{}")


def add_below(directory: Path) -> None:
    (directory / "below").mkdir()
    (directory / "below" / "more.json").write_text("{}")


def remove(directory: Path) -> None:
    (directory / "chat_template.jinja").unlink()


def rename(directory: Path) -> None:
    (directory / "chat_template.jinja").rename(directory / "chat_template.bak")


@pytest.mark.parametrize("changed", [change, add, add_below, remove, rename])
def test_another_content_has_another_fingerprint(
    changed: Callable[[Path], None], model_dir: Path
) -> None:
    before = fingerprint(model_dir)
    changed(model_dir)
    assert fingerprint(model_dir) != before


@pytest.mark.parametrize("position", [0, MIB - 1, 5 * MIB - MIB, 5 * MIB - 1])
def test_of_large_files_both_ends_count(position: int, model_dir: Path) -> None:
    weights = model_dir / "model.safetensors"
    with weights.open("wb") as file:
        file.truncate(5 * MIB)
    before = fingerprint(model_dir)
    with weights.open("r+b") as file:
        file.seek(position)
        file.write(b"x")
    assert fingerprint(model_dir) != before


def test_the_size_of_a_large_file_counts(model_dir: Path) -> None:
    weights = model_dir / "model.safetensors"
    prints = set()
    for size in (5 * MIB, 5 * MIB + 1):
        with weights.open("wb") as file:
            file.truncate(size)
        prints.add(fingerprint(model_dir))
    assert len(prints) == 2


def test_hidden_files_do_not_count(model_dir: Path) -> None:
    before = fingerprint(model_dir)
    (model_dir / ".cache").mkdir()
    (model_dir / ".cache" / "lock").write_text("x")
    (model_dir / ".gitattributes").write_text("x")
    assert fingerprint(model_dir) == before


def test_a_model_whose_files_changed_is_not_taken_for_the_old_one(model_dir: Path) -> None:
    pinned = pin_model(ContextSpec(model=str(model_dir)))
    change(model_dir)
    with pytest.raises(ModelError, match=f"but {pinned.revision} is required: its files changed"):
        pin_model(pinned)


@pytest.mark.parametrize("make", [lambda _: None, Path.mkdir, Path.touch])
def test_a_directory_without_a_model_is_reported_with_the_next_step(
    make: Callable[[Path], None], tmp_path: Path
) -> None:
    make(tmp_path / "model")
    with pytest.raises(ModelError, match=r"there is no model at .*/model: .* `make demo`"):
        pin_model(ContextSpec(model=str(tmp_path / "model")))


def test_the_home_of_an_unknown_user_holds_no_model() -> None:
    with pytest.raises(ModelError, match="no-such-user"):
        pin_model(ContextSpec(model="~no-such-user/model"))


def test_a_model_that_this_user_may_not_read_is_reported(
    open_dir: Path, unprivileged: Callable[[], AbstractContextManager[None]]
) -> None:
    (open_dir / "config.json").write_text("{}")
    (open_dir / "model.safetensors").write_bytes(b"weights")
    (open_dir / "model.safetensors").chmod(0)
    with unprivileged(), pytest.raises(ModelError, match=r"cannot be read: .*model\.safetensors"):
        pin_model(ContextSpec(model=str(open_dir)))


@pytest.mark.parametrize("on_the_hub", [False, True])
def test_the_size_of_the_weights_is_known_where_they_are(
    on_the_hub: bool, model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    where: list[str | None] = [None]
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: where[0])
    spec = ContextSpec(model="org/model" if on_the_hub else str(model_dir), revision="c0ffee")
    assert weights_bytes(spec) is None
    for part, size in (("model-1.safetensors", 3), ("model-2.safetensors", 4)):
        (model_dir / part).write_bytes(b"x" * size)
    where[0] = str(model_dir / "config.json")
    assert weights_bytes(spec) == 7


# Adapters.


@pytest.fixture
def adapter_dir(tmp_path: Path) -> Path:
    directory = tmp_path / "adapter"
    directory.mkdir()
    (directory / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 16}')
    write_safetensors(directory / "adapter_model.safetensors", {"layers.0.lora_A.weight": (8, 4)})
    return directory


def with_adapter(model_dir: Path, adapter: Path | str, **changes: object) -> ContextSpec:
    return ContextSpec(model=str(model_dir), adapter=str(adapter), **changes)  # type: ignore[arg-type]


def test_an_adapter_is_pinned_like_its_model(model_dir: Path, adapter_dir: Path) -> None:
    pinned = pin_model(with_adapter(model_dir, adapter_dir))
    assert pinned.adapter == str(adapter_dir)
    assert pinned.adapter_revision is not None and pinned.adapter_revision.startswith("files-")
    assert pin_model(pinned) == pinned
    assert pinned.base == pin_model(ContextSpec(model=str(model_dir)))
    write_safetensors(adapter_dir / "adapter_model.safetensors", {"layers.0.lora_A.weight": (8, 5)})
    other = pin_model(with_adapter(model_dir, adapter_dir))
    assert other.context_id != pinned.context_id
    with pytest.raises(ModelError, match="adapter at .* but files-.* is required: its"):
        pin_model(pinned)


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (None, r"there is no adapter at .*adapter_config\.json"),
        ("{", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"peft_type": "LORA"}', "cannot be read: KeyError"),
        ('{"r": "many"}', "cannot be read: ValueError"),
        ('{"peft_type": "IA3", "r": 8}', "of the kind IA3; engines load only LoRA"),
        ('{"r": 8, "use_dora": true}', "of the kind DoRA; engines load only LoRA"),
        ('{"r": 100}', "rank 100; .* Add --engine-argument=--max-lora-rank=128"),
        ('{"r": 8, "rank_pattern": {"q_proj": 256}}', "rank 256; .*--max-lora-rank=256"),
    ],
)
def test_an_adapter_that_no_engine_accepts_is_reported_before_one_is_started(
    config: str | None, says: str, model_dir: Path, adapter_dir: Path
) -> None:
    path = adapter_dir / "adapter_config.json"
    path.unlink() if config is None else path.write_text(config)
    with pytest.raises(ModelError, match=says):
        pin_model(with_adapter(model_dir, adapter_dir))


def test_an_adapter_of_a_large_rank_is_taken_with_the_argument_for_it(
    model_dir: Path, adapter_dir: Path
) -> None:
    (adapter_dir / "adapter_config.json").write_text('{"r": 128}')
    argument = ("--max-lora-rank=128",)
    assert pin_model(with_adapter(model_dir, adapter_dir, engine_arguments=argument))


def test_a_hub_adapter_is_pinned_by_its_commit(
    model_dir: Path, adapter_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "current_commit", lambda name, _: f"commit-of-{name}")
    monkeypatch.setattr(hub, "small_file", lambda _, name: adapter_dir / name)
    pinned = pin_model(with_adapter(model_dir, "org/adapter"))
    assert (pinned.adapter, pinned.adapter_revision) == ("org/adapter", "commit-of-org/adapter")
    monkeypatch.setattr(hub, "small_file", lambda *_: None)
    with pytest.raises(ModelError, match=r"org/adapter has no adapter_config\.json"):
        pin_model(with_adapter(model_dir, "org/adapter"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--enable-lora",),
        ("--seed=1", "--lora-modules=mine=/adapters/mine"),
        ("--lora-modules", "mine=/adapters/mine"),
        ("--lora_modules=mine=/a",),
    ],
)
def test_an_adapter_among_the_engines_arguments_is_refused_with_the_way_out(
    arguments: tuple[str, ...], model_dir: Path
) -> None:
    with pytest.raises(UsageError, match="all answers would be the base model's; use --adapter"):
        pin_model(ContextSpec(model=str(model_dir), engine_arguments=arguments))


# The hub, which is not there.


def test_a_hub_model_is_pinned_by_its_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []

    def model_info(_: HfApi, model: str, *, revision: str | None, timeout: float) -> object:
        asked.append((model, revision))
        return SimpleNamespace(sha="c0ffee")

    monkeypatch.setattr(HfApi, "model_info", model_info)
    pinned = pin_model(ContextSpec(model="org/model", revision="main"))
    assert (pinned.model, pinned.revision) == ("org/model", "c0ffee")
    assert asked == [("org/model", "main")]


def offline(*_: object, **__: object) -> object:
    raise ConnectionError("the network is down\nwith details")


def test_offline_the_cache_knows_the_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cached = tmp_path / "snapshots" / "c0ffee" / "config.json"
    monkeypatch.setattr(HfApi, "model_info", offline)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: str(cached))
    assert pin_model(ContextSpec(model="org/model")).revision == "c0ffee"


def test_offline_without_a_cache_the_model_cannot_be_had(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HfApi, "model_info", offline)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_, **__: None)
    with pytest.raises(ModelError, match="cannot get the model 'org/model' from the hub") as failed:
        pin_model(ContextSpec(model="org/model"))
    assert "the network is down. Does this machine reach https://" in str(failed.value)
    assert "--model PATH" in str(failed.value)


@pytest.mark.parametrize("name", ["a/b/c", "a b", "-x", "a..b"])
def test_an_impossible_name_is_reported_without_a_request_to_the_hub(name: str) -> None:
    with pytest.raises(ModelError, match="is neither a directory nor a name on the hub"):
        pin_model(ContextSpec(model=name))


def test_a_local_models_file_is_found_or_not(model_dir: Path) -> None:
    spec = ContextSpec(model=str(model_dir))
    assert model_file(spec, "config.json") == model_dir / "config.json"
    assert model_file(spec, "none.json") is None


@pytest.mark.parametrize(
    ("error", "found"),
    [(EntryNotFoundError("no such file"), True), (LocalEntryNotFoundError("offline"), False)],
)
def test_a_hub_models_file_that_is_not_there_is_none_and_offline_is_an_error(
    error: Exception, found: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def download(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(hub, "hf_hub_download", download)
    spec = ContextSpec(model="org/model", revision="c0ffee")
    if found:
        assert model_file(spec, "chat_template.jinja") is None
    else:
        with pytest.raises(ModelError, match="cannot get the model"):
            model_file(spec, "chat_template.jinja")


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (httpx.ReadError("connection reset by peer"), "connection reset by peer"),
        (httpx.ReadTimeout(""), "ReadTimeout"),
        (httpx.RemoteProtocolError("peer closed connection"), "peer closed connection"),
        (OSError("no space left on device"), "no space left on device"),
    ],
)
def test_the_cause_of_an_interrupted_download_is_reported(
    error: Exception, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", broken)
    monkeypatch.setattr(hub, "hf_hub_download", broken)
    spec = ContextSpec(model="org/model", revision="c0ffee")
    with pytest.raises(ModelError, match=f"cannot get the model 'org/model' .*: {said}"):
        hub.fetch_weights(spec)
    with pytest.raises(ModelError, match=f"cannot get the model 'org/model' .*: {said}"):
        hub.small_file(spec, "config.json")


def http_error(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    request = httpx.Request("GET", "https://hub/api/models/org/model")
    return kind("Client Error", response=httpx.Response(status, request=request))


def full_disk(code: int) -> Exception:
    error = RuntimeError("Data processing error: File reconstruction error")
    error.__cause__ = OSError(code, os.strerror(code))
    return error


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "The disk quota is used up in .*HF_HOME"),
        (full_disk(errno.EDQUOT), "The disk quota is used up in .* set HF_HOME to"),
        (full_disk(errno.ENOSPC), "The disk is full in .* set HF_HOME to"),
        (http_error(GatedRepoError, 403), "gated model: accept its terms at .*/org/model, and set"),
        (http_error(RepositoryNotFoundError, 401), "has no such model, or it is private"),
        (http_error(RevisionNotFoundError, 404), "no such revision: correct --revision"),
        (http_error(HfHubHTTPError, 401), "The hub refuses the token: correct HF_TOKEN"),
        (http_error(HfHubHTTPError, 429), "in some minutes, or set HF_TOKEN"),
        (http_error(HfHubHTTPError, 503), "The hub failed to answer: try again later"),
        (httpx.ConnectError("Name or service not known"), "Does this machine reach https://"),
        (httpx.ReadTimeout(""), "Does this machine reach https://.*HTTPS_PROXY"),
        (LocalEntryNotFoundError("cannot find the file"), "Does this machine reach https://"),
    ],
)
def test_each_reason_why_weights_do_not_come_has_its_own_next_step(
    error: Exception, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object, **__: object) -> str:
        raise error

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "snapshot_download", fails)
    with pytest.raises(ModelError, match=f"cannot get the model 'org/model' .*{says}"):
        hub.fetch_weights(ContextSpec(model="org/model", revision="c0ffee"))


def test_a_model_that_is_not_in_the_cache_of_an_offline_machine_is_reported(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*_: object, **__: object) -> str:
        raise LocalEntryNotFoundError("cannot find the file")

    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(hub, "snapshot_download", fails)
    with pytest.raises(
        ModelError, match="HF_HUB_OFFLINE is set, and the model is not in the cache"
    ):
        hub.fetch_weights(ContextSpec(model="org/model", revision="c0ffee"))
