import io
import json

import pytest
import structlog

from services.cli.logs import configure_logs
from services.contracts import load_settings


def logged(**settings: object) -> io.StringIO:
    stream = io.StringIO()
    configure_logs(load_settings(**settings), stream)
    return stream


def test_an_event_is_a_line_with_its_name_and_fields() -> None:
    stream = logged()
    structlog.get_logger().info("engine.ready", seconds=3)
    line = stream.getvalue()
    assert line.count("\n") == 1
    assert "engine.ready" in line
    assert "seconds=3" in line
    assert "\x1b" not in line


def test_an_event_may_be_json() -> None:
    stream = logged(log_format="json")
    structlog.get_logger().warning("batch.returned", reason="Łódź", seconds=0.1)
    event = json.loads(stream.getvalue())
    assert event.pop("timestamp").endswith("Z")
    assert event == {
        "event": "batch.returned",
        "level": "warning",
        "reason": "Łódź",
        "seconds": 0.1,
    }


@pytest.mark.parametrize(
    ("level", "events"),
    [
        ("DEBUG", ["debug", "info", "warning", "error"]),
        ("INFO", ["info", "warning", "error"]),
        ("WARNING", ["warning", "error"]),
        ("ERROR", ["error"]),
    ],
)
def test_events_below_the_set_level_are_not_logged(level: str, events: list[str]) -> None:
    stream = logged(log_level=level, log_format="json")
    log = structlog.get_logger()
    for name in ("debug", "info", "warning", "error"):
        getattr(log, name)(name)
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == events


def test_an_exception_is_logged_with_its_traceback() -> None:
    stream = logged(log_format="json")
    try:
        raise RuntimeError("out of luck")
    except RuntimeError:
        structlog.get_logger().exception("link.died")
    assert "RuntimeError: out of luck" in json.loads(stream.getvalue())["exception"]


@pytest.mark.parametrize("format", ["console", "json"])
def test_a_full_disk_costs_a_log_line_and_nothing_else(format: str) -> None:
    with open("/dev/full", "w", buffering=1, encoding="utf-8") as full:  # noqa: PTH123
        configure_logs(load_settings(log_format=format), full)
        structlog.get_logger().info("engine.ready")
        structlog.reset_defaults()
        with pytest.raises(OSError, match="No space left"):
            full.close()
