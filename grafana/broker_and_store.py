"""The dashboard of broker and store: what waits, what comes again, how far behind."""

from grafana_foundation_sdk.builders.dashboard import Dashboard

from grafana.blocks import board, context, lines, number, run

_CLAIMS = 'queue=~"claims.($context)"'
# Each worker and each collector has one of its own for notices or reports: they are many.
_HOUSE = 'queue!~"(claims|notices|presence).+"'
_READY, _UNACKED = (
    "rabbitmq_detailed_queue_messages_ready",
    "rabbitmq_detailed_queue_messages_unacked",
)


def _total(what: str) -> str:
    return f"sum(rate(rabbitmq_global_messages_{what}_total[$__rate_interval]))"


def _quantiles(histogram: str) -> list[tuple[str, str]]:
    by_bucket = f"sum by (le) (rate({histogram}_bucket[$__rate_interval]))"
    return [
        (f"histogram_quantile({part}, {by_bucket})", f"{part:.0%}") for part in (0.5, 0.9, 0.99)
    ]


def broker_and_store() -> Dashboard:
    return (
        board(
            "broker-and-store",
            "Broker and store",
            "Messages that wait, come again or could not be used; how fast verdicts are stored.",
        )
        .with_variable(context())
        .with_variable(run())
        .with_panel(
            number(
                "Ready", f"sum({_READY}{{{_CLAIMS}}})", "Batches of claims waiting for a worker."
            )
        )
        .with_panel(
            number(
                "Unacknowledged",
                f"sum({_UNACKED}{{{_CLAIMS}}})",
                "Batches of claims in flight at workers.",
            )
        )
        .with_panel(
            number(
                "Dead messages",
                'max(keepwarm_queue_messages{queue="dead-messages"})',
                "Messages that could not be used. `keepwarm dead list` shows them.",
                good=((0, "green"), (1, "red")),
            )
        )
        .with_panel(
            number(
                "Alarms",
                "max(rabbitmq_alarms_memory_used_watermark)"
                " + max(rabbitmq_alarms_free_disk_space_watermark)",
                "The broker's alarms for memory or disk. During an alarm it accepts no messages.",
                good=((0, "green"), (1, "red")),
            )
        )
        .with_panel(
            number(
                "Store lag",
                "histogram_quantile(0.9,"
                " sum by (le) (rate(keepwarm_store_lag_seconds_bucket[$__range])))",
                "Time from a verdict's arrival at the collector to its commit, 90th percentile.",
                "s",
                good=((0, "green"), (5, "orange"), (30, "red")),
                decimals=2,
            )
        )
        .with_panel(
            number(
                "Failed commits",
                "sum(increase(keepwarm_store_commit_failures_total[$__range]))",
                "Transactions that were tried again, in the time that is shown.",
                good=((0, "green"), (1, "orange")),
                decimals=0,
            )
        )
        .with_panel(
            lines(
                "Claims queues: ready",
                [(f"sum by (queue) ({_READY}{{{_CLAIMS}}})", "{{queue}}")],
                "Batches waiting for a worker.",
            )
        )
        .with_panel(
            lines(
                "Claims queues: unacknowledged",
                [(f"sum by (queue) ({_UNACKED}{{{_CLAIMS}}})", "{{queue}}")],
                "Batches in flight at workers.",
            )
        )
        .with_panel(
            lines(
                "Other queues",
                [(f"sum by (queue) (rabbitmq_detailed_queue_messages{{{_HOUSE}}})", "{{queue}}")],
                "Messages, ready and unacknowledged, on their way to the collector or set aside.",
            )
        )
        .with_panel(
            lines(
                "Messages per second",
                [
                    (_total("received"), "published"),
                    (_total("delivered"), "delivered"),
                    (_total("acknowledged"), "acknowledged"),
                    (_total("redelivered"), "redelivered"),
                ],
                "All queues. Redelivered: a consumer received it before and did not settle it.",
            )
        )
        .with_panel(
            lines(
                "Dead claims and messages",
                [
                    (
                        "sum by (reason) (increase(keepwarm_store_dead_claims_total[$__range]))",
                        "claims, {{reason}}",
                    ),
                    (
                        "sum(increase(keepwarm_store_refused_messages_total[$__range]))",
                        "messages refused by collectors",
                    ),
                ],
                "New ones within the range shown.",
            )
        )
        .with_panel(
            lines(
                "Broker's memory and disk",
                [
                    (
                        "max(rabbitmq_process_resident_memory_bytes"
                        " / rabbitmq_resident_memory_limit_bytes)",
                        "memory, of its limit",
                    ),
                    (
                        "max(rabbitmq_disk_space_available_limit_bytes"
                        " / rabbitmq_disk_space_available_bytes)",
                        "least free disk, of what is free",
                    ),
                ],
                "At 100 % the broker raises an alarm.",
                "percentunit",
            )
        )
        .with_panel(
            lines(
                "Links to the broker",
                [
                    ("min by (link) (keepwarm_broker_connected)", "{{link}}: open"),
                    ("max by (link) (keepwarm_broker_blocked)", "{{link}}: blocked"),
                ],
                "Open is 1. Blocked is 1 while an alarm holds what is published.",
            )
        )
        .with_panel(
            lines(
                "Reconnects",
                [
                    (
                        "sum by (link) (increase("
                        "keepwarm_broker_reconnects_total[$__rate_interval]))",
                        "{{link}}",
                    )
                ],
                "Links that were opened again after their connection was lost.",
            )
        )
        .with_panel(
            lines(
                "Commit latency",
                _quantiles("keepwarm_store_commit_seconds"),
                "How long a transaction takes, whether it was committed or failed.",
                "s",
            )
        )
        .with_panel(
            lines(
                "Lag",
                _quantiles("keepwarm_store_lag_seconds"),
                "Time from a message's arrival at the collector to its commit.",
                "s",
            )
        )
        .with_panel(
            lines(
                "Verdicts per second",
                [
                    (
                        "sum(rate(keepwarm_store_verdicts_total[$__rate_interval]))",
                        "committed",
                    ),
                    (
                        "sum(rate(keepwarm_store_duplicate_verdicts_total[$__rate_interval]))",
                        "of these, ignored: they came twice",
                    ),
                ],
                "Verdicts that collectors write.",
            )
        )
        .with_panel(
            lines(
                "Age of run metrics",
                [("max(keepwarm_run_counts_age_seconds)", "age")],
                "Age of the values, which are read from the store every 5 s if it can be read.",
                "s",
            )
        )
    )
