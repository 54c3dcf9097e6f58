"""Verdicts to the store; returned claims; demand; the fleet."""

from services.collector.collector import Collector

__all__ = ["Collector"]
