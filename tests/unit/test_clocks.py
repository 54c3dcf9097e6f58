"""Durations come from a clock that does not jump: the wall clock is asked where a date is meant."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

WALL_CLOCKS = {
    *("time.time", "time.time_ns", "time.localtime", "time.gmtime", "time.ctime", "time.strftime"),
    *("datetime.now", "datetime.utcnow", "datetime.today", "date.today"),
}
ALLOWED = {
    ("cli/status.py", "_problems"): "the collector noted a date: it is shown in local time",
    ("store/store.py", "Store.__init__"): (
        "`received_at` is a date: one look when the store is opened, monotonic from there"
    ),
    ("contexts/caches.py", "_measure"): (
        "when a file was written is a date: after a jump a cache goes sooner, or stays longer"
    ),
    ("models/fingerprint.py", "_cache_digest"): (
        "when a file changed is a date: one look, and after a jump a file is read once more"
    ),
    ("gpu_worker/crashes.py", "CrashRecords.collect"): (
        "when a record was written is a date: after a jump it goes sooner, or stays longer"
    ),
    ("node/walltime.py", "seconds_left"): (
        "the scheduler says when the job ends as a date: one look at the start"
    ),
}


def dotted(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else "?"


def full_names(tree: ast.Module) -> dict[str, str]:
    """What the names in a module stand for: `from time import time as t` makes `t` time.time."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {a.asname or a.name.partition(".")[0]: a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def looks_at_the_wall_clock(source: str) -> Iterator[tuple[str, str]]:
    """Each place (class and function) and the clock that it asks."""
    tree = ast.parse(source)
    names = full_names(tree)

    def walk(node: ast.AST, place: tuple[str, ...]) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            place = (*place, node.name)
        if isinstance(node, ast.Attribute | ast.Name):
            head, _, rest = dotted(node).partition(".")
            known = f"{names.get(head, head)}.{rest}".rstrip(".")
            clock = ".".join(known.split(".")[-2:])
            if clock in WALL_CLOCKS:
                yield ".".join(place), clock
        for child in ast.iter_child_nodes(node):
            yield from walk(child, place)

    yield from walk(tree, ())


@pytest.mark.parametrize(
    ("source", "clock"),
    [
        ("import time\ntime.time()", "time.time"),
        ("import time as t\nt.time()", "time.time"),
        ("from time import time\ntime()", "time.time"),
        ("from time import time_ns as now\nnow()", "time.time_ns"),
        ("import time\nclock = time.time", "time.time"),
        ("import datetime\ndatetime.datetime.now(datetime.UTC)", "datetime.now"),
        ("from datetime import datetime as d\nd.utcnow()", "datetime.utcnow"),
        ("from datetime import date\ndate.today()", "date.today"),
        ("import time\ntime.monotonic()", None),
        ("import time\ntime.sleep(1)", None),
        ("from datetime import timedelta\ntimedelta(1)", None),
    ],
)
def test_a_look_at_the_wall_clock_is_seen_however_it_is_written(
    source: str, clock: str | None
) -> None:
    assert {found for _, found in looks_at_the_wall_clock(source)} == ({clock} if clock else set())


def test_nothing_but_a_date_is_read_from_the_wall_clock(repository: Path) -> None:
    services = repository / "services"
    files = sorted(services.rglob("*.py"))
    assert files
    found = {
        (str(file.relative_to(services)), place)
        for file in files
        for place, _ in looks_at_the_wall_clock(file.read_text(encoding="utf-8"))
    }
    # Both ways: a reason whose place is gone goes too.
    assert found == ALLOWED.keys()
