"""The worker: takes claims, asks an engine about them, and publishes verdicts.

Importing this imports neither vLLM nor torch: the worker talks HTTP to an engine process.
"""

from services.gpu_worker.worker import Worker

__all__ = ["Worker"]
