"""Opens the store's database: an SQLAlchemy engine for SQLite or PostgreSQL."""

import os
import re
import sqlite3
import time
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sqlalchemy import URL, Connection, Engine, create_engine, event, make_url
from sqlalchemy.exc import ArgumentError
from sqlalchemy.pool import NullPool

from services.contracts import Settings
from services.contracts.backoff import backoff_seconds
from services.contracts.errors import StoreError, UsageError

_SQLITE_CACHE_KIB = 16_384
_BUSY_SECONDS = 30
_VERIFIED = ("verify-ca", "verify-full")
# A dead server, or a network that drops all packets, is detected within a minute. With libpq's
# defaults it would take hours.
_KEEPALIVE = {
    "keepalives_idle": 20,
    "keepalives_interval": 10,
    "keepalives_count": 4,
    "tcp_user_timeout": 60_000,
}
# Patterns: of a failed connection libpq reports a text without an SQLSTATE.
_CONNECTION_STEPS = {
    "does not match host name": "Use a name that the certificate contains in the store's URL",
    "does not support SSL": (
        "Turn TLS on in the server; without sslmode in the URL, the network can read what is stored"
    ),
    "certificate verify failed": (
        "Its certificate has expired, or is not signed by an authority in the URL's sslrootcert; "
        "`openssl s_client -starttls postgres -connect HOST:PORT` shows which"
    ),
    "root certificate file": "Set sslrootcert in the URL to the authority's certificate",
    "client certificate": "Set sslcert, and sslkey for its key, in the URL",
    "Connection refused|No such file": (
        "Check the host and port in the store's URL, and start the server"
    ),
    "failed to resolve host": "Correct the host in the store's URL",
    "invalid response to SSL": "Check the host and port in the store's URL: this is not PostgreSQL",
    "timeout expired": "Check the host and port in the store's URL, and the network's firewall",
    "no pg_hba.conf entry": "Add this host, user and database to the server's pg_hba.conf",
    "too many (clients|connections)|connection slots": (
        "End other connections, or raise the server's max_connections"
    ),
    "is starting up": "Wait until the server has started, and try again",
    'database ".*" does not exist': (
        "Create it with createdb -E UTF8 -T template0, or correct its name in the store's URL"
    ),
    'role ".*" (does not exist|is not permitted)': (
        "Create this user with the right to log in, or correct its name in the store's URL"
    ),
    'permission denied for database "': "Grant this user CONNECT on it",
    "connection is bad: invalid|invalid (connection option|URI)": (
        "Correct the options in the store's URL; "
        "https://www.postgresql.org/docs/current/libpq-connect.html lists them"
    ),
}
# https://www.postgresql.org/docs/current/errcodes-appendix.html
_STEPS_BY_STATE = {
    "42501": (
        "Use another user, or grant this one SELECT, INSERT, UPDATE and DELETE on all tables and "
        "USAGE on all sequences; to create the tables, CREATE on the schema"
    ),
    "53100": "Free disk space on the database server",
    "25006": "Use a server, or a user, that may write",
}
# PostgreSQL's errors about the values of a row: cardinality, data, integrity,
# check option, program limit (a row or an index entry that is too large), RAISE in a trigger.
# https://www.postgresql.org/docs/current/errcodes-appendix.html
_ABOUT_VALUES = ("21", "22", "23", "44", "54", "P0001")


def open_engine(settings: Settings, *, create: bool, as_it_is: bool = False) -> Engine:
    """Create an engine. With `as_it_is`, an SQLite file's journal mode is not changed.

    Raises UsageError if the URL is invalid, StoreError if an SQLite file cannot be used.
    """
    url = checked_url(settings)
    if url.get_backend_name() == "sqlite":
        _prepare_sqlite_file(url, create=create)
        if not create and is_read_only(url):
            # A new connection per transaction, because a writer may have started meanwhile.
            path = Path(url.database or "").absolute()
            return create_engine(
                url,
                creator=lambda: _connect_read_only(path),
                poolclass=NullPool,
                paramstyle="named",
            )
        engine = create_engine(url, connect_args={"timeout": _BUSY_SECONDS}, paramstyle="named")
        if not as_it_is:
            event.listen(engine, "connect", _set_up_sqlite)
        return engine
    return create_engine(
        url,
        connect_args={
            "connect_timeout": _BUSY_SECONDS,
            **{name: to for name, to in _KEEPALIVE.items() if name not in url.query},
            "application_name": "keepwarm",
            # Overrides PGCLIENTENCODING: claims are in any language.
            "client_encoding": "UTF8",
            # A pooler may give each transaction another connection, which does not have the
            # prepared statements of the previous one (PgBouncer, pool_mode=transaction).
            "prepare_threshold": None,
        },
        pool_pre_ping=True,
    )


