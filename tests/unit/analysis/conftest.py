"""Stores."""

from tests.unit.stores import make, open_store, other_run, prompt, run, store

__all__ = ["make", "open_store", "other_run", "prompt", "run", "store"]
