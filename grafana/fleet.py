"""The dashboard of the fleet: who is there, what is warm, what is lost."""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from grafana.blocks import bars, board, context, lines, number, once, run

_OF = 'context_id=~"$context"'
_SECONDS = f"keepwarm_device_seconds_total{{{_OF}}}"
_USEFUL = f'keepwarm_device_seconds_total{{{_OF},use="inferring"}}'
_COLD = "keepwarm_cold_start_seconds"
_NOT_INTERRUPTED = 'kind!="SIGINT"'
_SERVING = once('keepwarm_workers{state="serving"}', "device", "state")


def _context(what: str) -> str:
    return once(f"keepwarm_context_{what}{{{_OF}}}", "context_id")


def _preemptions(period: str, which: str = "") -> str:
    return once(f"increase(keepwarm_preemptions_total{{{which}}}[{period}])", "kind")


def fleet() -> Dashboard:
    return (
        board("fleet", "Fleet", "Workers, their contexts, and the cost of preemptions.")
        .with_variable(context())
        .with_variable(run())
        .with_panel(
            number(
                "Workers serving",
                f"sum({_SERVING}) or vector(0)",
                "By their heartbeats of the last 20 seconds.",
                good=((0, "red"), (1, "green")),
            )
        )
        .with_panel(
            number(
                "Warm contexts",
                f"count({_context('workers')} > 0) or vector(0)",
                "Contexts served by at least one worker.",
                good=((0, "red"), (1, "green")),
            )
        )
        .with_panel(
            number(
                "Claims waiting",
                f"sum({_context('ready_claims')})",
                "In the queues of the contexts (an estimate).",
            )
        )
        .with_panel(
            number(
                "Goodput",
                f"sum(rate({_USEFUL}[$__rate_interval])) / sum(rate({_SECONDS}[$__rate_interval]))",
                "The share of the devices' time spent on results that were kept.",
                "percentunit",
                decimals=0,
            )
        )
        .with_panel(
            number(
                "Preemptions",
                f"sum({_preemptions('$__range', _NOT_INTERRUPTED)})",
                "Workers that ended, in the range shown.",
                decimals=0,
            )
        )
        .with_panel(
            number(
                "Lost work",
                "sum(increase(keepwarm_store_lost_claims_total[$__range]))",
                "Upper bound of the claims computed again because a worker was lost, in the range "
                "shown.",
                good=((0, "green"), (1, "orange")),
                decimals=0,
            )
        )
        .with_panel(
            lines(
                "Workers by device and state",
                [(once("keepwarm_workers", "device", "state"), "{{device}}, {{state}}")],
                "As they say themselves. One that is killed is shown for 20 seconds more.",
                stacked=True,
            )
        )
        .with_panel(
            lines(
                "Throughput by device",
                [
                    (
                        "sum by (device) (rate(keepwarm_store_verdicts_total[$__rate_interval]))",
                        "{{device}}",
                    )
                ],
                "Verdicts committed per second.",
                stacked=True,
            )
        )
        .with_panel(
            lines(
                "Workers by context",
                [(_context("workers"), "{{context_id}}")],
                "Workers serving each context.",
            )
        )
        .with_panel(
            lines(
                "Claims by context",
                [
                    (_context("ready_claims"), "{{context_id}}, waiting"),
                    (_context("in_flight_claims"), "{{context_id}}, in flight"),
                ],
                "Estimated from messages, workers and the store.",
            )
        )
        .with_panel(
            lines(
                "Contexts of workers by state",
                [
                    (
                        f'sum by (state) (keepwarm_contexts{{job="keepwarm-workers",{_OF}}})',
                        "{{state}}",
                    )
                ],
                "Each worker's own. Two workers may share an engine.",
                stacked=True,
            )
        )
        .with_panel(
            lines(
                "Engines of keepers by state",
                [
                    (
                        'sum by (instance, state) (keepwarm_contexts{job="keepwarm-keepers"}) > 0',
                        "{{instance}}, {{state}}",
                    )
                ],
                "On nodes whose keeper runs as a service.",
                stacked=True,
            )
        )
        .with_panel(
            lines(
                "Device time by use",
                [(f"sum by (use) (rate({_SECONDS}[$__rate_interval]))", "{{use}}")],
                "In devices: 1 is the full time of one device.",
                stacked=True,
            )
        )
        .with_panel(
            lines(
                "Goodput by device",
                [
                    (
                        f"sum by (device) (rate({_USEFUL}[$__rate_interval]))"
                        f" / sum by (device) (rate({_SECONDS}[$__rate_interval]))",
                        "{{device}}",
                    )
                ],
                "The share of time spent on results that were kept.",
                "percentunit",
            )
        )
        .with_panel(
            lines(
                "Preemptions by kind",
                [
                    (f"{_preemptions('$__rate_interval')} > 0", "{{kind}}"),
                ],
                "Workers that ended: a signal, the walltime, a failure, or without notice.",
                stacked=True,
            )
        )
        .with_panel(
            lines(
                "Cost of preemptions",
                [
                    (
                        "sum(rate(keepwarm_store_lost_claims_total[$__rate_interval]))",
                        "computed again, at most",
                    ),
                    (
                        "sum(rate(keepwarm_store_returned_claims_total[$__rate_interval]))",
                        "returned",
                    ),
                ],
                "Claims per second. Returned claims cost no work.",
            )
        )
        .with_panel(
            lines(
                "Starts",
                [
                    (
                        f'sum(increase({_COLD}_count{{phase="total"}}[$__rate_interval]))',
                        "cold: an engine was started",
                    ),
                    (
                        "sum(increase(keepwarm_warm_attaches_total[$__rate_interval]))",
                        "warm: the engine was running",
                    ),
                ],
                "Times that a context became ready for a worker.",
            )
        )
        .with_panel(
            bars(
                "Cold starts by phase",
                (
                    f"sum by (phase) (increase({_COLD}_sum[$__range]))"
                    f" / (sum by (phase) (increase({_COLD}_count[$__range])) > 0)",
                    "{{phase}}",
                ),
                "Mean duration of measured phases in the range shown; total is the whole start.",
                "s",
            )
        )
    )
