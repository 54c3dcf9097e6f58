import os
import pwd
import sys
import tempfile
from pathlib import Path

import pytest
from pydantic import ValidationError

from services.contracts import Settings, load_settings
from services.contracts.errors import UsageError
from services.contracts.settings import check_broker_url, private_tmp


def test_without_any_setting_the_defaults_hold() -> None:
    settings = load_settings()
    assert settings.broker_url is None
    assert settings.batch_size == 64
    assert settings.batches_in_flight == 64
    assert not settings.engine_trust_remote_code


@pytest.mark.parametrize(
    ("variable", "text", "field", "value"),
    [
        ("KEEPWARM_BROKER_URL", "amqp://u@h/v", "broker_url", "amqp://u@h/v"),
        ("KEEPWARM_BATCH_SIZE", "7", "batch_size", 7),
        ("keepwarm_batch_size", "7", "batch_size", 7),
        ("KEEPWARM_GRACE_SECONDS", "1.5", "grace_seconds", 1.5),
        ("KEEPWARM_ENGINE_PYTHON", sys.executable, "engine_python", Path(sys.executable)),
        ("KEEPWARM_ENGINE_ARGUMENTS", "--seed 1 --x='a b'", "engine_arguments", None),
        ("KEEPWARM_ENGINE_TRUST_REMOTE_CODE", "1", "engine_trust_remote_code", True),
        ("KEEPWARM_RUNTIME_DIR", "/run/kw", "runtime_dir", Path("/run/kw")),
        ("KEEPWARM_LOG_FORMAT", "json", "log_format", "json"),
        ("KEEPWARM_STORE_URL", "s.sqlite", "store_url", "s.sqlite"),
        ("KEEPWARM_WALLTIME_SECONDS", "3600", "walltime_seconds", 3600),
        ("KEEPWARM_ENGINE_START_ATTEMPTS", "5", "engine_start_attempts", 5),
        ("KEEPWARM_CLAIM_FAILURES", "2", "claim_failures", 2),
        ("KEEPWARM_METRICS_ADDRESS", "off", "metrics_address", "off"),
        ("KEEPWARM_METRICS_ADDRESS", "[::]:9464", "metrics_address", "[::]:9464"),
        ("KEEPWARM_METRICS_ADVERTISE", "node-7", "metrics_advertise", "node-7"),
        ("KEEPWARM_METRICS_ADVERTISE", "node-7:80", "metrics_advertise", "node-7:80"),
    ],
)
def test_a_variable_sets_its_field(
    variable: str, text: str, field: str, value: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, text)
    assert getattr(load_settings(), field) == (text if value is None else value)


