"""The store and the collector fail in the midst of a run; nothing is lost or counted twice."""

import random
import resource
import signal
import sqlite3
import time
from contextlib import closing

import psycopg
import psycopg.sql
import pytest

from services.broker import BrokerAddress, PrivateNode
from services.broker.dead_messages import DeadMessages
from services.contracts import load_settings, topology
from services.store import Store
from tests.conftest import sample_lines
from tests.integration.conftest import (
    PATIENCE,
    Command,
    messages_in,
    wait_for_messages,
    wait_until,
)
from tests.integration.postgres import PostgreSQL
from tests.integration.runs import (
    CLAIMS,
    Start,
    UnderWay,
    assert_complete,
    begin,
    end_well,
    held,
    outcomes,
    status_of,
    submit,
)
from tests.older_stores import downgrade
from tests.proxy import Proxy

# A transaction for every two verdicts, so that faults find many to fall into.
OFTEN = {"KEEPWARM_STORE_COMMIT_VERDICTS": "2"}


@pytest.fixture
def answered(command: Start, node: PrivateNode) -> str:
    """A run whose verdicts, in thirty messages, all wait at the broker."""
    run_id = submit(command, CLAIMS, "--batch-size", "8", KEEPWARM_STORE_URL="")
    worker = command("worker")
    wait_for_messages(node, topology.VERDICTS_QUEUE, 31, "30 batches and a start")
    end_well(worker)
    return run_id


def make_store(environment: dict[str, str]) -> None:
    Store.open(load_settings(store_url=environment["KEEPWARM_STORE_URL"])).close()


@pytest.mark.parametrize("seed", [1, 2])
def test_a_collector_killed_at_any_moment_loses_and_doubles_nothing(
    command: Start, environment: dict[str, str], seed: int
) -> None:
    moments = random.Random(seed)
    run_id = submit(command)
    worker = command("worker", VLLM_TEST_CLAIM_SECONDS="0.04")
    for _ in range(4):
        collecting = command("collect", **OFTEN)
        collecting.said("broker.connected", times=2)
        time.sleep(moments.uniform(0, 0.6))
        collecting.signal(signal.SIGKILL)
        collecting.wait()
    collecting = command("collect", "--until", run_id)
    UnderWay(run_id, collecting, worker, environment).completes()


def test_what_was_committed_and_never_acknowledged_comes_again_and_is_counted_as_duplicate(
    command: Start, answered: str, node: PrivateNode, environment: dict[str, str]
) -> None:
    make_store(environment)
    with (
        Proxy(node.port) as proxy,
        closing(sqlite3.connect(environment["KEEPWARM_STORE_URL"])) as other,
    ):
        other.execute("BEGIN IMMEDIATE")
        collecting = command(
            "collect", KEEPWARM_BROKER_URL=f"amqp://keepwarm@127.0.0.1:{proxy.port}/"
        )
        collecting.said("broker.connected", times=2)
        wait_for_messages(node, topology.VERDICTS_QUEUE, 0, "all taken")
        # It waits for the lock with all verdicts in hand; no acknowledgement will come through.
        proxy.black_hole()
        other.rollback()
        collecting.said("store.committed")
        wait_until(lambda: _done(environment, answered) == 240, "all committed")
        collecting.signal(signal.SIGKILL)
        collecting.wait()
    wait_for_messages(node, topology.VERDICTS_QUEUE, 31, "all back in the queue")
    again = command("collect")
    wait_until(lambda: _duplicates(environment, answered) == 240, "all counted as duplicates")
    assert_complete(environment, answered)
    end_well(again)
    assert messages_in(node, topology.VERDICTS_QUEUE) == 0


def _done(environment: dict[str, str], run_id: str) -> int:
    status = status_of(environment, run_id)
    return 0 if status is None else status.done


def _duplicates(environment: dict[str, str], run_id: str) -> int:
    status = status_of(environment, run_id)
    return 0 if status is None else status.duplicates


def test_a_store_that_another_process_locks_again_and_again_is_waited_for(
    command: Start, environment: dict[str, str]
) -> None:
    make_store(environment)
    run = begin(command, environment, **OFTEN)
    with closing(sqlite3.connect(environment["KEEPWARM_STORE_URL"], timeout=30)) as other:
        for _ in range(4):
            other.execute("BEGIN IMMEDIATE")
            time.sleep(0.5)
            other.rollback()
    run.completes()


def test_a_reader_that_never_ends_holds_nobody_up(
    command: Start, environment: dict[str, str]
) -> None:
    run = begin(command, environment, **OFTEN)
    with closing(sqlite3.connect(environment["KEEPWARM_STORE_URL"])) as other:
        other.execute("BEGIN")
        (before,) = other.execute("SELECT count(*) FROM outcomes").fetchone()
        run.completes()
        assert other.execute("SELECT count(*) FROM outcomes").fetchone() == (before,)


