"""Verdicts -> store -> report."""

from services.collector.collector import Collector
from services.collector.dead import DeadRow, dead_claims, drop_dead, reopen_dead, unanswered_claims
from services.collector.export import ExportFormat, export_run
from services.collector.label_mass import ENOUGH_VERDICTS, LowMass
from services.collector.report import Report, build_report
from services.collector.status import (
    KnownRun,
    RunStatus,
    find_run,
    known_runs,
    missing_records,
    run_status,
    run_statuses,
)
from services.collector.store import Incoming, Store

__all__ = [
    "ENOUGH_VERDICTS",
    "Collector",
    "DeadRow",
    "ExportFormat",
    "Incoming",
    "KnownRun",
    "LowMass",
    "Report",
    "RunStatus",
    "Store",
    "build_report",
    "dead_claims",
    "drop_dead",
    "export_run",
    "find_run",
    "known_runs",
    "missing_records",
    "reopen_dead",
    "run_status",
    "run_statuses",
    "unanswered_claims",
]
