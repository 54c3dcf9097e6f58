"""Workers, contexts and queues as a person sees them."""

import re
from pathlib import Path

import pytest

from services.cli.broker_view import BrokerListener, BrokerSnapshot, broker_tables, open_broker_view
from services.cli.screen import Screen
from services.cli.status import latest_runs
from services.contracts import (
    ContextDemand,
    ContextSpec,
    Run,
    RunAnnouncement,
    WorkerHeartbeat,
    encode,
    load_settings,
)
from services.store import Incoming, Store

WORKER = WorkerHeartbeat(
    worker_id="node-7-1",
    context_id="ctx-1",
    device="Tesla T4",
    state="serving",
    claims_per_second=1234.56,
    job_id="71_3",
    walltime_left_seconds=3_700,
    claims_in_hand=640,
)
LINE = ContextDemand(
    context=ContextSpec(model="/models/small"),
    claims_ready=64_000,
    claims_in_flight=640,
    workers_warm=1,
)


def shown(snapshot: BrokerSnapshot, width: int = 200) -> str:
    console = Screen(width=width)
    with console.capture() as capture:
        console.print(broker_tables(snapshot))
    return capture.get()


def row(text: str, first: str) -> list[str]:
    (line,) = (line for line in text.splitlines() if line.startswith(first))
    return line.split("  ")


def test_a_worker_is_a_line_with_its_whole_heartbeat() -> None:
    text = shown(BrokerSnapshot([WORKER], [LINE], {"verdicts": 3, "returns": 0}))
    cells = [cell.strip() for cell in row(text, "node-7-1") if cell.strip()]
    assert cells == [*("node-7-1", "Tesla T4", "serving", "71_3", "1,234.6", "640", "1 h 01 min")]
    cells = [cell.strip() for cell in row(text, "ctx-") if cell.strip()]
    assert cells == [LINE.context.context_id, "small", "64,000", "640", "1"]
    assert "messages: verdicts 3, returns 0" in text


def test_workers_of_several_contexts_have_a_context_column() -> None:
    other = WORKER.model_copy(
        update={"worker_id": "node-8-1", "context_id": "ctx-0123456789abcdef"}
    )
    text = shown(BrokerSnapshot([WORKER, other], (), {}))
    assert "ctx-01234567" in " ".join(row(text, "node-8-1"))


def test_the_table_fits_eighty_columns_and_has_no_empty_columns() -> None:
    report = WORKER.model_copy(
        update={"worker_id": "gpu-node-0123.cluster-4567-a1b2", "device": "NVIDIA H200 NVL"}
    )
    assert max(map(len, shown(BrokerSnapshot([report], [LINE], {}), width=80).splitlines())) <= 80
    nowhere = report.model_copy(update={"job_id": None, "walltime_left_seconds": None})
    header = shown(BrokerSnapshot([nowhere], (), {})).splitlines()[1].split()
    assert header == ["worker", "device", "state", "claims/s", "in", "flight"]


def test_empty_tables_have_a_row_that_there_is_nothing() -> None:
    text = shown(BrokerSnapshot((), (), {}))
    assert "no workers" in text and "no contexts" in text


def test_of_many_workers_some_are_listed_and_the_rest_counted() -> None:
    many = [WORKER.model_copy(update={"worker_id": f"node-{n}"}) for n in range(60)]
    text = shown(BrokerSnapshot(many, (), {}))
    assert text.count("Tesla T4") == 50 and "and 10 more" in text


def test_text_of_a_worker_cannot_control_the_terminal() -> None:
    bad = WORKER.model_copy(update={"host": "x", "device": "\x1b[31mred[bold]\r\x9b2J"})
    text = shown(BrokerSnapshot([bad], (), {}))
    assert "\ufffd[31mred[bold]" in text and not {"\x1b", "\x9b", "\r"} & set(text)


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({}, "no broker is configured"),
        # On a slow machine the time is over before it is refused.
        (
            {"broker_url": "amqp://127.0.0.1:1/v"},
            "(no connection to the broker|nothing answered) at",
        ),
    ],
)
def test_without_a_broker_a_line_has_the_reason(settings: dict[str, str], why: str) -> None:
    with open_broker_view(
        load_settings(**settings, broker_connect_timeout_seconds=0.5)
    ) as snapshot:
        text = shown(snapshot())
    assert re.search(f"no workers are shown: {why}", text)
    assert "worker " not in text


def test_messages_that_are_not_keepwarms_are_ignored() -> None:
    listener = BrokerListener(load_settings(broker_url="amqp://127.0.0.1:1/v"))
    for receive in (listener.receive_heartbeat, listener.receive_control_update):
        receive(b"nonsense")
    listener.receive_heartbeat(encode(WORKER))
    assert listener._fleet.workers() == [WORKER]


def test_with_many_runs_the_latest_are_watched(run: Run, tmp_path: Path, screen: Screen) -> None:
    settings = load_settings(store_url=str(tmp_path / "store.sqlite"))
    with Store.open(settings) as store:
        for number in range(51):
            announced = run.model_copy(
                update={"source": f"f-{number}", "source_digest": f"{number}"}
            )
            store.write(
                Incoming([RunAnnouncement(run=announced, submission_id=f"sub-{number}")], [], [])
            )
            if number == 49:
                screen.print(latest_runs(settings))
                assert "older runs" not in screen.file.getvalue()
    screen.print(latest_runs(settings))
    last = screen.file.getvalue().rpartition("claims/s")[2]
    assert "f-50" in last and "f-1 " in last and "f-0 " not in last
    assert "older runs are not shown; `keepwarm status` lists more than 50" in last
