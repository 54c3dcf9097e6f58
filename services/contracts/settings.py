"""All settings: each field is the environment variable `KEEPWARM_<FIELD>`. `make docs` generates
the tables of docs/settings.md from the fields and their docstrings.

Passwords are read from variables such as `KEEPWARM_BROKER_PASSWORD`, or from files named by
`…_PASSWORD_FILE`. They are never passed as arguments, which every user of the machine can read.
"""

import os
import re
import shutil
import sys
import tempfile
from fnmatch import fnmatchcase
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

from services.contracts.addresses import is_host, is_loopback, split_address
from services.contracts.bounds import MAX_BATCH_CLAIMS
from services.contracts.errors import UsageError
from services.contracts.wire import first_fault

METRICS_OFF = "off"
"""Used instead of an address: serve no metrics."""

Seconds = Annotated[float, Field(gt=0, le=7 * 24 * 3600)]


def private_tmp() -> Path:
    """The user's directory for temporary files. Its name is short, because the path of a unix
    socket may have at most 107 bytes.
    """
    return Path(tempfile.gettempdir()) / f"keepwarm-{os.geteuid()}"


def _expanded(path: Path) -> Path:
    try:
        return path.expanduser()
    except RuntimeError as error:
        raise ValueError(f"{path}: there is no such user") from error


def _state_directory() -> Path:
    base = os.environ.get("XDG_STATE_HOME")
    if base:
        return Path(base) / "keepwarm"
    home = _home()
    if home is None:
        raise UsageError(
            "this user has no home directory to keep a store in; name one with --store or "
            "KEEPWARM_STORE_URL"
        )
    return home / ".local" / "state" / "keepwarm"


def _cache_directory() -> Path:
    base = os.environ.get("XDG_CACHE_HOME")
    if base:
        return Path(base) / "keepwarm"
    home = _home()
    if home is None or not os.access(home, os.W_OK | os.X_OK):
        return private_tmp() / "cache"
    return home / ".cache" / "keepwarm"


