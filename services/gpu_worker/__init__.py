"""Take claims, infer, publish verdicts, acknowledge, return.

Importing this imports neither vLLM nor torch: the worker talks HTTP to an engine process.
"""

from services.gpu_worker.prompting import CompiledPrompt
from services.gpu_worker.tokenizer import ModelTokenizer
from services.gpu_worker.worker import Worker

__all__ = [
    "CompiledPrompt",
    "ModelTokenizer",
    "Worker",
]
