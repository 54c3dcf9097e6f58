"""Write grafana/dashboards/*.json from what stands in Python beside this file.

.venv/bin/python -m grafana.make [--check]
"""

import argparse

from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard

from grafana.broker_and_store import broker_and_store
from grafana.fleet import fleet
from grafana.read import DASHBOARDS
from grafana.run import run


def rendered() -> dict[str, str]:
    """The text of each file, by its name."""
    made = {"run": run(), "fleet": fleet(), "broker-and-store": broker_and_store()}
    return {f"{name}.json": _text(each.build()) for name, each in made.items()}


def _text(dashboard: Dashboard) -> str:
    for number, panel in enumerate(dashboard.panels or (), start=1):
        panel.id_val = number
    return f"{JSONEncoder(sort_keys=True, indent=2).encode(dashboard)}\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where they differ")
    arguments = parser.parse_args()
    texts = rendered()
    if not arguments.check:
        for name, text in texts.items():
            (DASHBOARDS / name).write_text(text, encoding="utf-8")
    present = {file.name: file.read_text(encoding="utf-8") for file in DASHBOARDS.glob("*.json")}
    if present != texts:
        raise SystemExit(f"{DASHBOARDS} is not what the code says; run `make dashboards`")


if __name__ == "__main__":
    main()
