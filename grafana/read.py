"""The dashboards as they are committed: their panels, and queries as Prometheus takes them."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

DASHBOARDS = Path(__file__).parent / "dashboards"


def dashboards() -> list[dict[str, Any]]:
    return [
        json.loads(file.read_text(encoding="utf-8")) for file in sorted(DASHBOARDS.glob("*.json"))
    ]


def panels(dashboard: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Those that ask something, in the order in which they are read."""
    for panel in dashboard["panels"]:
        if panel["type"] != "row":
            yield panel


def substituted(expression: str, variables: Mapping[str, str]) -> str:
    """With the values of the dashboard's variables, as Grafana puts them there."""
    for name, value in variables.items():
        expression = expression.replace(f"${name}", value)
    if "$" in expression:
        raise ValueError(f"a variable has no value: {expression}")
    return expression
