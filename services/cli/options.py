"""The flags for the broker and the store."""

from typing import Annotated
from urllib.parse import parse_qs, urlsplit

import typer


def _without_password(url: str | None) -> str | None:
    try:
        parts = urlsplit(url or "")
    except ValueError as error:
        raise typer.BadParameter(f"not a URL: {error}") from error
    if parts.netloc and (parts.password or "password" in parse_qs(parts.query)):
        raise typer.BadParameter(
            "every user of this machine can read passwords in arguments; set "
            "KEEPWARM_BROKER_PASSWORD or KEEPWARM_STORE_PASSWORD, or name a file in …_PASSWORD_FILE"
        )
    return url


BrokerOption = Annotated[
    str | None,
    typer.Option(
        "--broker",
        help="The broker, amqp\\[s]://user@host/vhost; its password is KEEPWARM_BROKER_PASSWORD. "
        "[dim]\\[env: KEEPWARM_BROKER_URL][/dim]",
        callback=_without_password,
        show_default=False,
    ),
]
StoreOption = Annotated[
    str | None,
    typer.Option(
        "--store",
        help="An SQLite file, or postgresql://user@host/database. "
        "[dim]\\[env: KEEPWARM_STORE_URL][/dim]",
        callback=_without_password,
        show_default=False,
    ),
]
