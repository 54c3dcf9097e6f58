"""The broker's address and our login there, as pika's connection parameters."""

import os
import socket
import ssl
from dataclasses import dataclass, field
from urllib.parse import unquote

import pika
from pika.credentials import ExternalCredentials

from services.broker.tls import TlsFiles, tls_context
from services.contracts import Settings
from services.contracts.errors import UsageError
from services.contracts.settings import check_broker_url


@dataclass(frozen=True)
class BrokerAddress:
    """A broker's address and our user there. `repr` and `str` never contain the password."""

    host: str
    port: int
    virtual_host: str
    user: str
    password: str | None
    """None if the client certificate is the login."""
    # Each address has a context of its own, which is equal to no other.
    tls: ssl.SSLContext | None = field(compare=False)
    shows_certificate: bool
    heartbeat_seconds: int

    def __repr__(self) -> str:
        scheme = "amqps" if self.tls else "amqp"
        return f"{scheme}://{self.user}@{self.host}:{self.port}/{self.virtual_host.lstrip('/')}"

    @classmethod
    def from_settings(cls, settings: Settings) -> "BrokerAddress":
        """Raises UsageError if there is no URL, if it is not an AMQP URL, or if it would send the
        password to another machine unencrypted.
        """
        if settings.broker_url is None:
            raise UsageError(
                "no broker is configured: set KEEPWARM_BROKER_URL or pass --broker, for example "
                "amqps://worker@broker.example.org:5671/keepwarm"
            )
        url = check_broker_url(settings.broker_url)
        secure = url.scheme == "amqps"
        for name in ("broker_ca_file", "broker_cert_file", "broker_key_file"):
            if getattr(settings, name) is not None and not secure:
                raise UsageError(
                    f"KEEPWARM_{name.upper()} is set but the broker's URL is not amqps://; "
                    "use amqps:// or unset it"
                )
        host = (url.host or "localhost").strip("[]")
        if not secure and not settings.may_be_plaintext(host):
            raise UsageError(
                f"amqp:// would send the password and every claim to {host} unencrypted: use "
                "amqps:// (docs/broker.md), or a tunnel to this machine; if you trust the network "
                f"in between, KEEPWARM_PLAINTEXT_HOSTS={host} allows it"
            )
        password = settings.secret("broker") or (url.password and unquote(url.password))
        if password is None and settings.broker_cert_file is None:
            password = "guest"  # noqa: S105  (RabbitMQ's own default)
        return cls(
            host=host,
            port=url.port or (5671 if secure else 5672),
            virtual_host=unquote((url.path or "").removeprefix("/")) or "/",
            user=unquote(url.username or "guest"),
            password=password,
            tls=tls_context(TlsFiles.of(settings)) if secure else None,
            shows_certificate=settings.broker_cert_file is not None,
            heartbeat_seconds=settings.broker_heartbeat_seconds,
        )

    @property
    def management_url(self) -> str:
        """The default address of the management API: the same host, with TLS if AMQP uses it."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"https://{host}:15671" if self.tls else f"http://{host}:15672"

    def parameters(self, connection_name: str) -> pika.ConnectionParameters:
        return pika.ConnectionParameters(
            host=self.host,
            port=self.port,
            virtual_host=self.virtual_host,
            credentials=(
                ExternalCredentials()
                if self.password is None
                else pika.PlainCredentials(self.user, self.password)
            ),
            ssl_options=pika.SSLOptions(self.tls, self.host) if self.tls else None,
            heartbeat=self.heartbeat_seconds,
            # No blocked_connection_timeout: while an alarm lasts, `Publisher` waits and logs it.
            client_properties={
                "connection_name": f"{connection_name} {socket.gethostname()}:{os.getpid()}"
            },
        )
