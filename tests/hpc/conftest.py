"""What tests of batch jobs share with those of services: a real broker, commands, the tests' engine."""

from tests.integration.conftest import broker, command, environment, node

__all__ = ["broker", "command", "environment", "node"]
