"""What `keepwarm doctor` reports about a broker and of PostgreSQL: real ones."""

import json
from collections.abc import Callable

import psycopg
import pytest
from pika.exceptions import ChannelClosedByBroker, UnroutableError

from services.broker import PrivateNode
from services.contracts import load_settings, topology
from services.store import Store
from services.store.schema import SCHEMA_VERSION
from tests.integration.conftest import Command, delete_queues, plain_connection
from tests.integration.postgres import PostgreSQL

Start = Callable[..., Command]


def diagnosis(
    command: Start, *arguments: str, about: str = "broker", **variables: str
) -> tuple[int, str]:
    doctor = command("doctor", "--json", *arguments, **variables)
    code = doctor.wait()
    return code, next(line for line in doctor.lines if f'"check": "{about}"' in line)


def test_a_broker_without_problems_is_ok(command: Start) -> None:
    code, finding = diagnosis(command)
    assert code == 0
    assert '"ok"' in finding and "its queues have the right arguments" in finding
    assert f"{topology.VERDICTS_QUEUE} 0" in finding


def test_missing_queues_and_exchanges_are_named_and_not_created(
    command: Start, node: PrivateNode
) -> None:
    queue, exchange = topology.VERDICTS_QUEUE, topology.HEARTBEATS_EXCHANGE
    delete_queues(node, queue)
    connection = plain_connection(node)
    connection.channel().exchange_delete(exchange)
    code, finding = diagnosis(command)
    assert code == 0
    assert '"warning"' in finding and f"missing: {exchange}, {queue}. The next collector" in finding
    for ask in ("queue_declare", "exchange_declare"):
        with pytest.raises(ChannelClosedByBroker, match="NOT_FOUND"):
            getattr(connection.channel(), ask)(queue if "queue" in ask else exchange, passive=True)
    connection.close()


def test_nothing_is_created_on_an_empty_broker(command: Start, node: PrivateNode) -> None:
    delete_queues(node, *topology.CORE_QUEUES)
    connection = plain_connection(node)
    for exchange in topology.CORE_EXCHANGES:
        connection.channel().exchange_delete(exchange)
    code, finding = diagnosis(command)
    assert code == 0
    assert '"warning"' in finding and "has no queues yet: a collector creates them" in finding
    with pytest.raises(ChannelClosedByBroker, match="NOT_FOUND"):
        connection.channel().queue_declare(topology.VERDICTS_QUEUE, passive=True)
    connection.close()


def test_a_missing_binding_is_not_created(command: Start, node: PrivateNode) -> None:
    queue, exchange = topology.VERDICTS_QUEUE, topology.VERDICTS_EXCHANGE
    connection = plain_connection(node)
    channel = connection.channel()
    channel.queue_unbind(queue, exchange, queue)
    assert diagnosis(command)[0] == 0
    channel.confirm_delivery()
    with pytest.raises(UnroutableError):
        channel.basic_publish(exchange, queue, b"", mandatory=True)
    connection.close()


def test_a_queue_of_another_kind_is_an_error(command: Start, node: PrivateNode) -> None:
    delete_queues(node, topology.VERDICTS_QUEUE)
    connection = plain_connection(node)
    connection.channel().queue_declare(topology.VERDICTS_QUEUE, durable=True)
    connection.close()
    try:
        code, finding = diagnosis(command)
    finally:
        delete_queues(node, topology.VERDICTS_QUEUE)
    assert code == 5
    assert '"error"' in finding and "Drain and delete that queue" in finding


def test_a_wrong_password_and_a_wrong_address_are_errors(command: Start) -> None:
    code, finding = diagnosis(command, KEEPWARM_BROKER_PASSWORD="wrong")
    assert code == 5
    assert "refused us" in finding and "wrong" not in finding
    code, finding = diagnosis(
        *(command, "--broker", "amqp://keepwarm@127.0.0.1:1/"),
        KEEPWARM_BROKER_CONNECT_TIMEOUT_SECONDS="2",
    )
    assert code == 5
    assert "Check that it is running and that the address is right" in finding


def rows(url: str, query: str) -> list[tuple[object, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(query).fetchall()


TABLES = "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1"


def test_an_empty_database_stays_empty(command: Start, postgresql: PostgreSQL) -> None:
    url = postgresql.new_database()
    code, finding = diagnosis(command, "--store", url, about="store")
    assert (code, json.loads(finding)["level"]) == (0, "ok")
    assert "empty, the collector creates its tables" in finding
    assert rows(url, TABLES) == []


def test_a_database_of_an_older_version_is_left_unchanged(
    command: Start, postgresql: PostgreSQL
) -> None:
    url = postgresql.new_database()
    Store.open(load_settings(store_url=url)).close()
    with psycopg.connect(url) as connection:
        connection.execute("UPDATE keepwarm_schema SET version = 3")
        connection.execute("DROP TABLE verdict_counts")
    before = rows(url, TABLES)
    code, finding = diagnosis(command, "--store", url, about="store")
    assert (code, json.loads(finding)["level"]) == (0, "warning")
    assert "version 3, which the next collector upgrades" in finding
    assert rows(url, TABLES) == before
    assert rows(url, "SELECT version FROM keepwarm_schema") == [(3,)] != [(SCHEMA_VERSION,)]


def test_the_check_for_write_access_changes_nothing(command: Start, postgresql: PostgreSQL) -> None:
    url = postgresql.new_database()
    Store.open(load_settings(store_url=url)).close()
    code, finding = diagnosis(command, "--store", url, about="store")
    assert (code, json.loads(finding)["level"]) == (0, "ok")
    assert rows(url, "SELECT version FROM keepwarm_schema") == [(SCHEMA_VERSION,)]


GRANTS = {
    "to read": ("GRANT SELECT ON ALL TABLES IN SCHEMA public TO {0}", "permission denied for"),
    "all but numbers": (
        "GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {0}",
        "the sequence of runs.run_key",
    ),
    "all, and a server that only reads": (
        "GRANT ALL ON ALL TABLES IN SCHEMA public TO {0};"
        "GRANT ALL ON ALL SEQUENCES IN SCHEMA public TO {0};"
        "ALTER ROLE {0} SET default_transaction_read_only = on",
        "read-only transaction",
    ),
}


@pytest.mark.parametrize("granted", GRANTS)
def test_read_only_access_is_a_warning_that_names_the_commands_it_is_enough_for(
    command: Start, postgresql: PostgreSQL, granted: str
) -> None:
    url, grant = postgresql.new_database(), GRANTS[granted]
    Store.open(load_settings(store_url=url)).close()
    role = f"reader{list(GRANTS).index(granted)}"
    with psycopg.connect(url) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN; {grant[0].format(role)}")
    as_reader = url.replace("//keepwarm@", f"//{role}@")
    code, finding = diagnosis(command, "--store", as_reader, about="store")
    assert (code, json.loads(finding)["level"]) == (0, "warning")
    assert "enough for `status`" in finding and grant[1] in finding
    collecting = command("collect", "--store", as_reader)
    assert collecting.wait() == 6, collecting.output
    assert "this user can read the store" in " ".join(collecting.output.split())


def test_an_empty_database_where_no_tables_may_be_created_is_a_warning(
    command: Start, postgresql: PostgreSQL
) -> None:
    url = postgresql.new_database()
    with psycopg.connect(url) as connection:
        connection.execute("CREATE ROLE guest LOGIN")
        connection.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    as_guest = url.replace("//keepwarm@", "//guest@")
    code, finding = diagnosis(command, "--store", as_guest, about="store")
    assert (code, json.loads(finding)["level"]) == (0, "warning")
    assert "permission denied for schema public" in finding