def require_utf8(connection: Connection) -> None:
    """Raises StoreError if the database's encoding cannot store every claim."""
    if connection.dialect.name != "postgresql":
        return
    encoding = connection.exec_driver_sql("SHOW server_encoding").scalar_one()
    if encoding != "UTF8":
        url = connection.engine.url
        raise StoreError(
            f"the database {redacted(url)} has the encoding {encoding}, which cannot store claims "
            "in every language; create one in UTF8, for example with createdb -E UTF8 -T template0 "
            f"{url.database}_utf8, and use it as the store"
        )


def checked_url(settings: Settings) -> URL:
    """The store's URL, with its password. Raises UsageError if it is invalid."""
    text = settings.store
    try:
        text.encode()
    except UnicodeEncodeError as error:
        shown_path = text.encode(errors="backslashreplace").decode()
        raise UsageError(
            f"the store's path {shown_path} is not valid UTF-8, which SQLite requires; rename the "
            "directory, or choose another path with --store or --out"
        ) from error
    if "://" not in text:
        return URL.create("sqlite", database=text)
    try:
        url = make_url(text)
    except (ArgumentError, ValueError) as error:
        raise UsageError(
            "the store's URL is not valid; use a file's path, sqlite:///FILE, or "
            "postgresql://user@host/database"
        ) from error
    if url.get_backend_name() == "sqlite":
        if url.query or url.host:
            raise UsageError("an SQLite store is a path: sqlite:///FILE, without options")
        return url.set(drivername="sqlite")
    if url.get_backend_name() not in ("postgresql", "postgres"):  # libpq takes both
        raise UsageError(
            f"the store must be SQLite or PostgreSQL, not {url.get_backend_name()}; see "
            "docs/settings.md"
        )
    _refuse_plaintext(url, settings)
    password = settings.secret("store") or url.password
    return url.set(drivername="postgresql+psycopg", password=password)


def _refuse_plaintext(url: URL, settings: Settings) -> None:
    """Raises UsageError for a PostgreSQL server on another machine whose certificate is not
    verified. For what the URL does not set, libpq reads its environment variables.
    """
    # A service of libpq may name any host, and overrides PGSSLMODE.
    service = url.query.get("service") or os.environ.get("PGSERVICE") or ""
    mode = url.query.get("sslmode") or (not service and os.environ.get("PGSSLMODE")) or "prefer"
    if mode in _VERIFIED:
        return
    named = (
        service,
        url.query.get("host") or url.host or os.environ.get("PGHOST") or "",
        url.query.get("hostaddr") or os.environ.get("PGHOSTADDR") or "",
    )
    hosts = ",".join(each if isinstance(each, str) else ",".join(each) for each in named)
    for host in hosts.split(","):
        if host and not host.startswith(("/", "@")) and not settings.may_be_plaintext(host):
            raise UsageError(
                f"with sslmode={mode} the network could read or change the store's password and "
                f"every claim sent to {host}: add ?sslmode=verify-full&sslrootcert=FILE to the "
                "store's URL; if you trust the network in between, "
                f"KEEPWARM_PLAINTEXT_HOSTS={host} allows it"
            )


def failure(url: URL, cause: BaseException) -> str:
    """The message for a database's error: what it reports, on one line, and the next step."""
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    # Indented lines are libpq's own advice and, after "LINE 1:", the place in the SQL.
    why = " ".join(
        line.strip() for line in lines if not line[:1].isspace() and not line.startswith("LINE ")
    )
    return f"the store {redacted(url)} failed: {why.rstrip('.')}. {_next_step(cause, why)}"


