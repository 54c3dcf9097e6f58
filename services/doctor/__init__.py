"""Checks of a machine and of an installation, which `keepwarm doctor` shows."""
