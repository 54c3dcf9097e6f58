"""Draw the dashboards without Grafana: each panel's own queries, asked of a Prometheus.

    .venv/bin/python -m grafana.preview --prometheus http://localhost:9090 --minutes 60 --out DIR

It draws what a panel asks and how it is laid out, not how Grafana looks.
"""

import argparse
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import matplotlib as mpl
import numpy as np
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.dates import AutoDateLocator, ConciseDateFormatter
from numpy.typing import NDArray
from PIL import Image

from grafana.blocks import WIDTH
from grafana.read import dashboards, panels, substituted

_INCHES_A_COLUMN, _INCHES_A_ROW = 0.5, 0.26
_POINTS = 240
_COLOURS = (
    *("#3b7dd8", "#e07b39", "#3f9b57", "#b0417a", "#8064c8", "#8a7a2f"),
    *("#2a9da8", "#888888", "#9ec1f0", "#f3b98d", "#98cfa8", "#d99abc"),
)
_COLOUR_NAMES = {"green": "#2e7d32", "orange": "#d17a00", "red": "#c62828"}
_MOST_SERIES = 12
_PALETTE = 96

Values = NDArray[np.float64]


@dataclass(frozen=True)
class Span:
    """What is shown: seconds since the epoch."""

    start: float
    end: float

    @property
    def step(self) -> float:
        return float(max(1, math.ceil((self.end - self.start) / _POINTS)))

    def times(self) -> list[float]:
        """At which values are asked for."""
        return [
            self.start + n * self.step for n in range(int((self.end - self.start) / self.step) + 1)
        ]


class Source:
    """A Prometheus, asked for one span with the dashboards' variables at All."""

    def __init__(self, url: str, span: Span, scrape_seconds: float) -> None:
        self._url, self.span = url, span
        # As Grafana has it: four scrapes, or a step and a scrape.
        rate = max(4 * scrape_seconds, span.step + scrape_seconds)
        self._variables = {
            "context": ".*",
            "run": ".*",
            "__rate_interval": f"{math.ceil(rate)}s",
            "__range": f"{math.ceil(span.end - span.start)}s",
        }

    def now(self, target: Mapping[str, Any]) -> list[tuple[dict[str, str], float]]:
        """Labels and value of each series, at the span's end."""
        found = self._ask("query", target, time=self.span.end)
        return [(each["metric"], float(each["value"][1])) for each in found]

    def over_time(self, target: Mapping[str, Any]) -> list[tuple[dict[str, str], Values]]:
        """Labels of each series, and its values at the span's times, NaN where there are none."""
        span = self.span
        found = self._ask("query_range", target, start=span.start, end=span.end, step=span.step)
        series = []
        for each in found:
            values = np.full(len(span.times()), np.nan)
            for at, value in each["values"]:
                values[round((at - span.start) / span.step)] = float(value)
            series.append((each["metric"], values))
        return series

    def _ask(self, page: str, target: Mapping[str, Any], **when: float) -> list[Any]:
        asked = {"query": substituted(target["expr"], self._variables), **when}
        answer = httpx.get(f"{self._url}/api/v1/{page}", params=asked, timeout=60)
        answer.raise_for_status()
        return list(answer.json()["data"]["result"])


def draw(dashboard: Mapping[str, Any], source: Source, file: Path) -> None:
    shown = list(panels(dashboard))
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in shown)
    with mpl.rc_context({"font.size": 7, "font.family": "DejaVu Sans"}):
        figure = pyplot.figure(
            figsize=(WIDTH * _INCHES_A_COLUMN, height * _INCHES_A_ROW + 0.4), layout="none"
        )
        figure.text(0.01, 1 - 0.2 / figure.get_figheight(), dashboard["title"], fontsize=11)
        for panel in shown:
            _draw_panel(figure, panel, source, height)
        figure.savefig(file, dpi=90)
        pyplot.close(figure)
    with Image.open(file) as drawn:
        drawn.convert("RGB").quantize(_PALETTE).save(file, optimize=True)


def _draw_panel(figure: Any, panel: Mapping[str, Any], source: Source, rows: int) -> None:
    place = panel["gridPos"]
    top = 1 - 0.4 / figure.get_figheight()  # under the title
    row, column = top / rows, 1 / WIDTH
    left, bottom = place["x"] * column, top - (place["y"] + place["h"]) * row
    width, height = place["w"] * column, place["h"] * row
    figure.text(left + 0.006, bottom + height - 0.3 * row, panel["title"], va="top", weight="bold")
    small = panel["type"] == "stat"
    axes = figure.add_axes(
        (
            left + (0.006 if small else 0.042),
            bottom + (0.3 if small else 2.6) * row,
            width - (0.012 if small else 0.054),
            height - (1.6 if small else 4.2) * row,
        )
    )
    _KINDS[panel["type"]](axes, panel, source)


def _draw_stat(axes: Axes, panel: Mapping[str, Any], source: Source) -> None:
    axes.axis("off")
    found = source.now(panel["targets"][0])
    text, colour = "no data", "#888888"
    if found:
        value = found[0][1]
        defaults = panel["fieldConfig"]["defaults"]
        text = _shown(value, defaults.get("unit", "short"), defaults.get("decimals"))
        colour = "#222222"
        for step in defaults.get("thresholds", {}).get("steps", ()):
            if step["value"] is None or value >= step["value"]:
                colour = _COLOUR_NAMES[step["color"]]
    axes.text(0.5, 0.5, text, ha="center", va="center", fontsize=17, color=colour)


