"""Every setting, once: a field here, `KEEPWARM_<FIELD>` outside, a line in docs/settings.md.

Secrets are given as `KEEPWARM_BROKER_PASSWORD` and its like, or as files named by
`…_PASSWORD_FILE`; never on a command line, where every user of the machine can read them.
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import (
    AmqpDsn,
    Field,
    SecretStr,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, SettingsConfigDict

from services.contracts.addresses import is_host, split_address
from services.contracts.bounds import MAX_BATCH_CLAIMS
from services.contracts.errors import UsageError
from services.contracts.wire import first_fault

METRICS_OFF = "off"
"""In place of an address: serve no metrics."""

Seconds = Annotated[float, Field(gt=0, le=7 * 24 * 3600)]


def _runtime_directory() -> Path:
    base = os.environ.get("XDG_RUNTIME_DIR")
    return Path(base) / "keepwarm" if base else _private_tmp()


def _private_tmp() -> Path:
    # Short on purpose: a unix socket's path may have 107 bytes.
    return Path(tempfile.gettempdir()) / f"keepwarm-{os.geteuid()}"


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: there is no such user") from error


def _state_directory() -> Path:
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "keepwarm"


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "keepwarm"


class Settings(BaseSettings):
    """What an operator may set. Defaults suit the demo and are safe in production."""

    model_config = SettingsConfigDict(
        env_prefix="KEEPWARM_", frozen=True, extra="ignore", env_ignore_empty=True
    )

    broker_url: Annotated[str | None, Field(repr=False)] = None
    """`amqp[s]://user@host[:port]/vhost`. No default: `keepwarm run` starts a private node."""
    broker_password: SecretStr | None = None
    broker_password_file: Path | None = None
    broker_admin_password: SecretStr | None = None
    """The administrator's, for `keepwarm broker setup` alone."""
    broker_admin_password_file: Path | None = None
    broker_ca_file: Path | None = None
    """PEM bundle that signs the broker's certificate, for `amqps://`; the system's otherwise."""
    broker_connect_timeout_seconds: Seconds = 30
    """How long a command waits for a broker that is not there before it gives up."""
    broker_heartbeat_seconds: Annotated[int, Field(ge=5, le=600)] = 30
    publish_window: Annotated[int, Field(ge=1, le=10_000)] = 128
    """Messages that may await the broker's confirmation before a publisher has to wait."""

    store_url: Annotated[str | None, Field(repr=False)] = None
    """An SQLAlchemy URL or an SQLite file; `~/.local/state/keepwarm/keepwarm.sqlite` otherwise."""
    store_password: SecretStr | None = None
    store_password_file: Path | None = None
    store_commit_verdicts: Annotated[int, Field(ge=1, le=1_000_000)] = 20_000
    store_commit_seconds: Seconds = 0.5
    """A transaction is committed at whichever comes first: this many verdicts, this long after its
    first, or a lull."""

    model: str | None = None
    """A directory or a hub name; the demo model where neither this nor --model is given."""
    batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH_CLAIMS)] = 64
    """Claims a message."""
    order_by_evidence: bool = True
    """Let claims that share evidence travel together, so that an engine reads it once."""

    batches_in_flight: Annotated[int, Field(ge=1, le=256)] = 64
    """The most batches that a worker has in hand; all of them are at its engine."""
    horizon_seconds: Seconds = 4
    """A worker keeps no more in hand than it finishes in so long, by its own measured speed."""
    grace_seconds: Seconds = 20
    """From SIGTERM to the worker's end, give or take a second for its connections."""
    walltime_seconds: Seconds | None = None
    """The worker's time on its node, from its start: it drains by itself before that is over.
    `SLURM_JOB_END_TIME` counts where this is not set."""
    engine_python: Path = Path(sys.executable)
    """The interpreter that has vLLM; another than the worker's, where they must not share one."""
    engine_arguments: str = ""
    """Further arguments for the engine, as in a shell; they win over what the worker chooses."""
    engine_start_timeout_seconds: Seconds = 1_800
    engine_request_timeout_seconds: Seconds = 120
    """How long the engine may be silent, with claims in its hands, before it counts as hung."""
    engine_start_attempts: Annotated[int, Field(ge=1, le=100)] = 3
    """Failed starts in a row before a worker gives its node up."""
    claim_failures: Annotated[int, Field(ge=2, le=100)] = 3
    """Failures of an engine that a claim may be part of, all but the first alone."""
    engine_trust_remote_code: bool = False
    """Let a model repository's own Python code run. Off: it is code from strangers."""

    context_idle_seconds: Seconds = 600
    """How long an engine that no worker uses stays warm."""
    context_memory_gib: Annotated[float, Field(gt=0)] | None = None
    """Memory that this node's engines may hold together, of each GPU or of the host; all that is
    free otherwise."""

    runtime_dir: Path = Field(default_factory=_runtime_directory)
    """Sockets, records and logs of engines; made for the owner alone, and on this node."""
    cache_dir: Path = Field(default_factory=_cache_directory)
    """What makes the next cold start cheaper: compile caches, and how starts went."""
    metrics_address: str = "127.0.0.1:0"
    """Where a service tells of itself over HTTP, `host:port`. Port 0 is one that is free, so that
    services on one node never collide; `off` is no such server."""
    metrics_advertise: str | None = None
    """`host[:port]` at which others reach that, where it is not the address that it listens at."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    log_format: Literal["console", "json"] = "console"

    @field_validator(
        "broker_password_file",
        "broker_admin_password_file",
        "broker_ca_file",
        "store_password_file",
        "runtime_dir",
        "cache_dir",
    )
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        # Processes that inherit the environment start in other directories.
        return None if path is None else _expanded(path).absolute()

    @field_validator("metrics_address")
    @classmethod
    def _address_or_off(cls, address: str) -> str:
        if address != METRICS_OFF:
            split_address(address)
        return address

    @field_validator("metrics_advertise")
    @classmethod
    def _host_with_or_without_port(cls, address: str | None) -> str | None:
        if address is not None and not is_host(address):
            split_address(address)
        return address

    @field_validator("engine_python")
    @classmethod
    def _absolute_command(cls, path: Path) -> Path:
        found = shutil.which(_expanded(path))
        if found is None:
            raise ValueError(f"{path} is not a program that this user may run")
        return Path(found).absolute()

    @model_validator(mode="after")
    def _one_source_per_secret(self) -> Self:
        for service in ("broker", "broker_admin", "store"):
            if getattr(self, f"{service}_password") and getattr(self, f"{service}_password_file"):
                raise ValueError(
                    f"KEEPWARM_{service.upper()}_PASSWORD and "
                    f"KEEPWARM_{service.upper()}_PASSWORD_FILE are both set; unset one"
                )
        return self

    @property
    def store(self) -> str:
        """The store's URL, with the default filled in."""
        return self.store_url or f"sqlite:///{_state_directory() / 'keepwarm.sqlite'}"

    def secret(self, service: Literal["broker", "broker_admin", "store"]) -> str | None:
        """The password for a service, from the environment or its file.

        Raises UsageError when the file cannot be read.
        """
        password: SecretStr | None = getattr(self, f"{service}_password")
        file: Path | None = getattr(self, f"{service}_password_file")
        if password is not None:
            return password.get_secret_value()
        if file is None:
            return None
        try:
            return file.read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(
                f"KEEPWARM_{service.upper()}_PASSWORD_FILE: cannot read {file}: {error}"
            ) from error


def load_settings(**overrides: object) -> Settings:
    """The settings from the environment, with `overrides` (flags) on top where they are not None.

    Raises UsageError that names the variable at fault.
    """
    try:
        return Settings(**{key: value for key, value in overrides.items() if value is not None})  # type: ignore[arg-type]
    except ValidationError as error:
        fault = first_fault(error)
        field, _, what = fault.partition(": ")
        name = f"KEEPWARM_{field.upper()}" if what else "settings"
        raise UsageError(
            f"{name}: {what or fault}. Every setting is described in docs/settings.md."
        ) from error


def check_broker_url(url: str) -> AmqpDsn:
    """`url` as a checked AMQP URL. Raises UsageError with an example of the right form."""
    try:
        return TypeAdapter(AmqpDsn).validate_python(url)
    except ValidationError as error:
        raise UsageError(
            f"the broker's URL is unusable ({first_fault(error)}); "
            "write it like amqps://worker@broker.example.org:5671/keepwarm"
        ) from error
