"""What `keepwarm doctor` says of a broker and of PostgreSQL: real ones."""

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


def test_a_broker_that_is_well_is_said_to_be(command: Start) -> None:
    code, says = diagnosis(command)
    assert code == 0
    assert '"well"' in says and "its queues are as they should be" in says
    assert f"{topology.VERDICTS_QUEUE} 0" in says


def test_what_a_broker_lacks_is_named_and_not_made(command: Start, node: PrivateNode) -> None:
    queue, exchange = topology.VERDICTS_QUEUE, topology.PRESENCE_EXCHANGE
    delete_queues(node, queue)
    connection = plain_connection(node)
    connection.channel().exchange_delete(exchange)
    code, says = diagnosis(command)
    assert code == 0
    assert '"note"' in says and f"lacks {exchange}, {queue}: the next collector" in says
    for ask in ("queue_declare", "exchange_declare"):
        with pytest.raises(ChannelClosedByBroker, match="NOT_FOUND"):
            getattr(connection.channel(), ask)(queue if "queue" in ask else exchange, passive=True)
    connection.close()


def test_a_broker_without_anything_is_left_so(command: Start, node: PrivateNode) -> None:
    delete_queues(node, *topology.CORE_QUEUES)
    connection = plain_connection(node)
    for exchange in topology.HOUSE_EXCHANGES:
        connection.channel().exchange_delete(exchange)
    code, says = diagnosis(command)
    assert code == 0
    assert '"note"' in says and "has no queues yet: a collector makes them" in says
    with pytest.raises(ChannelClosedByBroker, match="NOT_FOUND"):
        connection.channel().queue_declare(topology.VERDICTS_QUEUE, passive=True)
    connection.close()


def test_a_binding_that_is_missing_is_not_made(command: Start, node: PrivateNode) -> None:
    queue, exchange = topology.VERDICTS_QUEUE, topology.VERDICTS_EXCHANGE
    connection = plain_connection(node)
    channel = connection.channel()
    channel.queue_unbind(queue, exchange, queue)
    assert diagnosis(command)[0] == 0
    channel.confirm_delivery()
    with pytest.raises(UnroutableError):
        channel.basic_publish(exchange, queue, b"", mandatory=True)
    connection.close()


def test_a_queue_of_another_kind_is_a_fault(command: Start, node: PrivateNode) -> None:
    delete_queues(node, topology.VERDICTS_QUEUE)
    connection = plain_connection(node)
    connection.channel().queue_declare(topology.VERDICTS_QUEUE, durable=True)
    connection.close()
    try:
        code, says = diagnosis(command)
    finally:
        delete_queues(node, topology.VERDICTS_QUEUE)
    assert code == 5
    assert '"fault"' in says and "Drain and delete that queue" in says


def test_a_wrong_password_and_a_wrong_address_are_faults(command: Start) -> None:
    code, says = diagnosis(command, KEEPWARM_BROKER_PASSWORD="wrong")
    assert code == 5
    assert "refused us" in says and "wrong" not in says
    code, says = diagnosis(command, "--broker", "amqp://keepwarm@127.0.0.1:1/")
    assert code == 5
    assert "Check that it is running and that the address is right" in says


def rows(url: str, query: str) -> list[tuple[object, ...]]:
    with psycopg.connect(url) as connection:
        return connection.execute(query).fetchall()


TABLES = "SELECT tablename FROM pg_tables WHERE schemaname = 'public' ORDER BY 1"


def test_an_empty_database_stays_empty(command: Start, postgresql: PostgreSQL) -> None:
    url = postgresql.new_database()
    code, says = diagnosis(command, "--store", url, about="store")
    assert (code, json.loads(says)["level"]) == (0, "well")
    assert "empty, the collector makes its tables" in says
    assert rows(url, TABLES) == []


def test_a_database_of_an_older_version_stays_so(command: Start, postgresql: PostgreSQL) -> None:
    url = postgresql.new_database()
    Store.open(load_settings(store_url=url)).close()
    with psycopg.connect(url) as connection:
        connection.execute("UPDATE keepwarm_schema SET version = 3")
        connection.execute("DROP TABLE verdict_counts")
    before = rows(url, TABLES)
    code, says = diagnosis(command, "--store", url, about="store")
    assert (code, json.loads(says)["level"]) == (0, "note")
    assert "version 3, would be upgraded by the next collector" in says
    assert rows(url, TABLES) == before
    assert rows(url, "SELECT version FROM keepwarm_schema") == [(3,)] != [(SCHEMA_VERSION,)]


def test_what_was_tried_is_taken_back(command: Start, postgresql: PostgreSQL) -> None:
    url = postgresql.new_database()
    Store.open(load_settings(store_url=url)).close()
    code, says = diagnosis(command, "--store", url, about="store")
    assert (code, json.loads(says)["level"]) == (0, "well")
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
def test_a_user_who_may_only_read_is_told_for_whom_that_is(
    command: Start, postgresql: PostgreSQL, granted: str
) -> None:
    url, grant = postgresql.new_database(), GRANTS[granted]
    Store.open(load_settings(store_url=url)).close()
    role = f"reader{list(GRANTS).index(granted)}"
    with psycopg.connect(url) as connection:
        connection.execute(f"CREATE ROLE {role} LOGIN; {grant[0].format(role)}")
    as_reader = url.replace("//keepwarm@", f"//{role}@")
    code, says = diagnosis(command, "--store", as_reader, about="store")
    assert (code, json.loads(says)["level"]) == (0, "note")
    assert "can be read, as `status`" in says and grant[1] in says
    collecting = command("collect", "--store", as_reader)
    assert collecting.wait() == 6, collecting.output
    assert "but not write it" in " ".join(collecting.output.split())


def test_an_empty_database_where_no_tables_may_be_made_is_noted(
    command: Start, postgresql: PostgreSQL
) -> None:
    url = postgresql.new_database()
    with psycopg.connect(url) as connection:
        connection.execute("CREATE ROLE guest LOGIN")
        connection.execute("REVOKE CREATE ON SCHEMA public FROM PUBLIC")
    as_guest = url.replace("//keepwarm@", "//guest@")
    code, says = diagnosis(command, "--store", as_guest, about="store")
    assert (code, json.loads(says)["level"]) == (0, "note")
    assert "permission denied for schema public" in says
