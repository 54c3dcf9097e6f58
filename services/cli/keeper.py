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
from services.doctor.findings import shared_file_system
from services.node.signals import before_the_walltime_ends, on_stop_signal
from services.node.walltime import seconds_until_drain
from services.telemetry import MetricsServer


def keeper(
    until_idle: Annotated[
        bool,
        typer.Option(
            "--until-idle",
            help="End when there is nothing to keep; so workers start it that find none.",
        ),
    ] = False,
) -> None:
    """Keep this node's engines warm, while workers come and go.

    Workers start a keeper by themselves where there is none, so this is for services that hold
    engines in a place of their own, like a container. SIGTERM, SIGUSR1 and the end of the walltime
    drain the node: no engine is started any more, and those that there are stop as soon as their
    workers let go, or after 60 % of KEEPWARM_GRACE_SECONDS. There is one keeper for each user and
    KEEPWARM_RUNTIME_DIR.
    """
    settings = load_settings()
    configure_logs(settings)
    with MetricsServer(settings) as metrics:
        kept = Keeper(settings)
        server = KeeperServer(kept, for_ever=not until_idle, broker=_broker(settings))
        on_stop_signal(lambda _: server.stop())
        before_the_walltime_ends(server.stop, seconds_until_drain(settings))
        REGISTRY.register(ContextStates(kept.states))
        metrics.serve(server)
        server.serve()


def _broker(settings: Settings) -> Broker | None:
    """A private RabbitMQ node for the runs on this machine, started when the first one asks; none
    where there is no local disk for its data.
    """
    from services.broker.kept_node import KeptNode  # with a client for AMQP

    if shared_file_system(settings.cache_dir):
        return None
    here = [socket.gethostname(), str(settings.runtime_dir)]
    return KeptNode(
        # On disk and not in the runtime directory, which may be in memory.
        settings.cache_dir / content_id("rabbitmq", here, hex_digits=8),
        settings.runtime_dir / "rabbitmq.log",
        settings.context_idle_seconds,
    )
