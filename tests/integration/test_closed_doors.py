"""What strangers cannot do, and what broken or hostile messages cannot do either."""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pika
import psutil
import pytest

from services.broker import BrokerAddress, Declares, PrivateNode, Publisher
from services.contracts import (
    Claim,
    ClaimBatch,
    ContextSpec,
    DeadClaim,
    PromptSpec,
    Run,
    RunAnnouncement,
    Verdict,
    VerdictBatch,
    encode,
    load_settings,
    topology,
)
from services.contracts.bounds import MAX_MESSAGE_BYTES
from services.contracts.verdicts import DeadReason
from services.contracts.wire import Message
from services.models.files import pin_model
from services.store import Store
from tests.integration.conftest import (
    PATIENCE,
    messages_in,
    plain_connection,
    send,
    wait_for_messages,
    wait_until,
)
from tests.integration.runs import (
    CLAIMS,
    Start,
    end_well,
    outcomes,
    status_of,
    submit,
    write_claims,
)

SECRET = "correct-horse-battery"
PASSWORD_URLS = {
    "--broker": f"amqp://keepwarm:{SECRET}@127.0.0.1/",
    "--store": f"postgresql://keepwarm@127.0.0.1/db?password={SECRET}",
}


@pytest.fixture
def open_directory() -> Iterator[Path]:
    """A directory that every user may enter, unlike pytest's."""
    directory = Path(tempfile.mkdtemp(prefix="keepwarm-"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory, ignore_errors=True)


def as_nobody(program: str, *arguments: str) -> str:
    """What a Python program prints when the user nobody runs it."""
    become = ("setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups")
    done = subprocess.run(
        [*become, "/usr/bin/python3", "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=True,
        cwd="/",
    )
    return done.stdout.strip()


TRY = """
import os, socket, sys
runtime, path, log = sys.argv[1:]
def tell(what, act):
    try:
        act()
    except PermissionError:
        print(what, "refused")
    else:
        print(what, "allowed")
tell("parent", lambda: os.listdir(os.path.dirname(runtime)))
tell("list", lambda: os.listdir(runtime))
tell("connect", lambda: socket.socket(socket.AF_UNIX).connect(path))
tell("log", lambda: open(log))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_can_neither_ask_the_engine_nor_see_that_there_is_one(
    command: Start, open_directory: Path
) -> None:
    runtime = open_directory / "run"
    worker = command("worker", KEEPWARM_RUNTIME_DIR=str(runtime))
    worker.said("worker.taking")
    sockets, logs = sorted(runtime.glob("*.sock")), sorted(runtime.glob("*.log"))
    assert len(sockets) == len(logs) == 3  # the engine's, its fork server's, its keeper's
    for socket, log in zip(sockets, logs, strict=True):
        runtime.chmod(0o700)
        said = as_nobody(TRY, str(runtime), str(socket), str(log))
        assert said.splitlines() == [
            *("parent allowed", "list refused", "connect refused", "log refused")
        ]
        # The directory is one door, the socket's own mode another.
        runtime.chmod(0o755)
        said = as_nobody(TRY, str(runtime), str(socket), str(log))
        assert said.splitlines() == [
            *("parent allowed", "list allowed", "connect refused", "log refused")
        ]
    runtime.chmod(0o700)
    end_well(worker)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_runtime_directory_of_another_user_is_refused(
    command: Start, open_directory: Path
) -> None:
    runtime = open_directory / "run"
    runtime.mkdir()
    shutil.chown(runtime, "nobody")
    worker = command("worker", KEEPWARM_RUNTIME_DIR=str(runtime))
    assert worker.wait() == 2
    assert "is not a directory of this user's own" in worker.output


@pytest.mark.parametrize("flag", PASSWORD_URLS)
def test_a_password_in_a_flag_is_refused_and_not_repeated(command: Start, flag: str) -> None:
    collecting = command("collect", flag, PASSWORD_URLS[flag])
    assert collecting.wait() == 2
    assert "KEEPWARM_BROKER_PASSWORD" in collecting.output
    assert SECRET not in collecting.output


def test_no_password_is_in_a_log_an_error_or_a_process_list(
    command: Start, node: PrivateNode, tmp_path: Path
) -> None:
    loud = {"KEEPWARM_LOG_LEVEL": "DEBUG"}
    in_url = {
        "KEEPWARM_BROKER_URL": f"amqp://keepwarm:{node.password}@127.0.0.1:{node.port}/",
        "KEEPWARM_BROKER_PASSWORD": "",
    }
    file = tmp_path / "password"
    file.write_text(node.password + "\n")
    in_file = {"KEEPWARM_BROKER_PASSWORD": "", "KEEPWARM_BROKER_PASSWORD_FILE": str(file)}
    wrong = {"KEEPWARM_BROKER_PASSWORD": SECRET}
    elsewhere = {"KEEPWARM_STORE_URL": f"postgresql://keepwarm:{SECRET}@127.0.0.1:1/none"}
    services = [command("worker", **loud, **in_url), command("collect", **loud, **in_file)]
    services[0].said("worker.taking")
    services[1].said("broker.connected", times=2)
    refused, seen = [], set()
    for arguments, variables in (
        (("submit", CLAIMS), wrong),
        (("worker",), wrong),
        (("collect",), wrong),
        (("collect",), elsewhere),
        (("submit", CLAIMS), elsewhere),
    ):
        refused.append(command(*arguments, **loud, **variables))
        seen |= set(all_command_lines())  # while it has hardly begun
    while any(process.process.poll() is None for process in refused):
        seen |= set(all_command_lines())
    assert [process.wait() for process in refused] == [5, 5, 5, 6, 6]
    for process in (*services, *refused):
        assert node.password not in process.output and SECRET not in process.output
    assert any("services.cli.main submit" in line for line in seen)
    assert not any(node.password in line or SECRET in line for line in seen)
    end_well(*services)


def all_command_lines() -> Iterator[str]:
    for process in psutil.process_iter():
        try:
            yield " ".join(process.cmdline())
        except psutil.Error:
            continue


# Messages that nobody can use.


@pytest.fixture
def context(small_model: Path) -> ContextSpec:
    return pin_model(ContextSpec(model=str(small_model)))


@pytest.fixture
def good(context: ContextSpec, prompt: PromptSpec) -> dict[str, tuple[str, Message]]:
    """For each queue its exchange, and a message that belongs there."""
    run = Run(source="doors.jsonl", source_digest="src-doors", context=context, prompt=prompt)
    claim = Claim(claim_id="door-1", position=0, text="Doors are closed.")
    batch = ClaimBatch(run=run, submission_id="sub-doors", batch_id="0", claims=(claim,))
    verdict = Verdict(
        claim_id="door-2",
        position=1,
        text="Windows too.",
        label="SUPPORTS",
        probabilities=(),
        mass=0,
        raw_text="True",
        prompt_tokens=9,
    )
    answer = {"run_id": run.run_id, "worker_id": "stranger", "attempt": 1}
    return {
        topology.claims_queue(context.context_id): (topology.CLAIMS_EXCHANGE, batch),
        topology.RETURNS_QUEUE: (topology.RETURNS_EXCHANGE, batch),
        topology.RUNS_QUEUE: (
            topology.RUNS_EXCHANGE,
            RunAnnouncement(run=run, submission_id="sub-doors"),
        ),
        topology.VERDICTS_QUEUE: (
            topology.VERDICTS_EXCHANGE,
            VerdictBatch(
                **answer,
                batch_id="0",
                labels=("SUPPORTS", "REFUTES"),
                verdicts=(verdict,),
                device="none",
                engine_seconds=1,
            ),
        ),
        topology.DEAD_CLAIMS_QUEUE: (
            topology.DEAD_EXCHANGE,
            DeadClaim(**answer, claim=claim, reason=DeadReason.TOO_LONG, detail="so it says"),
        ),
    }


@pytest.fixture
def prompt() -> PromptSpec:
    from services.cli.claims_options import prompt_from_flag

    return prompt_from_flag(None)


def properties(message: Message, **changes: object) -> pika.BasicProperties:
    return pika.BasicProperties(
        **{"content_type": "application/json", "type": type(message).__name__, **changes}
    )


def broken(message: Message) -> Iterator[tuple[bytes, pika.BasicProperties, str]]:
    """Ways to break a message: body, properties, and what the reason says."""
    body = encode(message)
    yield b" " * (MAX_MESSAGE_BYTES + 1), properties(message), "over the limit"
    yield b"\xff\xfe{", properties(message), "not a"
    yield b"[" * 100_000, properties(message), "not a"
    yield b"", properties(message), "not a"
    yield body.replace(b'"schema_version":1', b'"schema_version":0'), properties(message), "schema"
    yield body, properties(message, type="Surprise"), "its type is 'Surprise'"
    yield body, properties(message, type=None), "its type is ''"
    yield body, properties(message, content_type=None), "its content type is ''"
    yield body, properties(message, content_type=b"\xff\xfe"), "its content type"
    if isinstance(message, ClaimBatch):
        for count in ("many", -1, 2**40, None):
            headers = {topology.FAILURES_HEADER: count}
            yield (
                body,
                properties(message, headers=headers),
                "keepwarm-failures is not a valid count",
            )
        engines = {topology.DECLINED_HEADER: "n1/a"}
        yield (
            body,
            properties(message, headers=engines),
            "keepwarm-declined is not a list of engines",
        )


def test_messages_that_are_broken_in_any_way_become_dead_messages_and_harm_no_service(
    command: Start,
    environment: dict[str, str],
    node: PrivateNode,
    good: dict[str, tuple[str, Message]],
) -> None:
    worker, collecting = command("worker"), command("collect")
    worker.said("worker.taking")
    collecting.said("broker.connected", times=2)
    exchange, announcement = good[topology.RUNS_QUEUE]
    send(node, exchange, topology.RUNS_QUEUE, encode(announcement), how=properties(announcement))
    run_id = announcement.run.run_id
    wait_until(lambda: status_of(environment, run_id), "the announcement")
    expected = []
    for queue, (exchange, message) in good.items():
        for body, how, reason in broken(message):
            send(node, exchange, queue, body, how=how)
            expected.append((queue, body, reason))
    dead = topology.DEAD_MESSAGES_QUEUE
    wait_for_messages(node, dead, len(expected), "all of them dead")
    connection = plain_connection(node)
    channel = connection.channel()
    for _ in range(len(expected)):
        _, how, body = channel.basic_get(dead, auto_ack=True)
        found = how.headers[topology.ORIGIN_HEADER], body, how.headers[topology.REASON_HEADER]
        (match,) = [each for each in expected if each[:2] == found[:2] and each[2] in found[2]][
            :1
        ] or [None]
        assert match is not None, (found[0], found[2], len(body))
        expected.remove(match)
    connection.close()
    assert expected == []
    assert outcomes(environment) == []
    status = status_of(environment, run_id)
    assert status is not None and status.returned <= 5  # with headers that are none
    # Both live, and do their work.
    run_id = submit(command)
    wait_until(lambda: _complete(environment, run_id), "the run's end")
    end_well(worker, collecting)


@pytest.mark.parametrize("count", ["many", -7, 2**40])
def test_a_delivery_count_that_a_stranger_made_up_harms_no_worker(
    command: Start,
    environment: dict[str, str],
    node: PrivateNode,
    good: dict[str, tuple[str, Message]],
    context: ContextSpec,
    count: object,
) -> None:
    queue = topology.claims_queue(context.context_id)
    exchange, message = good[queue]
    how = properties(message, headers={"x-delivery-count": count})
    send(node, exchange, queue, encode(message), how=how)
    run_id = submit(command)
    worker, collecting = command("worker"), command("collect")
    wait_until(
        lambda: worker.process.poll() is not None or _complete(environment, run_id), "the run's end"
    )
    assert worker.process.poll() is None, worker.output
    end_well(worker, collecting)


def _complete(environment: dict[str, str], run_id: str) -> bool:
    status = status_of(environment, run_id)
    return status is not None and status.complete


def run_well(command: Start, *arguments: str) -> str:
    running = command(*arguments, COLUMNS="200")
    assert running.wait() == 0, running.output
    assert "\x1b" not in running.output  # nothing in it acts on a terminal
    assert "[info" not in running.output  # its events are logged as it was told
    return running.output


def dead_messages(command: Start) -> list[str]:
    return re.findall(r"msg-[0-9a-f]+", run_well(command, "dead", "list"))


def test_a_dead_message_is_listed_shown_sent_back_and_dropped(
    command: Start,
    environment: dict[str, str],
    node: PrivateNode,
    good: dict[str, tuple[str, Message]],
) -> None:
    collecting = command("collect")
    collecting.said("broker.connected", times=2)
    exchange, announcement = good[topology.RUNS_QUEUE]
    send(node, exchange, topology.RUNS_QUEUE, encode(announcement), how=properties(announcement))
    queue = topology.VERDICTS_QUEUE
    exchange, verdicts = good[queue]
    # One that was sent wrongly, and is good; and one that never will be.
    send(
        node, exchange, queue, encode(verdicts), how=properties(verdicts, content_type="text/plain")
    )
    send(node, exchange, queue, b"\x1b[2J\x1b]0;owned\x07", how=properties(verdicts))
    wait_for_messages(node, topology.DEAD_MESSAGES_QUEUE, 2, "both dead")
    shown = {number: run_well(command, "dead", "show", number) for number in dead_messages(command)}
    (mended,) = [number for number, text in shown.items() if "text/plain" in text]
    (hopeless,) = [number for number, text in shown.items() if "not a VerdictBatch" in text]
    assert "from: verdicts" in shown[mended] and "Windows too." in shown[mended]
    run_well(command, "dead", "retry", mended)
    wait_until(lambda: outcomes(environment) == [("door-2", "SUPPORTS", None)], "the verdict")
    refused = command("dead", "retry", hopeless)
    assert refused.wait() == 2
    assert f"{hopeless} is not sent again: it is not a valid VerdictBatch" in refused.output
    assert dead_messages(command) == [hopeless]
    run_well(command, "dead", "drop", hopeless)
    assert dead_messages(command) == []
    assert command("dead", "show", hopeless).wait() == 2
    end_well(collecting)


def test_dead_messages_are_sent_back_and_dropped_by_reason_run_or_all_of_them_however_many(
    command: Start,
    environment: dict[str, str],
    node: PrivateNode,
    good: dict[str, tuple[str, Message]],
) -> None:
    Store.open(load_settings(store_url=environment["KEEPWARM_STORE_URL"])).close()
    Publisher(
        BrokerAddress.from_settings(
            load_settings(broker_url=node.url, broker_password=node.password)
        ),
        "house",
        window=1,
        declares=Declares("always"),
    ).open(PATIENCE).close()
    _, verdicts = good[topology.VERDICTS_QUEUE]
    dead = topology.DEAD_MESSAGES_QUEUE

    def aside(count: int, reason: str, run: str, kind: str = "VerdictBatch") -> None:
        how = properties(
            verdicts,
            type=kind,
            message_id=f"{run}/1",
            headers={topology.REASON_HEADER: reason, topology.ORIGIN_HEADER: "claims.elsewhere"},
        )
        send(node, topology.DEAD_EXCHANGE, dead, *[encode(verdicts)] * count, how=how)

    def there() -> tuple[int, int]:
        return messages_in(node, dead), messages_in(node, topology.VERDICTS_QUEUE)

    # Those that stay are more than anybody holds at once, and come first.
    aside(1_200, "an unknown Field", "run-a")
    aside(30, "too OLD a reader", "run-a")
    aside(20, "too old a reader", "run-b")
    aside(5, "too old", "run-b", kind="Surprise")
    said = run_well(command, "dead", "retry", "--reason", "Too Old", "--run", "run-b")
    assert "20 messages are sent again, 1,235 are left" in said
    assert "left: 5 of this kind: it has the type 'Surprise', which no queue of Keepwarm" in said
    wait_until(lambda: there() == (1_235, 20), "those of one run sent back")
    assert "30 messages are deleted" in run_well(command, "dead", "drop", "--reason", "too old a r")
    wait_until(lambda: there() == (1_205, 20), "others deleted")
    assert "1,200 messages are sent again, 5 are left" in run_well(
        command, "dead", "retry", "--all"
    )
    wait_until(lambda: there() == (5, 1_220), "all sent back that belong somewhere")
    (only,) = set(dead_messages(command))
    refused = command("dead", "retry", only)
    assert refused.wait() == 2
    assert "it has the type 'Surprise', which no queue of Keepwarm has" in refused.output
    for arguments in ((), ("run-a", "--all"), (only, "--reason", "x")):
        assert command("dead", "retry", *arguments).wait() == 2


ODD_HEADERS = (
    {"x-death": "odd"},
    {"x-death": ["odd"]},
    {"x-death": []},
    {topology.ORIGIN_HEADER: 7, topology.REASON_HEADER: ["odd"]},
    {topology.ORIGIN_HEADER: "[red]", topology.REASON_HEADER: "\x1b[2Jgone"},
    None,
)


def test_dead_messages_with_the_oddest_headers_are_listed_and_dropped(
    command: Start, environment: dict[str, str], node: PrivateNode
) -> None:
    Store.open(load_settings(store_url=environment["KEEPWARM_STORE_URL"])).close()
    dead = topology.DEAD_MESSAGES_QUEUE
    for number, headers in enumerate(ODD_HEADERS):
        body = b"\xff\x00" + bytes([number])
        send(node, topology.DEAD_EXCHANGE, dead, body, how=pika.BasicProperties(headers=headers))
    wait_for_messages(node, dead, len(ODD_HEADERS), "the dead messages")
    numbers = dead_messages(command)
    assert len(set(numbers)) == len(ODD_HEADERS)
    assert command("dead", "retry", numbers[0]).wait() == 2  # there is no way back
    run_well(command, "dead", "drop", numbers[0])
    assert dead_messages(command) == numbers[1:]


def test_a_dead_claim_is_listed_shown_tried_again_and_let_go(
    command: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    lines = [{"id": f"claim-{number}", "claim": f"Claim {number}."} for number in range(16)]
    for number in (3, 11):
        lines[number]["evidence"] = "many different words " * 60
    run_id = submit(command, write_claims(tmp_path / "claims.jsonl", lines))
    collecting = command("collect", "--until", run_id)
    worker = command("worker", VLLM_TEST_FAULT="crash-long", KEEPWARM_CLAIM_FAILURES="2")
    assert collecting.wait() == 0, worker.output
    end_well(worker)
    listed = run_well(command, "dead", "list", run_id)
    assert "claim-3" in listed and "claim-11" in listed and "engine-failed" in listed
    shown = run_well(command, "dead", "show", run_id, "claim-3")
    assert "many different words" in shown and "Segmentation fault" in shown
    assert command("dead", "show", run_id, "claim-4").wait() == 6
    # A sound engine answers the one that is tried again; the other stays dead, and is let go.
    run_well(command, "dead", "retry", run_id, "claim-3")
    assert not _complete(environment, run_id)
    collecting = command("collect", "--until", run_id)
    worker = command("worker")
    assert collecting.wait() == 0, collecting.output
    end_well(worker)
    by_id = {claim_id: (label, reason) for claim_id, label, reason in outcomes(environment)}
    assert len(by_id) == 16 and by_id["claim-3"][0] and by_id["claim-3"][1] is None
    assert by_id["claim-11"] == (None, "engine-failed")
    run_well(command, "dead", "drop", run_id, "claim-11")
    assert "claim-11" not in run_well(command, "dead", "list")
    status = status_of(environment, run_id)
    assert status is not None
    assert (status.total, status.done, status.dead, status.complete) == (16, 15, 1, True)


def test_a_dead_claim_that_is_tried_again_and_fails_again_is_dead_once(
    command: Start, environment: dict[str, str], tmp_path: Path
) -> None:
    lines = [{"id": "poison", "claim": "Long.", "evidence": "many different words " * 60}]
    run_id = submit(command, write_claims(tmp_path / "claims.jsonl", lines))
    crashing = {"VLLM_TEST_FAULT": "crash-long", "KEEPWARM_CLAIM_FAILURES": "2"}
    worker = command("worker", **crashing)
    for tried_again in (False, True):
        if tried_again:
            run_well(command, "dead", "retry", run_id)
        collecting = command("collect", "--until", run_id)
        assert collecting.wait() == 0, worker.output
        assert outcomes(environment) == [("poison", None, "engine-failed")]
    end_well(worker)