def _home() -> Path | None:
    """None if neither HOME nor passwd names one, or HOME is the directory that we set instead."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return None if home == private_tmp() else home


class Settings(BaseSettings):
    """The settings of all services. The defaults suit the demo and are safe in production."""

    model_config = SettingsConfigDict(
        env_prefix="KEEPWARM_", frozen=True, extra="ignore", env_ignore_empty=True
    )

    broker_url: Annotated[str | None, Field(repr=False)] = None
    """The broker: `amqp[s]://user@host[:port]/vhost`. Without it, `keepwarm run` starts a private
    node; all other commands need it."""
    broker_password: SecretStr | None = None
    """The user's password. If it is not set, a password in the URL is used."""
    broker_password_file: Path | None = None
    """A file with the password; a newline at its end is ignored. Set only one of the two."""
    broker_admin_password: SecretStr | None = None
    """The password of the administrator that `--admin` names. For the user guest the default is
    `guest`."""
    broker_admin_password_file: Path | None = None
    """A file with the password. Set only one of the two."""
    broker_ca_file: Path | None = None
    """PEM file with the CA certificates that verify the broker, with `amqps://` only. The default
    is the system's."""
    broker_management_url: str | None = None
    """RabbitMQ's management API, where policies that could lose claims are checked with the
    broker's user. The default is `http://HOST:15672`, or `https://HOST:15671` with `amqps://`."""
    broker_cert_file: Path | None = None
    """PEM file with the client certificate, if the broker requires one, with `amqps://` only.
    Without a password it is also used to log in (SASL EXTERNAL)."""
    broker_key_file: Path | None = None
    """PEM file with the client certificate's key, without a passphrase, if it is in a separate
    file."""
    plaintext_hosts: str = ""
    """Hosts or patterns, separated by spaces, to which passwords and claims may be sent
    unencrypted: brokers by `amqp://`, their management API by `http://`, PostgreSQL without
    `sslmode=verify-full`. Connections within this machine are always allowed."""
    broker_connect_timeout_seconds: Seconds = 30
    """How long a command waits for an unreachable broker before it fails."""
    broker_heartbeat_seconds: Annotated[int, Field(ge=5, le=600)] = 30
    """Seconds between AMQP heartbeats on every connection."""
    publish_window: Annotated[int, Field(ge=1, le=10_000)] = 128
    """The maximum number of unconfirmed messages; then the publisher waits."""

    store_url: Annotated[str | None, Field(repr=False)] = None
    """An SQLite file, `sqlite:///FILE`, or `postgresql://user@host/database`. The default is
    described below."""
    store_password: SecretStr | None = None
    """The PostgreSQL user's password."""
    store_password_file: Path | None = None
    """A file with the password. Set only one of the two."""
    store_commit_verdicts: Annotated[int, Field(ge=1, le=1_000_000)] = 20_000
    """The collector commits after this number of claims, …"""
    store_commit_seconds: Seconds = 0.5
    """… or this time after the first message, or after 256 messages, whichever comes first."""

    model: str | None = None
    """A directory or a name on the hub. The default is the demo model:
    `.models/SmolLM2-135M-Instruct` if it exists, else `HuggingFaceTB/SmolLM2-135M-Instruct`. A
    worker without a model serves the contexts that have claims waiting
    ([scheduling.md](scheduling.md))."""
    batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH_CLAIMS)] = 64
    """Claims per message."""
    order_by_evidence: bool = True
    """Send claims with the same evidence one after another, within 16,384 claims or about 64 MiB of
    text, so that an engine reads the evidence once. Results keep the file's order."""

    batches_in_flight: Annotated[int, Field(ge=1, le=256)] = 64
    """The maximum number of batches in flight in a worker; all of them are sent to its engine.
    `KEEPWARM_PREFETCH_SECONDS` may lower it."""
    prefetch_seconds: Seconds = 4
    """A worker measures its claims/s, and keeps no more claims in flight than it can finish in this
    time: it takes fewer batches, and returns a part of one that is too large."""
    grace_seconds: Seconds = 20
    """From SIGTERM to the worker's end: 50 % for the batches in flight, up to 30 % for
    confirmations, the rest in reserve. From SIGTERM to the keeper's: 60 % for workers to finish,
    20 % for the engines' end."""
    walltime_seconds: Seconds | None = None
    """How long the worker or keeper may run. It drains by itself 5 s before the latest moment at
    which the grace period fits in. If it is not set, `SLURM_JOB_END_TIME` is used."""
    engine_python: Path = Path(sys.executable)
    """The interpreter that has vLLM: a path, or a name that is found in `PATH`; by default the
    worker's own. Directories in `PYTHONPATH` are searched last for modules."""
    engine_arguments: str = ""
    """Further arguments for the engine, quoted as in a shell. They override the worker's defaults
    and the context's arguments, and are not part of the context."""
    accepted_engine_arguments: str = ""
    """Further engine arguments that a worker without a model accepts from runs, separated by
    spaces, for example `--attention-backend --quantization-config`. Many of vLLM's arguments load
    code. Those that are always accepted are listed below."""
    accepted_models: str = ""
    """Patterns, separated by spaces, of the models and adapters that a worker without a model
    serves, for example `HuggingFaceTB/* /data/models/*`. The default is all. Directories are
    compared by their real path."""
    engine_start_timeout_seconds: Seconds = 1_800
    """How long an engine may take to start before the start counts as failed."""
    engine_request_timeout_seconds: Seconds = 120
    """How long the engine may take without an answer, while it has requests, before it counts as
    hung and is restarted."""
    tokenizer_timeout_seconds: Seconds = 60
    """How long a worker may take to encode the claims of one request, or to compile a prompt. Then
    it ends itself (SIGABRT), and what it leaves counts as a crash with these claims."""
    engine_start_attempts: Annotated[int, Field(ge=1, le=100)] = 3
    """Failed starts in a row before a worker returns its claims and exits with 4. A worker's first
    start is not retried."""
    claim_failures: Annotated[int, Field(ge=2, le=100)] = 3
    """After this many engine failures, all but the first while it was asked alone, a claim becomes
    a dead claim."""
    other_engine_seconds: Annotated[float, Field(ge=0, le=7 * 24 * 3600)] = 300
    """How long a claim that an engine cannot answer (too long for it, refused, or out of memory)
    waits for another engine. Then it becomes a dead claim. The default for the workers of `keepwarm
    run` is 30."""
    engine_trust_remote_code: bool = False
    """Lets a model repository's own Python code run. This is untrusted code."""

    start_keeper: bool = True
    """Whether a worker starts a keeper if its node has none. Set it to false if the keeper runs as
    a separate service, for example in a container: the worker then waits 20 s for it, and asks it
    for the device."""
    context_idle_seconds: Seconds = 600
    """How long the keeper keeps an engine that no worker uses, and a RabbitMQ node that no run uses
    ([contexts.md](contexts.md))."""
    context_memory_gib: Annotated[float, Field(gt=0)] | None = None
    """The maximum memory of all engines together on one device: of each GPU, or of the node. The
    default is all free memory."""

    # Not in XDG_RUNTIME_DIR, which is removed at logout while engines continue.
    runtime_dir: Path = Field(default_factory=private_tmp)
    """Sockets and logs of keeper and engines, readable by the owner only. The path must be short: a
    socket's path may have at most 107 bytes."""
    cache_dir: Path = Field(default_factory=_cache_directory)
    """Compiled code of engines, durations of their starts, and digests of weights, readable by the
    owner only."""
    cache_gib: Annotated[float, Field(gt=0)] = 20
    """The maximum size of the cache directory. After each start of an engine, the least recently
    used caches are removed until the rest fits. `keepwarm contexts prune` removes old ones."""
    metrics_address: str = "127.0.0.1:0"
    """Where a service serves `/metrics`, `/healthz` and `/readyz`: `host:port`, with an IPv6 host
    in brackets. Port 0 selects a free port, which the event `metrics.serving` reports. `off`
    disables it. If the port is in use, the command ends with exit code 2."""
    metrics_advertise: str | None = None
    """The `host` or `host:port` at which others reach it; workers send it with their heartbeats.
    The default is described below."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """The lowest level that is logged: DEBUG, INFO, WARNING or ERROR."""
    log_format: Literal["console", "json"] = "console"
    """`console` for reading, `json` for processing."""

    @field_validator("store_url")
    @classmethod
    def _without_tilde(cls, url: str | None) -> str | None:
        # A directory named `~` would be dangerous to delete.
        found = re.fullmatch(r"(sqlite[^:]*:///|)(~.*)", url or "", re.DOTALL)
        return f"{found[1]}{_expanded(Path(found[2]))}" if found else url

    @field_validator(
        "broker_password_file",
        "broker_admin_password_file",
        "broker_ca_file",
        "broker_cert_file",
        "broker_key_file",
        "store_password_file",
        "runtime_dir",
        "cache_dir",
    )
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        # Child processes inherit the environment, and may run in other directories.
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

    @field_validator("accepted_engine_arguments")
    @classmethod
    def _names_alone(cls, arguments: str) -> str:
        for argument in arguments.split():
            if re.fullmatch(r"--[a-z][a-z0-9-]*", argument) is None:
                raise ValueError(f"{argument!r}: write names alone, like --attention-backend")
        return arguments

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

    def may_be_plaintext(self, host: str) -> bool:
        """Whether a connection to this host may be made without verified TLS."""
        patterns = self.plaintext_hosts.split()
        return is_loopback(host) or any(fnmatchcase(host, pattern) for pattern in patterns)

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
    """The settings from the environment. `overrides` (flags) that are not None take precedence.

    Raises UsageError that names the invalid variable.
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
