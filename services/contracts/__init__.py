"""What services say to each other: messages, identities, names on the broker, settings, errors."""

from services.contracts.claims import Claim, ClaimBatch
from services.contracts.contexts import ContextSpec
from services.contracts.errors import KeepwarmError
from services.contracts.notices import ContextDemand, Notice
from services.contracts.presence import WorkerReport
from services.contracts.prompts import INVALID, Label, PromptSpec
from services.contracts.runs import Run, RunAnnouncement, Totals
from services.contracts.settings import Settings, load_settings
from services.contracts.startup import ContextReady, StartupPhases
from services.contracts.verdicts import DeadClaim, DeadReason, Verdict, VerdictBatch
from services.contracts.wire import decode, encode

__all__ = [
    "INVALID",
    "Claim",
    "ClaimBatch",
    "ContextDemand",
    "ContextReady",
    "ContextSpec",
    "DeadClaim",
    "DeadReason",
    "KeepwarmError",
    "Label",
    "Notice",
    "PromptSpec",
    "Run",
    "RunAnnouncement",
    "Settings",
    "StartupPhases",
    "Totals",
    "Verdict",
    "VerdictBatch",
    "WorkerReport",
    "decode",
    "encode",
    "load_settings",
]