@pytest.mark.parametrize("name", sorted(Settings.model_fields))
def test_an_empty_variable_is_like_none_at_all(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_settings()
    monkeypatch.setenv(f"KEEPWARM_{name.upper()}", "")
    assert load_settings() == expected


def test_a_flag_wins_over_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEPWARM_BATCH_SIZE", "7")
    assert load_settings(batch_size=9).batch_size == 9


def test_a_flag_that_was_not_given_leaves_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KEEPWARM_BATCH_SIZE", "7")
    assert load_settings(batch_size=None).batch_size == 7


def test_settings_do_not_change_under_anyones_hands() -> None:
    settings = load_settings()
    with pytest.raises(ValidationError, match="frozen"):
        settings.batch_size = 5


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("KEEPWARM_BATCH_SIZE", "0"),
        ("KEEPWARM_BATCH_SIZE", "1025"),
        ("KEEPWARM_BATCH_SIZE", "many"),
        ("KEEPWARM_BROKER_HEARTBEAT_SECONDS", "4"),
        ("KEEPWARM_PUBLISH_WINDOW", "0"),
        ("KEEPWARM_STORE_COMMIT_SECONDS", "-1"),
        ("KEEPWARM_STORE_COMMIT_VERDICTS", "0"),
        ("KEEPWARM_GRACE_SECONDS", "inf"),
        ("KEEPWARM_GRACE_SECONDS", "nan"),
        ("KEEPWARM_ENGINE_START_TIMEOUT_SECONDS", "0"),
        ("KEEPWARM_ENGINE_TRUST_REMOTE_CODE", "perhaps"),
        ("KEEPWARM_WALLTIME_SECONDS", "0"),
        ("KEEPWARM_WALLTIME_SECONDS", "604801"),
        ("KEEPWARM_ENGINE_START_ATTEMPTS", "0"),
        ("KEEPWARM_CLAIM_FAILURES", "1"),
        ("KEEPWARM_CLAIM_FAILURES", "101"),
        ("KEEPWARM_LOG_LEVEL", "LOUD"),
        ("KEEPWARM_LOG_FORMAT", "xml"),
        ("KEEPWARM_METRICS_ADDRESS", "9464"),
        ("KEEPWARM_METRICS_ADDRESS", "localhost"),
        ("KEEPWARM_METRICS_ADVERTISE", "http://node:9464"),
        ("KEEPWARM_METRICS_ADVERTISE", "node:"),
    ],
)
def test_a_bad_value_is_reported_with_the_name_of_its_variable(
    variable: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(UsageError, match=rf"^{variable}: .*docs/settings\.md") as refused:
        load_settings()
    assert refused.value.exit_code == 2


def test_a_bad_flag_is_reported_with_the_name_of_its_variable() -> None:
    with pytest.raises(UsageError, match="^KEEPWARM_BATCH_SIZE: "):
        load_settings(batch_size=5_000)


@pytest.mark.parametrize("service", ["broker", "broker_admin", "store"])
def test_a_password_from_two_places_is_refused(
    service: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"KEEPWARM_{service.upper()}_PASSWORD"
    monkeypatch.setenv(name, "hunter2")
    monkeypatch.setenv(f"{name}_FILE", "/run/secrets/password")
    with pytest.raises(UsageError, match=f"{name} and {name}_FILE are both set") as refused:
        load_settings()
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("service", ["broker", "broker_admin", "store"])
def test_a_password_comes_from_its_variable(service: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"KEEPWARM_{service.upper()}_PASSWORD", "hunter2 ")
    assert load_settings().secret(service) == "hunter2 "


@pytest.mark.parametrize("content", ["pässword", "pässword\n", "pässword\r\n"])
@pytest.mark.parametrize("service", ["broker", "broker_admin", "store"])
def test_a_password_comes_from_its_file_without_the_end_of_the_line(
    service: str, content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "password"
    file.write_bytes(content.encode())
    monkeypatch.setenv(f"KEEPWARM_{service.upper()}_PASSWORD_FILE", str(file))
    assert load_settings().secret(service) == "pässword"


def test_white_space_inside_a_password_file_belongs_to_the_password(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_text(" pass word \n")
    assert load_settings(broker_password_file=file).secret("broker") == " pass word "


def test_no_password_is_none() -> None:
    assert load_settings().secret("broker") is None
    assert load_settings().secret("store") is None


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_password_file_that_cannot_be_read_is_named(
    content: bytes | None, tmp_path: Path
) -> None:
    file = tmp_path / "password"
    if content is not None:
        file.write_bytes(content)
    settings = load_settings(broker_password_file=file)
    with pytest.raises(UsageError, match=f"KEEPWARM_BROKER_PASSWORD_FILE: cannot read {file}"):
        settings.secret("broker")


def test_a_password_is_not_in_the_text_form_of_the_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("KEEPWARM_BROKER_PASSWORD", "hunter2")
    monkeypatch.setenv("KEEPWARM_STORE_PASSWORD", "hunter2")
    settings = load_settings()
    for shown in (repr(settings), str(settings), settings.model_dump_json()):
        assert "hunter2" not in shown


@pytest.mark.parametrize("field", ["broker_url", "store_url"])
def test_a_password_inside_a_url_is_not_in_the_text_form_of_the_settings(field: str) -> None:
    settings = load_settings(**{field: "amqp://worker:hunter2@broker/v"})
    assert "hunter2" not in repr(settings)
    assert "hunter2" not in str(settings)


def test_the_store_is_in_the_state_directory_unless_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert load_settings().store == f"sqlite:///{tmp_path}/keepwarm/keepwarm.sqlite"
    assert load_settings(store_url="postgresql://h/d").store == "postgresql://h/d"
    monkeypatch.delenv("XDG_STATE_HOME")
    monkeypatch.setenv("HOME", "/home/someone")
    assert load_settings().store == (
        "sqlite:////home/someone/.local/state/keepwarm/keepwarm.sqlite"
    )


@pytest.mark.parametrize("base", ["there", "not-there"])
def test_the_runtime_directory_is_the_users_own_and_stays_at_logout(
    base: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / base))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert load_settings().runtime_dir == tmp_path / "keepwarm-12345"


@pytest.fixture
def _no_home(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the home directory of a user is who has no line in passwd, in a clean environment."""
    for name in ("HOME", "XDG_CACHE_HOME", "XDG_STATE_HOME"):
        monkeypatch.delenv(name, raising=False)

    def nobody_of_that_name(_: int) -> None:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(pwd, "getpwuid", nobody_of_that_name)


@pytest.mark.usefixtures("_no_home")
def test_without_a_home_directory_caches_are_in_the_temporary_one() -> None:
    settings = load_settings()
    assert settings.cache_dir == private_tmp() / "cache"
    with pytest.raises(UsageError, match="no home directory .* --store or KEEPWARM_STORE_URL"):
        _ = settings.store


def test_caches_are_in_the_temporary_directory_where_the_home_directory_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    assert load_settings().cache_dir == private_tmp() / "cache"


@pytest.mark.parametrize("scheme", ["", "sqlite:///"])
def test_a_stores_path_may_begin_with_a_tilde(
    scheme: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KEEPWARM_STORE_URL", f"{scheme}~/x.sqlite")
    assert load_settings().store == f"{scheme}{tmp_path / 'x.sqlite'}"
    with pytest.raises(UsageError, match="KEEPWARM_STORE_URL: .* no such user"):
        load_settings(store_url=f"{scheme}~someone-else/x")


def test_settings_load_for_a_user_who_has_a_number_but_no_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # A container started with `--user 12345` has neither these variables nor a line in passwd.
    for name in ("LOGNAME", "USER", "LNAME", "USERNAME", "XDG_RUNTIME_DIR"):
        monkeypatch.delenv(name, raising=False)

    def nobody_of_that_name(_: int) -> None:
        raise KeyError("getpwuid(): uid not found: 12345")

    monkeypatch.setattr(pwd, "getpwuid", nobody_of_that_name)
    assert load_settings().runtime_dir.is_absolute()


PATHS = (
    "broker_password_file",
    "broker_admin_password_file",
    "broker_ca_file",
    "broker_cert_file",
    "broker_key_file",
    "store_password_file",
    "runtime_dir",
)


@pytest.mark.parametrize("field", PATHS)
@pytest.mark.parametrize("path", ["place", "./place", "~/place"])
def test_a_path_means_the_same_to_a_process_that_starts_elsewhere(
    field: str, path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv(f"KEEPWARM_{field.upper()}", path)
    assert getattr(load_settings(), field) == tmp_path / "place"


def test_the_engines_interpreter_may_be_named_as_in_a_shell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python-with-vllm"
    program.symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("python-with-vllm", "./python-with-vllm", str(program)):
        monkeypatch.setenv("KEEPWARM_ENGINE_PYTHON", name)
        assert load_settings().engine_python == program


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("KEEPWARM_ENGINE_PYTHON", "/no/such/python"),
        ("KEEPWARM_ENGINE_PYTHON", "/etc/passwd"),
        ("KEEPWARM_RUNTIME_DIR", "~no-such-user/place"),
        ("KEEPWARM_ENGINE_PYTHON", "~no-such-user/python"),
    ],
)
def test_a_path_that_leads_nowhere_is_reported_with_the_name_of_its_variable(
    variable: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, text)
    with pytest.raises(UsageError, match=f"^{variable}: "):
        load_settings()


@pytest.mark.parametrize(
    "url", ["amqp://h", "amqps://u@h:5671/v", "amqp://u:p@h/%2f", "amqp://[::1]:5672/"]
)
def test_an_amqp_url_is_taken(url: str) -> None:
    assert check_broker_url(url).scheme in ("amqp", "amqps")


@pytest.mark.parametrize("url", ["", "h", "h:5672", "http://h", "amqp://h:99999", "amqp://[::1"])
def test_another_url_is_refused_with_an_example(url: str) -> None:
    with pytest.raises(UsageError, match="amqps://worker@broker.example.org:5671/keepwarm"):
        check_broker_url(url)


def test_a_refused_url_is_not_repeated_for_it_may_hold_a_password() -> None:
    with pytest.raises(UsageError) as refused:
        check_broker_url("http://worker:hunter2@h:99999/")
    assert "hunter2" not in str(refused.value)
