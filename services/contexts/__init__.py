"""Engines, and the keeper that owns them on a node.

Importing this imports neither vLLM nor torch: an engine is a process of its own.
"""
