"""Every setting, once: a field here, `KEEPWARM_<FIELD>` outside. The tables of docs/settings.md are
made from what stands here (`make docs`).

Secrets are given as `KEEPWARM_BROKER_PASSWORD` and its like, or as files named by
`…_PASSWORD_FILE`; never on a command line, where every user of the machine can read them.
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
"""In place of an address: serve no metrics."""

Seconds = Annotated[float, Field(gt=0, le=7 * 24 * 3600)]


def private_tmp() -> Path:
    """A directory for temporary files of this user's. Its name is short, for a unix socket's path
    may have 107 bytes.
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
    """None where neither HOME nor passwd names one, or HOME is what we put in its place."""
    try:
        home = Path.home()
    except RuntimeError:
        return None
    return None if home == private_tmp() else home


class Settings(BaseSettings):
    """What an operator may set. Defaults suit the demo and are safe in production."""

    model_config = SettingsConfigDict(
        env_prefix="KEEPWARM_", frozen=True, extra="ignore", env_ignore_empty=True
    )

    broker_url: Annotated[str | None, Field(repr=False)] = None
    """`amqp[s]://user@host[:port]/vhost`. Without it `keepwarm run` starts a private node; the
    other verbs need it."""
    broker_password: SecretStr | None = None
    """The user's password. A password in the URL is used where this one is not set."""
    broker_password_file: Path | None = None
    """A file with the password instead; a line end after it is dropped. Set only one of the two."""
    broker_admin_password: SecretStr | None = None
    """The password of the administrator that `--admin` names; that of the user guest is `guest`
    unless told otherwise."""
    broker_admin_password_file: Path | None = None
    """A file with the password instead. Set only one of the two."""
    broker_ca_file: Path | None = None
    """PEM bundle that signs the broker's certificate, with `amqps://` only; the system's
    otherwise."""
    broker_management_url: str | None = None
    """RabbitMQ's management API, which is asked as the broker's user for policies that would lose
    claims; `http://HOST:15672` otherwise, or with `amqps://` `https://HOST:15671`."""
    broker_cert_file: Path | None = None
    """PEM file with a certificate of ours, for a broker that wants one, with `amqps://` only.
    Without a password it is the login as well (SASL EXTERNAL)."""
    broker_key_file: Path | None = None
    """PEM file with the certificate's key, without a passphrase, where that is in a file of its
    own."""
    plaintext_hosts: str = ""
    """Hosts, or patterns of them, separated by spaces, to which passwords and claims may travel in
    the clear: brokers by `amqp://`, PostgreSQL without `sslmode=verify-full`. Connections within
    this machine always may."""
    broker_connect_timeout_seconds: Seconds = 30
    """How long a command waits for a broker that is not there before it gives up."""
    broker_heartbeat_seconds: Annotated[int, Field(ge=5, le=600)] = 30
    """Seconds between AMQP heartbeats on every connection."""
    publish_window: Annotated[int, Field(ge=1, le=10_000)] = 128
    """Messages that may await the broker's confirmation before a publisher has to wait."""

    store_url: Annotated[str | None, Field(repr=False)] = None
    """An SQLite file, `sqlite:///FILE`, or `postgresql://user@host/database`; see below
    otherwise."""
    store_password: SecretStr | None = None
    """The PostgreSQL user's password."""
    store_password_file: Path | None = None
    """A file with the password instead. Set only one of the two."""
    store_commit_verdicts: Annotated[int, Field(ge=1, le=1_000_000)] = 20_000
    """The collector commits at so many claims …"""
    store_commit_seconds: Seconds = 0.5
    """… or so long after the first message, whichever comes first; also at 256 messages."""

    model: str | None = None
    """A directory or a name on the hub; the demo model otherwise, which is
    `.models/SmolLM2-135M-Instruct` where that exists, else `HuggingFaceTB/SmolLM2-135M-Instruct`. A
    worker without a model serves what claims wait for ([taking.md](taking.md))."""
    batch_size: Annotated[int, Field(ge=1, le=MAX_BATCH_CLAIMS)] = 64
    """Claims a message."""
    order_by_evidence: bool = True
    """Among 16,384 claims or about 64 MiB of text, put those with the same evidence beside each
    other before they are sent, so that an engine reads it once. Results keep the file's order."""

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
    """The worker's or keeper's time on its node, from its start. It drains by itself 5 s before the
    grace period would no longer fit in. Where it is not set, `SLURM_JOB_END_TIME` counts."""
    engine_python: Path = Path(sys.executable)
    """The interpreter that has vLLM: a path, or a name that is found in `PATH`; by default the
    worker's own. Directories in `PYTHONPATH` are searched last for modules."""
    engine_arguments: str = ""
    """Further arguments for the engine, as in a shell. They win over the worker's choice and the
    context's, and are not part of the context."""
    accepted_engine_arguments: str = ""
    """Further engine arguments that a worker without a model accepts from runs, separated by
    spaces: `--attention-backend --quantization-config`. Many of vLLM's arguments load code; see
    below for those that are always accepted."""
    accepted_models: str = ""
    """Patterns, separated by spaces, of the models and adapters that a worker without a model
    serves: `HuggingFaceTB/* /data/models/*`; all otherwise. Directories are compared by their real
    path."""
    engine_start_timeout_seconds: Seconds = 1_800
    """How long an engine may take to start before the start counts as failed."""
    engine_request_timeout_seconds: Seconds = 120
    """How long the engine may take without an answer, while it has requests, before it counts as
    hung and is restarted."""
    engine_start_attempts: Annotated[int, Field(ge=1, le=100)] = 3
    """Failed starts in a row before a worker returns its claims and exits with 4. The first start
    of a worker is tried once only."""
    claim_failures: Annotated[int, Field(ge=2, le=100)] = 3
    """Failures of an engine that a claim may be part of, all but the first alone; then it is a dead
    claim."""
    other_engine_seconds: Annotated[float, Field(ge=0, le=7 * 24 * 3600)] = 300
    """How long a claim waits for another engine, at engines that cannot answer it: too long there,
    refused, or more than their memory holds. Then it is a dead claim. The workers of `keepwarm run`
    have 30 unless this is set."""
    engine_trust_remote_code: bool = False
    """Lets a model repository's own Python code run. This is untrusted code."""

    start_keeper: bool = True
    """Whether a worker that finds no keeper on its node starts one. False where the keeper is a
    service of its own, like a container: the worker then waits 20 s for it, and asks it for the
    device."""
    context_idle_seconds: Seconds = 600
    """How long an engine stays that no worker uses, and a keeper's RabbitMQ node that no run uses
    ([contexts.md](contexts.md))."""
    context_memory_gib: Annotated[float, Field(gt=0)] | None = None
    """How much memory engines may hold together on one device, of each GPU or of the node; all that
    is free otherwise."""

    # Not in XDG_RUNTIME_DIR: that is removed at logout, and engines outlive it.
    runtime_dir: Path = Field(default_factory=private_tmp)
    """Sockets, records and logs of keeper and engines, for the owner alone. Short: a socket's path
    may have 107 bytes."""
    cache_dir: Path = Field(default_factory=_cache_directory)
    """What engines compile, what their starts took, and digests of weights, for the owner alone."""
    cache_gib: Annotated[float, Field(gt=0)] = 20
    """How large it may be. After each start of an engine the caches that were unused for longest
    are removed until the rest fits; `keepwarm contexts prune` removes old ones."""
    metrics_address: str = "127.0.0.1:0"
    """Where a service serves `/metrics`, `/healthz` and `/readyz`: `host:port`, with an IPv6 host
    in brackets. Port 0 is one that is free; the event `metrics.serving` says which. `off`: nowhere.
    A port that is taken ends the command with exit code 2."""
    metrics_advertise: str | None = None
    """`host` or `host:port` at which others reach it; workers tell it with their reports. See below
    otherwise."""
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = "INFO"
    """DEBUG, INFO, WARNING or ERROR."""
    log_format: Literal["console", "json"] = "console"
    """`console` for people, `json` for machines."""

    @field_validator("store_url")
    @classmethod
    def _without_tilde(cls, url: str | None) -> str | None:
        return str(_expanded(Path(url))) if url is not None and url.startswith("~") else url

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
        """Whether a connection to this host may do without verified TLS."""
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
