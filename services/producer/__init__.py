"""Files -> claims -> batches -> broker."""

from services.producer.parse import Parser, Rejection
from services.producer.prompt_file import read_prompt
from services.producer.rejected import RejectedFile
from services.producer.source import Format, Source
from services.producer.submission import Progress, Submission

__all__ = [
    "Format",
    "Parser",
    "Progress",
    "RejectedFile",
    "Rejection",
    "Source",
    "Submission",
    "read_prompt",
]
