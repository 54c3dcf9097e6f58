"""`keepwarm broker setup`."""

from pathlib import Path
from typing import Annotated

import typer
from pydantic import SecretStr
from rich.text import Text

from services.broker import BrokerAddress, Declares, Publisher
from services.broker.administration import (
    SetupResult,
    amqp_address,
    check_virtual_host,
    has_user,
    make_user,
    make_virtual_host,
    set_limits,
)
from services.broker.management_api import ManagementApi
from services.broker.roles import ROLES
from services.broker.tls import TlsFiles
from services.cli.screen import Screen, plain_table, say, show
from services.cli.secrets_dir import SecretsDir
from services.contracts import Settings, load_settings
from services.contracts.errors import BrokerError, UsageError

_FACTORY_ADMIN = "guest"
_NO_TLS_FILES = dict.fromkeys(("broker_ca_file", "broker_cert_file", "broker_key_file"))


def setup(
    management: Annotated[
        str, typer.Option(metavar="URL", help="The broker's management API; https beyond loopback.")
    ] = "http://127.0.0.1:15672",
    admin: Annotated[
        str, typer.Option(metavar="USER", help="An administrator of the broker.")
    ] = _FACTORY_ADMIN,
    vhost: Annotated[
        str, typer.Option(metavar="NAME", help="The virtual host; users are named NAME-ROLE.")
    ] = "keepwarm",
    secrets: Annotated[
        Path,
        typer.Option(
            metavar="DIRECTORY",
            help="The directory of the roles' passwords; existing passwords are kept.",
        ),
    ] = Path("secrets"),
    workers: Annotated[
        int,
        typer.Option(
            metavar="N",
            min=1,
            max=1_000_000,
            help="Most workers at a time; sets the limits on connections, channels and queues.",
        ),
    ] = 1_000,
    renew: Annotated[bool, typer.Option("--renew", help="Give every role a new password.")] = False,
) -> None:
    """Create a virtual host on a broker, and a user with minimal permissions for each role.

    The broker needs its management plug-in. Enable it on the broker's machine with
    `rabbitmq-plugins enable rabbitmq_management`.

    The administrator's password is in KEEPWARM_BROKER_ADMIN_PASSWORD, or in the file
    named by KEEPWARM_BROKER_ADMIN_PASSWORD_FILE. If neither is set, guest has its
    default password.

    The roles' passwords are random, are written to DIRECTORY/ROLE.password and never
    printed. Rerun the command to create what is missing. Another broker with the same
    directory gets the same passwords. --workers sets the limits on connections,
    channels and queues. See docs/broker.md.
    """
    settings = load_settings()
    check_virtual_host(vhost)
    if admin in (role.user(vhost) for role in ROLES):
        raise UsageError(f"--admin: {admin} is one of Keepwarm's own users; name an administrator")
    with ManagementApi(
        management,
        admin,
        _admin_password(settings, admin),
        tls=TlsFiles.of(settings),
        timeout_seconds=settings.broker_connect_timeout_seconds,
    ) as api:
        api.check_administrator()
        directory = SecretsDir(secrets)
        passwords = _passwords(api, vhost, directory, renew)
        make_virtual_host(api, vhost)
        outcomes = {role.name: make_user(api, role, vhost, passwords[role.name]) for role in ROLES}
        set_limits(api, vhost, workers)
        address = amqp_address(api)
    _declare_topology(settings, address, vhost, passwords)
    _show(vhost, address, directory, outcomes)
    if admin == _FACTORY_ADMIN and settings.secret("broker_admin") is None:
        print("guest has its default password; change it with `rabbitmqctl change_password guest`")


def _admin_password(settings: Settings, admin: str) -> str:
    password = settings.secret("broker_admin")
    if not password and admin != _FACTORY_ADMIN:
        raise UsageError(
            f"no password for {admin}: set KEEPWARM_BROKER_ADMIN_PASSWORD, or name a file in "
            "KEEPWARM_BROKER_ADMIN_PASSWORD_FILE"
        )
    return password or _FACTORY_ADMIN


def _passwords(
    api: ManagementApi, vhost: str, directory: SecretsDir, renew: bool
) -> dict[str, str]:
    """The password of each role. New ones are written before they are sent to the broker, so that
    an interrupted setup can be resumed.
    """
    known = {} if renew else {role.name: directory.read(role.name) for role in ROLES}
    for role in ROLES:
        if not renew and known[role.name] is None and has_user(api, role, vhost):
            raise UsageError(
                f"the broker has {role.user(vhost)} already, but {directory.file(role.name)} is "
                "missing: put its password there, name the right --secrets, or make new passwords "
                "for all roles with --renew"
            )
    return {role.name: known.get(role.name) or directory.write_new(role.name) for role in ROLES}


def _declare_topology(
    settings: Settings, address: str, vhost: str, passwords: dict[str, str]
) -> None:
    """Declare the fixed exchanges and queues, as the collector's user."""
    scheme, _, host = address.partition("://")
    user = next(role.user(vhost) for role in ROLES if role.name == "collector")
    as_collector = settings.model_copy(
        update={
            "broker_url": f"{scheme}://{user}@{host}/{vhost}",
            "broker_password": SecretStr(passwords["collector"]),
            "broker_password_file": None,
            **({} if scheme == "amqps" else _NO_TLS_FILES),
        }
    )
    try:
        Publisher(
            BrokerAddress.from_settings(as_collector),
            "setup",
            window=1,
            declares=Declares("always"),
        ).open(settings.broker_connect_timeout_seconds).close()
    except (BrokerError, UsageError) as error:
        # Through a tunnel to the management API alone, the AMQP port cannot be reached.
        say(
            Screen(),
            f"The queues are not created yet ({error}); the first `keepwarm collect` creates them",
        )


def _show(
    vhost: str, address: str, directory: SecretsDir, outcomes: dict[str, SetupResult]
) -> None:
    console = Screen()
    table = plain_table()
    for name in ("role", "user", "now", "may", "password file"):
        table.add_column(name, overflow="fold")
    for role in ROLES:
        file = Text(str(directory.file(role.name)))
        table.add_row(role.name, role.user(vhost), outcomes[role.name], role.may, file)
    show(console, table)
    # Not in the table, which would fold these lines: they are to be copied.
    print("\nSet for each service, with KEEPWARM_BROKER_PASSWORD_FILE:")
    scheme, _, host = address.partition("://")
    for role in ROLES:
        say(console, f"KEEPWARM_BROKER_URL={scheme}://{role.user(vhost)}@{host}/{vhost}")
    if scheme == "amqp":
        print(
            "This broker has no TLS: outside this machine, passwords and claims can be read on the "
            "network. See docs/broker.md to enable TLS"
        )
