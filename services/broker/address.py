"""Where the broker is and who we are there, as pika wants to hear it."""

import os
import socket
import ssl
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import pika

from services.contracts import Settings
from services.contracts.errors import UsageError
from services.contracts.settings import check_broker_url


@dataclass(frozen=True)
class BrokerAddress:
    """A broker's address and our name there. Its `repr` and `str` never hold the password."""

    host: str
    port: int
    virtual_host: str
    user: str
    _password: str
    tls: ssl.SSLContext | None
    heartbeat_seconds: int

    def __repr__(self) -> str:
        scheme = "amqps" if self.tls else "amqp"
        return f"{scheme}://{self.user}@{self.host}:{self.port}/{self.virtual_host.lstrip('/')}"

    __str__ = __repr__

    @classmethod
    def from_settings(cls, settings: Settings) -> "BrokerAddress":
        """Raises UsageError when there is no URL, or it is not an AMQP URL."""
        if settings.broker_url is None:
            raise UsageError(
                "no broker is named: set KEEPWARM_BROKER_URL or give --broker, for example "
                "amqps://worker@broker.example.org:5671/keepwarm"
            )
        url = check_broker_url(settings.broker_url)
        secure = url.scheme == "amqps"
        if settings.broker_ca_file is not None and not secure:
            raise UsageError(
                "KEEPWARM_BROKER_CA_FILE is set but the broker's URL is not amqps://; "
                "use amqps:// or unset it"
            )
        return cls(
            host=(url.host or "localhost").strip("[]"),
            port=url.port or (5671 if secure else 5672),
            virtual_host=unquote((url.path or "").removeprefix("/")) or "/",
            user=unquote(url.username or "guest"),
            _password=settings.secret("broker") or unquote(url.password or "guest"),
            tls=tls_context(settings.broker_ca_file) if secure else None,
            heartbeat_seconds=settings.broker_heartbeat_seconds,
        )

    @property
    def password(self) -> str:
        return self._password

    @property
    def management_url(self) -> str:
        """Where the management API is, unless somebody moved it: the same machine and kind of
        connection.
        """
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"https://{host}:15671" if self.tls else f"http://{host}:15672"

    def parameters(self, connection_name: str) -> pika.ConnectionParameters:
        return pika.ConnectionParameters(
            host=self.host,
            port=self.port,
            virtual_host=self.virtual_host,
            credentials=pika.PlainCredentials(self.user, self._password),
            ssl_options=pika.SSLOptions(self.tls, self.host) if self.tls else None,
            heartbeat=self.heartbeat_seconds,
            # No blocked_connection_timeout: while an alarm lasts, `Publisher` waits and says so.
            client_properties={
                "connection_name": f"{connection_name} {socket.gethostname()}:{os.getpid()}"
            },
        )


def tls_context(ca_file: Path | None) -> ssl.SSLContext:
    """Checks certificate and name. Raises UsageError for a file that is no PEM bundle."""
    try:
        return ssl.create_default_context(cafile=ca_file)
    except (OSError, ssl.SSLError) as error:
        raise UsageError(
            f"KEEPWARM_BROKER_CA_FILE: cannot use {ca_file}: {error}; it must be a PEM bundle"
        ) from error