def limit_file_size(service: Command, size: int) -> None:
    """No file of the service's may grow beyond this: a full disk, as far as it can tell."""
    resource.prlimit(service.process.pid, resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def test_a_full_disk_is_waited_for_and_nothing_is_lost(
    command: Start, answered: str, node: PrivateNode, environment: dict[str, str]
) -> None:
    make_store(environment)
    with closing(sqlite3.connect(environment["KEEPWARM_STORE_URL"])) as other:
        other.execute("BEGIN IMMEDIATE")
        collecting = command("collect", "--until", answered)
        collecting.said("broker.connected", times=2)
        limit_file_size(collecting, 8192)
        other.rollback()
    collecting.said("store.waiting", times=2)
    assert "its disk is not full" in collecting.output
    assert _done(environment, answered) == 0
    limit_file_size(collecting, resource.RLIM_INFINITY)
    assert collecting.wait() == 0, collecting.output
    assert_complete(environment, answered)
    assert _duplicates(environment, answered) == 0
    wait_for_messages(node, topology.VERDICTS_QUEUE, 0, "all acknowledged")


@pytest.fixture
def database(environment: dict[str, str], postgresql: PostgreSQL) -> str:
    """A new database, which the commands use as their store."""
    environment["KEEPWARM_STORE_URL"] = postgresql.new_database()
    return environment["KEEPWARM_STORE_URL"]


@pytest.mark.usefixtures("database")
@pytest.mark.parametrize("how", [signal.SIGQUIT, signal.SIGINT])
def test_postgresql_that_is_restarted_in_the_midst_of_a_run_is_waited_for(
    command: Start, environment: dict[str, str], postgresql: PostgreSQL, how: signal.Signals
) -> None:
    run = begin(command, environment, **OFTEN)
    for _ in range(2):
        waits = run.collecting.output.count("store.waiting")
        with held(environment):
            postgresql.stop(how)
        run.collecting.said("store.waiting", times=waits + 1)  # as the next verdicts come
        commits = run.collecting.output.count("store.committed")
        with held(environment):
            postgresql.start()
            run.collecting.said("store.committed", times=commits + 1)
    run.completes()


def test_a_collector_killed_in_the_midst_of_a_transaction_has_written_none_of_it(
    command: Start, answered: str, environment: dict[str, str], database: str
) -> None:
    make_store(environment)
    with psycopg.connect(database) as other:
        # Outcomes are written before their deliveries: it stands still between the two.
        other.execute("LOCK TABLE deliveries IN EXCLUSIVE MODE")
        collecting = command("collect")
        wait_until(lambda: _waits_for_the_lock(other), "the collector in its transaction")
        collecting.signal(signal.SIGKILL)
        collecting.wait()
    assert outcomes(environment) == []
    collecting = command("collect", "--until", answered)
    assert collecting.wait() == 0, collecting.output
    assert_complete(environment, answered)
    assert _duplicates(environment, answered) == 0


def _waits_for_the_lock(connection: psycopg.Connection) -> bool:
    query = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    return connection.execute(query).fetchone() != (0,)


def test_claims_that_the_database_refuses_are_set_aside_and_all_others_are_stored(
    command: Start,
    answered: str,
    environment: dict[str, str],
    database: str,
    node: PrivateNode,
    address: BrokerAddress,
) -> None:
    make_store(environment)
    first = sample_lines()[0]["id"]
    with psycopg.connect(database) as other:
        other.execute(
            psycopg.sql.SQL("ALTER TABLE outcomes ADD CHECK (claim_id <> {})").format(first)
        )
    collecting = command("collect")
    wait_for_messages(node, topology.DEAD_MESSAGES_QUEUE, 1, "the batch with that claim")
    wait_until(lambda: len(outcomes(environment)) == 240 - 8, "all other batches stored")
    collecting.said("message.refused")
    assert "refuses a value" in collecting.output
    end_well(collecting)
    with psycopg.connect(database) as other:
        other.execute("ALTER TABLE outcomes DROP CONSTRAINT outcomes_claim_id_check")
    with DeadMessages(address, PATIENCE) as messages:
        assert messages.settle(lambda _: "retry") == {"retry": 1}
    again = command("collect", "--until", answered)
    assert again.wait() == 0, again.output
    assert_complete(environment, answered)


def test_collectors_that_share_postgresql_count_each_verdict_once(
    command: Start, answered: str, environment: dict[str, str], database: str
) -> None:
    collecting = [command("collect", "--until", answered, **OFTEN) for _ in range(2)]
    for each in collecting:
        assert each.wait() == 0, each.output
    assert_complete(environment, answered)
    # As a store of before has it: whoever opens it counts.
    with (
        Store.open(load_settings(store_url=database)) as store,
        store.transaction() as connection,
    ):
        downgrade(connection, 3)
    assert_complete(environment, answered)
