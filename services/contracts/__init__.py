"""What services share: messages, identities, names on the broker, settings, errors."""

from services.contracts.claims import Claim, ClaimBatch
from services.contracts.contexts import ContextSpec
from services.contracts.control import ContextDemand, ControlUpdate
from services.contracts.errors import KeepwarmError
from services.contracts.heartbeats import WorkerHeartbeat
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
    "ControlUpdate",
    "DeadClaim",
    "DeadReason",
    "KeepwarmError",
    "Label",
    "PromptSpec",
    "Run",
    "RunAnnouncement",
    "Settings",
    "StartupPhases",
    "Totals",
    "Verdict",
    "VerdictBatch",
    "WorkerHeartbeat",
    "decode",
    "encode",
    "load_settings",
]
