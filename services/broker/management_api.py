"""A client of RabbitMQ's management HTTP API whose errors name the next step."""

from collections.abc import Callable, Mapping
from typing import Any, Self
from urllib.parse import quote, urlsplit

import httpx

from services.broker.tls import TlsFiles, tls_context, tls_fault
from services.contracts.addresses import is_loopback
from services.contracts.errors import (
    BrokerError,
    BrokerRefused,
    BrokerUnreachable,
    BrokerUntrusted,
    UsageError,
)


class ManagementApi:
    """The management API of one broker. Use it as a context manager."""

    def __init__(
        self,
        url: str,
        user: str,
        password: str,
        *,
        tls: TlsFiles,
        timeout_seconds: float,
        named_by: str = "--management",
        may_be_plaintext: Callable[[str], bool] = is_loopback,
    ) -> None:
        """Raises UsageError for an invalid URL, or one that would send the password unencrypted:
        plain HTTP is only for hosts that `may_be_plaintext` allows.
        """
        self.host = _checked_host(url, named_by, may_be_plaintext)
        self._url = url.rstrip("/")
        self._user = user
        self._shows_certificate = tls.cert_file is not None
        self._http = httpx.Client(
            base_url=self._url,
            auth=httpx.BasicAuth(user, password),
            verify=tls_context(tls),
            timeout=timeout_seconds,
            # A proxy from the environment would read the password.
            trust_env=False,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def check_administrator(self) -> None:
        """Raises BrokerError, or a subclass, unless the user is an administrator."""
        me = self.get("whoami")
        if not isinstance(me, dict) or "tags" not in me:
            raise self._unusable("the server there is not RabbitMQ's management API")
        if "administrator" not in me["tags"]:
            raise self._no_administrator()

    def get(self, *path: str, **parameters: str) -> Any:
        """The JSON at a path; None if the path does not exist."""
        response = self._ask("GET", path, parameters=parameters)
        if response.status_code == httpx.codes.NOT_FOUND:
            return None
        self._raise_unless_success(response)
        try:
            return response.json()
        except ValueError as error:
            raise self._unusable(f"the answer to {response.url.path} is not JSON") from error

    def put(self, *path: str, body: Mapping[str, Any]) -> None:
        self._raise_unless_success(self._ask("PUT", path, body))

    def _ask(
        self,
        method: str,
        path: tuple[str, ...],
        body: Mapping[str, Any] | None = None,
        parameters: Mapping[str, str] | None = None,
    ) -> httpx.Response:
        where = "/".join(("/api", *(quote(part, safe="") for part in path)))
        try:
            response = self._http.request(method, where, json=body, params=parameters)
        except httpx.HTTPError as error:
            raise self._unreachable(error) from error
        if response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise self._refused(_reason(response))
        return response

    def _raise_unless_success(self, response: httpx.Response) -> None:
        if not response.is_success:
            raise self._unusable(
                f"{response.request.method} {response.url.path} failed with HTTP "
                f"{response.status_code}: {_reason(response)}"
            )

    def _unreachable(self, error: httpx.HTTPError) -> BrokerError:
        fault = tls_fault(
            error,
            self.host,
            plain="Use the port that does, 15671 by default; http:// is for this machine only",
            certificate=self._shows_certificate,
        )
        if fault is not None:
            return BrokerUntrusted(f"no TLS connection to {self._url}: {fault}")
        return BrokerUnreachable(
            f"no management API at {self._url}: {str(error) or type(error).__name__}. Check that "
            "RabbitMQ is running there and that its plug-in is on (`rabbitmq-plugins enable "
            "rabbitmq_management` on the broker), or pass another address with --management"
        )

    def _unusable(self, what: str) -> BrokerError:
        return BrokerError(
            f"{self._url} is not usable: {what}. Pass the address of the management API with "
            "--management (port 15672, or 15671 with TLS), and see the broker's log"
        )

    def _refused(self, reason: str) -> BrokerRefused:
        if reason.startswith("Not "):  # "Not administrator user", "Not management user"
            return self._no_administrator()
        return BrokerRefused(
            f"the broker at {self._url} refused {self._user}: {reason}. Check --admin, and the "
            "password in KEEPWARM_BROKER_ADMIN_PASSWORD or …_PASSWORD_FILE; the user guest can "
            "connect only from the broker's own machine"
        )

    def _no_administrator(self) -> BrokerRefused:
        return BrokerRefused(
            f"{self._user} is not an administrator of the broker at {self._url}: pass one with "
            f"--admin, or run `rabbitmqctl set_user_tags {self._user} administrator` on the broker"
        )


def _checked_host(url: str, named_by: str, may_be_plaintext: Callable[[str], bool]) -> str:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    # The URL is not repeated, because it may contain a password.
    if host is None or parts.scheme not in ("http", "https") or parts.query or parts.fragment:
        raise UsageError(f"{named_by}: not an address like https://broker.example.org:15671")
    if "@" in parts.netloc:
        raise UsageError(
            f"{named_by}: the URL must not contain a user or password, because every user of this "
            "machine can read command lines; pass the user with --admin, and the password in "
            "KEEPWARM_BROKER_ADMIN_PASSWORD or …_PASSWORD_FILE"
        )
    if parts.scheme == "http" and not may_be_plaintext(host):
        raise UsageError(
            f"{named_by}: http to {host} sends the password unencrypted; use https, or a "
            f"tunnel, `ssh -N -L 15672:127.0.0.1:15672 {host}`, with {named_by} http://127.0.0.1:15672"
        )
    return host


def _reason(response: httpx.Response) -> str:
    try:
        return str(response.json()["reason"])[:200]
    except (ValueError, KeyError, TypeError):
        return response.reason_phrase or "no reason given"
