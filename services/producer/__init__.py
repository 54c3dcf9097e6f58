"""Files -> claims -> batches -> broker."""

from services.producer.claims_file import ClaimsFile, Selection
from services.producer.parse import Rejection
from services.producer.prompt_file import read_prompt
from services.producer.rejected import RejectedFile
from services.producer.source import Container, Source
from services.producer.submission import Progress, Submission

__all__ = [
    "ClaimsFile",
    "Container",
    "Progress",
    "RejectedFile",
    "Rejection",
    "Selection",
    "Source",
    "Submission",
    "read_prompt",
]
