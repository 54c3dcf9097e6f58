"""`keepwarm worker`."""

import os
import signal
import sys
from collections.abc import Mapping
from typing import Annotated

import typer

from services.cli.context_options import (
    AdapterOption,
    AdapterRevisionOption,
    DTypeOption,
    EngineArgumentOption,
    MaxTokensOption,
    RevisionOption,
    WorkersModelOption,
    context_from_flags,
)
from services.cli.logs import configure_logs
from services.cli.options import (
    BrokerOption,
)
from services.contexts.keeper_client import node_device
from services.contracts import load_settings
from services.contracts.errors import UsageError
from services.contracts.heartbeats import Ending
from services.gpu_worker import Worker
from services.node.signals import on_stop_signal
from services.node.walltime import stop_before_walltime
from services.telemetry import MetricsServer

_ENDINGS: Mapping[int, Ending] = {
    signal.SIGTERM: "SIGTERM",
    signal.SIGINT: "SIGINT",
    signal.SIGUSR1: "SIGUSR1",
    signal.SIGUSR2: "SIGUSR2",
    signal.SIGHUP: "SIGHUP",
}


def worker(
    model: WorkersModelOption = None,
    broker: BrokerOption = None,
    revision: RevisionOption = None,
    dtype: DTypeOption = "bfloat16",
    max_model_tokens: MaxTokensOption = 1024,
    engine_argument: EngineArgumentOption = None,
    adapter: AdapterOption = None,
    adapter_revision: AdapterRevisionOption = None,
    watched_as: Annotated[
        str | None, typer.Option(hidden=True, help="Its id; `run` follows its heartbeats.")
    ] = None,
) -> None:
    """Answer claims, until stopped.

    With --model or KEEPWARM_MODEL it serves that model. Otherwise it serves the context with the
    highest demand, prefers contexts that are warm on this node, and switches when that pays.

    SIGTERM drains the worker: it publishes finished claims, returns the rest within
    KEEPWARM_GRACE_SECONDS, and ends with exit code 0. SIGUSR1, SIGUSR2, SIGHUP (a lost terminal)
    and the end of the walltime (SLURM_JOB_END_TIME or KEEPWARM_WALLTIME_SECONDS) drain it too. A
    second SIGTERM ends it at once.
    """
    settings = load_settings(broker_url=broker)
    configure_logs(settings)
    context = (
        context_from_flags(
            settings,
            model,
            revision,
            dtype,
            max_model_tokens,
            engine_argument,
            adapter,
            adapter_revision,
        )
        if model or settings.model
        else None
    )
    if context is None and (revision or engine_argument or adapter):
        raise UsageError(
            "--revision, --engine-argument and --adapter need a model; name it with --model"
        )
    with MetricsServer(settings) as metrics:
        service = Worker(
            context,
            node_device(settings),
            settings,
            metrics.advertised,
            watched_as=watched_as,
        )
        on_stop_signal(lambda number: service.stop(_ENDINGS[number]))
        stop_before_walltime(settings, lambda: service.stop("walltime"))
        metrics.serve(service)
        service.run()
    if service.tokenizer_hangs:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
