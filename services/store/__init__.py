"""The database of verdicts: schema, writes, progress, reports, exports, dead claims."""

from services.store.dead_claims import (
    DeadRow,
    dead_claims,
    drop_dead,
    reopen_dead,
    unanswered_claims,
)
from services.store.export import ExportFormat, export_run
from services.store.label_mass import ENOUGH_VERDICTS, LowMass
from services.store.progress import (
    KnownRun,
    RunStatus,
    find_run,
    known_runs,
    missing_records,
    run_status,
    run_statuses,
)
from services.store.rates import DeviceRate, device_rates
from services.store.report import Quality, Report, build_report, quality_of
from services.store.store import Incoming, Store

__all__ = [
    "ENOUGH_VERDICTS",
    "DeadRow",
    "DeviceRate",
    "ExportFormat",
    "Incoming",
    "KnownRun",
    "LowMass",
    "Quality",
    "Report",
    "RunStatus",
    "Store",
    "build_report",
    "dead_claims",
    "device_rates",
    "drop_dead",
    "export_run",
    "find_run",
    "known_runs",
    "missing_records",
    "quality_of",
    "reopen_dead",
    "run_status",
    "run_statuses",
    "unanswered_claims",
]
