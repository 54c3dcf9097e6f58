"""What tests of batch jobs share with those of services: a broker, commands, an engine."""

from tests.integration.conftest import broker, command, environment, node

__all__ = ["broker", "command", "environment", "node"]
