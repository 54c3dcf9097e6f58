"""`keepwarm keeper`."""

import socket
from typing import Annotated

import typer
from prometheus_client import REGISTRY

from services.cli.logs import configure_logs
from services.contexts.keeper import Keeper
from services.contexts.keeper_server import Broker, KeeperServer
from services.contexts.metrics import ContextStates
from services.contracts import Settings, load_settings
from services.contracts.values import content_id
from services.node.file_systems import network_file_system
from services.node.signals import on_stop_signal
from services.node.walltime import stop_before_walltime
from services.telemetry import MetricsServer


def keeper(
    until_idle: Annotated[
        bool,
        typer.Option(
            "--until-idle",
            help="End when no engine is left; workers start the keeper with this flag.",
        ),
    ] = False,
    no_broker: Annotated[
        bool,
        typer.Option(
            "--no-broker",
            help="Lend no RabbitMQ node to runs; a run starts its own keeper with this flag.",
        ),
    ] = False,
) -> None:
    """Keep this node's engines warm while workers start and stop.

    Workers start a keeper if there is none, so this command is only for separate services, such as
    a container for engines. SIGTERM, SIGUSR1 and the end of the walltime drain the node: no engine
    starts, and each engine stops when its workers release it, or after 60 % of
    KEEPWARM_GRACE_SECONDS. There is one keeper for each user and KEEPWARM_RUNTIME_DIR.
    """
    settings = load_settings()
    configure_logs(settings)
    with MetricsServer(settings) as metrics:
        keeper = Keeper(settings)
        broker = None if no_broker else _broker(settings)
        server = KeeperServer(keeper, until_idle=until_idle, broker=broker)
        on_stop_signal(lambda _: server.stop())
        stop_before_walltime(settings, server.stop)
        REGISTRY.register(ContextStates(lambda: [record.state for record in keeper.records()]))
        metrics.serve(server)
        server.serve()


def _broker(settings: Settings) -> Broker | None:
    """A private RabbitMQ node for runs on this machine, started for the first one.

    None when its data would be on a network file system.
    """
    from services.broker.kept_node import KeptNode  # imports an AMQP client

    if network_file_system(settings.cache_dir):
        return None
    here = [socket.gethostname(), str(settings.runtime_dir)]
    return KeptNode(
        # Not in the runtime directory, which may be in memory.
        settings.cache_dir / content_id("rabbitmq", here, hex_digits=8),
        settings.runtime_dir / "rabbitmq.log",
        settings.context_idle_seconds,
    )
