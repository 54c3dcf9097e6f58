"""What a service tells of itself over HTTP: metrics, whether it lives, whether it is ready."""

from services.telemetry.labels import Few
from services.telemetry.pulse import Pulse
from services.telemetry.server import MetricsServer

__all__ = ["Few", "MetricsServer", "Pulse"]
