"""What is warm on this node: engines, their keeper, and what an engine needs to be started.

Importing this imports neither vLLM nor torch: an engine is a process of its own.
"""

from services.contexts.device import Device, find_device, visible_gpus
from services.contexts.model_files import pin_model
from services.contexts.walltime import seconds_left, seconds_until_drain

__all__ = [
    "Device",
    "find_device",
    "pin_model",
    "seconds_left",
    "seconds_until_drain",
    "visible_gpus",
]