def _next_step(cause: BaseException, why: str) -> str:
    state = getattr(cause, "sqlstate", None)
    if isinstance(cause, sqlite3.Error):
        return "Check that it exists, that this user may write to it, and that its disk is not full"
    if state is not None:
        return _STEPS_BY_STATE.get(state, "See the server's log")
    for pattern, step in _CONNECTION_STEPS.items():
        if re.search(pattern, why):
            return step
    connection = getattr(cause, "pgconn", None)
    if connection is not None and connection.used_password:
        return "Set the right password with KEEPWARM_STORE_PASSWORD or KEEPWARM_STORE_PASSWORD_FILE"
    return "Check the store's URL, and that the server is running"


def is_value_error(cause: BaseException) -> bool:
    """Whether the database or its driver refused a value, so that a retry would fail again. A full
    disk, a lost connection or a conflict with another transaction is not a value error.
    """
    if isinstance(cause, OverflowError | UnicodeError):  # by the driver
        return True
    if isinstance(cause, sqlite3.Error):
        return isinstance(cause, sqlite3.IntegrityError | sqlite3.DataError)
    state = getattr(cause, "sqlstate", None)
    if state is not None:
        return str(state).startswith(_ABOUT_VALUES)
    return type(cause).__name__ == "DataError"  # raised by psycopg itself: NUL in a text


def redacted(url: URL) -> str:
    """The URL as the user writes it, without a password, wherever in the URL it is."""
    shown = url.set(drivername=url.get_backend_name(), query={})
    return shown.render_as_string(hide_password=True)


def _prepare_sqlite_file(url: URL, *, create: bool) -> None:
    if not url.database or url.database == ":memory:":
        raise UsageError("the store must be a file: use sqlite:///FILE, not memory")
    path = Path(url.database)
    try:
        if not path.exists():
            if not create:
                raise StoreError(
                    f"there is no store at {path}; pass its path with --store or "
                    "KEEPWARM_STORE_URL (after `keepwarm run` it is keepwarm.sqlite in its "
                    "output directory)"
                )
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch(mode=0o600)
        with path.open("r+b" if create else "rb"):
            pass
    except OSError as error:
        raise StoreError(
            f"the store {path} cannot be {'written' if create else 'read'} by user "
            f"{os.geteuid()}: {error.strerror}; fix its permissions, or use another with --store"
        ) from error


def is_read_only(url: URL) -> bool:
    """Whether this user cannot write an SQLite file, or cannot create files beside it."""
    if url.get_backend_name() != "sqlite":
        return False
    path = Path(url.database or "").absolute()
    return not (
        os.access(path, os.W_OK, effective_ids=True)
        and os.access(path.parent, os.W_OK | os.X_OK, effective_ids=True)
    )


def _connect_read_only(path: Path) -> sqlite3.Connection:
    # A store without a writer has no write-ahead log beside it. Then the file must be opened as
    # immutable: otherwise SQLite creates files beside it, which we may not. https://www.sqlite.org/wal.html#readonly
    log = path.with_name(f"{path.name}-wal")
    immutable = "" if log.exists() and log.stat().st_size else "&immutable=1"
    return sqlite3.connect(
        f"file:{quote(str(path))}?mode=ro{immutable}",
        uri=True,
        timeout=_BUSY_SECONDS,
        check_same_thread=False,
    )


def _set_up_sqlite(connection: Any, _: Any) -> None:
    # A write-ahead log lets `status` read while the collector writes. FULL: commits survive a power
    # failure, because messages are acknowledged to the broker right after.
    _write_ahead(connection)
    for pragma in (
        "synchronous = FULL",
        f"cache_size = -{_SQLITE_CACHE_KIB}",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _write_ahead(connection: Any) -> None:
    """Set the journal mode, retrying while the database is busy.

    Processes that open a new store at the same time all change its journal mode, and for that lock
    SQLite does not wait.
    """
    deadline = time.monotonic() + _BUSY_SECONDS
    for failures in count(1):
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(backoff_seconds(failures, first_seconds=0.01, longest_seconds=0.5))
        else:
            return
