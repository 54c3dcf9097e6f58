"""Stores verdicts, publishes returned claims again, and tells workers the demand for contexts."""

from services.collector.collector import Collector

__all__ = ["Collector"]
