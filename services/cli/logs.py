"""Logs: one event name and key-value fields, for people or as JSON, on standard error or a file."""

import contextlib
import logging
import sys
from typing import TextIO, cast

import structlog

from services.cli.printable import printable
from services.contracts import Settings


class _Sink:
    """A stream that ignores write errors: a full disk must not stop a service that logs."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._stream.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._stream.flush()


def _printable_values(
    _: object, __: str, event: structlog.typing.EventDict
) -> structlog.typing.EventDict:
    return {
        name: printable(value) if isinstance(value, str) else value for name, value in event.items()
    }


def configure_logs(settings: Settings, stream: TextIO | None = None) -> None:
    """Log all events of the configured level and above to `stream`, by default standard error."""
    target = stream or sys.stderr
    as_json = settings.log_format == "json"
    renderer: structlog.typing.Processor = (
        structlog.processors.JSONRenderer()
        if as_json
        else structlog.dev.ConsoleRenderer(colors=target.isatty())
    )
    structlog.configure(
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info
            if as_json
            else structlog.processors.StackInfoRenderer(),
            *(() if as_json else (_printable_values,)),  # JSON escapes such characters
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(
            logging.getLevelNamesMapping()[settings.log_level]
        ),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _Sink(target))),
    )
    # pika logs as errors what Keepwarm logs as its own events.
    logging.getLogger("pika").setLevel(logging.CRITICAL)
