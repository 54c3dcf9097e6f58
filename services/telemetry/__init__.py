"""What a service tells of itself over HTTP: metrics, whether it lives, whether it is ready."""

from services.telemetry.labels import BoundedLabels
from services.telemetry.pulse import Watchdog
from services.telemetry.server import MetricsServer

__all__ = ["BoundedLabels", "MetricsServer", "Watchdog"]