def _draw_lines(axes: Axes, panel: Mapping[str, Any], source: Source) -> None:
    drawn = [
        (_legend(target, labels), values)
        for target in panel["targets"]
        for labels, values in source.over_time(target)
        if not np.isnan(values).all()
    ]
    defaults = panel["fieldConfig"]["defaults"]
    stacked = defaults.get("custom", {}).get("stacking", {}).get("mode") == "normal"
    dates = [datetime.fromtimestamp(at) for at in source.span.times()]
    floor = np.zeros(len(dates))
    for number, (legend, values) in enumerate(drawn[:_MOST_SERIES]):
        colour = _COLOURS[number % len(_COLOURS)]
        if stacked:
            top = floor + np.nan_to_num(values)
            axes.fill_between(dates, floor, top, color=colour, alpha=0.45, linewidth=0)
            values, floor = np.where(np.isnan(values), np.nan, top), top
        axes.plot(dates, values, color=colour, linewidth=1, label=_short(legend))
    unit = defaults.get("unit", "short")
    axes.yaxis.set_major_formatter(lambda value, _: _shown(value, unit))
    axes.set_ylim(bottom=0, top=defaults.get("max"))
    axes.set_xlim(*(datetime.fromtimestamp(at) for at in (source.span.start, source.span.end)))
    locator = AutoDateLocator(maxticks=7)
    axes.xaxis.set_major_locator(locator)
    axes.xaxis.set_major_formatter(ConciseDateFormatter(locator, show_offset=False))
    axes.grid(color="#e4e4e4", linewidth=0.5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if drawn:
        axes.legend(
            loc="upper left",
            bbox_to_anchor=(0, -0.16),
            ncols=min(3, len(drawn)),
            frameon=False,
            fontsize=6,
            borderaxespad=0,
            handlelength=1,
            columnspacing=1,
        )
    else:
        axes.text(0.5, 0.5, "no data", ha="center", transform=axes.transAxes, color="#888888")


def _draw_bars(axes: Axes, panel: Mapping[str, Any], source: Source) -> None:
    (target,) = panel["targets"]
    found = sorted((_legend(target, labels), value) for labels, value in source.now(target))
    found = [each for each in found if not math.isnan(each[1])]
    unit = panel["fieldConfig"]["defaults"].get("unit", "short")
    bars = axes.barh([name for name, _ in found], [value for _, value in found], color=_COLOURS[0])
    axes.bar_label(bars, [_shown(value, unit) for _, value in found], padding=3)
    axes.set_position(axes.get_position().shrunk(0.8, 1).translated(0.07, 0))
    axes.invert_yaxis()
    axes.xaxis.set_visible(False)
    for side in ("top", "right", "bottom"):
        axes.spines[side].set_visible(False)


def _draw_rows(axes: Axes, panel: Mapping[str, Any], source: Source) -> None:
    axes.axis("off")
    (options,) = (each["options"] for each in panel["transformations"])
    columns = options["include"]["names"]
    found = [
        [_short(labels.get(column, "").rpartition("/")[2], 22) for column in columns]
        for labels, _ in source.now(panel["targets"][0])
    ]
    table = axes.table([columns, *found], loc="upper left", cellLoc="left", edges="horizontal")
    table.auto_set_column_width(range(len(columns)))
    table.auto_set_font_size(False)
    table.set_fontsize(6)


_KINDS = {
    "stat": _draw_stat,
    "timeseries": _draw_lines,
    "bargauge": _draw_bars,
    "table": _draw_rows,
}


def _legend(target: Mapping[str, Any], labels: Mapping[str, str]) -> str:
    text = str(target["legendFormat"])
    for name, value in labels.items():
        text = text.replace(f"{{{{{name}}}}}", value)
    return text


def _short(text: str, most: int = 40) -> str:
    return text if len(text) <= most else f"{text[: most // 2]}…{text[1 - most // 2 :]}"


def _shown(value: float, unit: str, decimals: int | None = None) -> str:
    if math.isnan(value):
        return "no data"
    if decimals is not None and unit != "s":
        return f"{value:,.{decimals}{'%' if unit == 'percentunit' else 'f'}}"
    if unit == "percentunit":
        return f"{value:.1%}" if 0 < value < 0.1 or 0.9 < value < 1 else f"{value:.0%}"
    if unit in ("s", "dtdurations"):
        if value >= 60:
            return f"{value // 60:.0f} min {value % 60:.0f} s"
        return f"{value:.3g} s"
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:.3g}"


def draw_all(url: str, span: Span, scrape_seconds: float, out: Path) -> Sequence[Path]:
    source = Source(url, span, scrape_seconds)
    files = []
    for dashboard in dashboards():
        files.append(out / f"dashboard-{dashboard['uid'].removeprefix('keepwarm-')}.png")
        draw(dashboard, source, files[-1])
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--prometheus", default="http://localhost:9090", metavar="URL")
    parser.add_argument("--minutes", type=float, default=60.0, help="the last so many are shown")
    parser.add_argument("--scrape-seconds", type=float, default=10.0, help="as in prometheus.yml")
    parser.add_argument("--out", type=Path, default=Path(), metavar="DIR")
    arguments = parser.parse_args()
    now = time.time()
    span = Span(now - 60 * arguments.minutes, now)
    for file in draw_all(arguments.prometheus, span, arguments.scrape_seconds, arguments.out):
        print(file)


if __name__ == "__main__":
    main()
