"""RabbitMQ's management HTTP API, which tells the next step with every refusal."""

from collections.abc import Mapping
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
        clear_text: bool = False,
    ) -> None:
        """Raises UsageError for a URL that is none, or that would send the password in the clear:
        plain HTTP is for loopback alone, unless the password is sent so anyway (`clear_text`).
        """
        self.host = _checked_host(url, named_by, clear_text)
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
        """Raises BrokerError, as its kinds say, unless one is let in here."""
        me = self.get("whoami")
        if not isinstance(me, dict) or "tags" not in me:
            raise self._unusable("it is not RabbitMQ's management API that answers")
        if "administrator" not in me["tags"]:
            raise self._no_administrator()

    def get(self, *path: str, **parameters: str) -> Any:
        """The JSON at a path; None where there is nothing."""
        response = self._ask("GET", path, parameters=parameters)
        if response.status_code == httpx.codes.NOT_FOUND:
            return None
        self._raise_unless_success(response)
        try:
            return response.json()
        except ValueError as error:
            raise self._unusable(f"{response.url.path} was not answered with JSON") from error

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
                f"{response.request.method} {response.url.path} ended with HTTP "
                f"{response.status_code}: {_reason(response)}"
            )

    def _unreachable(self, error: httpx.HTTPError) -> BrokerError:
        fault = tls_fault(
            error,
            self.host,
            plain="Name the port that does, 15671 by default; http:// is for this machine alone",
            certificate=self._shows_certificate,
        )
        if fault is not None:
            return BrokerUntrusted(f"no TLS connection to {self._url}: {fault}")
        return BrokerUnreachable(
            f"no management API at {self._url}: {str(error) or type(error).__name__}. Is RabbitMQ "
            "running there? Its plug-in may be off: `rabbitmq-plugins enable rabbitmq_management` "
            "on the broker turns it on. --management names another address"
        )

    def _unusable(self, what: str) -> BrokerError:
        return BrokerError(
            f"{self._url} is of no use: {what}. --management names the address of the management "
            "API, port 15672 or with TLS 15671; the broker's log may tell more"
        )

    def _refused(self, reason: str) -> BrokerRefused:
        if reason.startswith("Not "):  # "Not administrator user", "Not management user"
            return self._no_administrator()
        return BrokerRefused(
            f"the broker at {self._url} refused {self._user}: {reason}. Check --admin, and the "
            "password in KEEPWARM_BROKER_ADMIN_PASSWORD or …_PASSWORD_FILE; guest may come from "
            "the broker's own machine only"
        )

    def _no_administrator(self) -> BrokerRefused:
        return BrokerRefused(
            f"{self._user} is no administrator of the broker at {self._url}: name one with "
            f"--admin, or run `rabbitmqctl set_user_tags {self._user} administrator` on the broker"
        )


def _checked_host(url: str, named_by: str, clear_text: bool) -> str:
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        host = None
    # The URL is not repeated, for it may hold a password.
    if host is None or parts.scheme not in ("http", "https") or parts.query or parts.fragment:
        raise UsageError(f"{named_by}: not an address like https://broker.example.org:15671")
    if "@" in parts.netloc:
        raise UsageError(
            f"{named_by}: no user and no password belong there, for a password on a command line "
            "can be read by every user of this machine; give the user with --admin, and "
            "KEEPWARM_BROKER_ADMIN_PASSWORD or …_PASSWORD_FILE"
        )
    if parts.scheme == "http" and not clear_text and not is_loopback(host):
        raise UsageError(
            f"{named_by}: http to {host} shows the password to the network; use https, or a "
            f"tunnel, `ssh -N -L 15672:127.0.0.1:15672 {host}`, with {named_by} http://127.0.0.1:15672"
        )
    return host


def _reason(response: httpx.Response) -> str:
    try:
        return str(response.json()["reason"])[:200]
    except (ValueError, KeyError, TypeError):
        return response.reason_phrase or "no reason given"
