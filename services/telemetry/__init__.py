"""A service's metrics, liveness and readiness over HTTP."""

from services.telemetry.labels import BoundedLabels
from services.telemetry.metrics_server import MetricsServer
from services.telemetry.watchdog import TimedLock, Watchdog

__all__ = ["BoundedLabels", "MetricsServer", "TimedLock", "Watchdog"]
