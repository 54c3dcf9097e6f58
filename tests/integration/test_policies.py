"""What a broker's manager may do to our queues: policies, and an upgrade from RabbitMQ 3 to 4."""

import json
import signal
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress

import httpx
import pika
import pytest

from services.broker import BrokerAddress, PrivateNode
from services.broker.dead_messages import DeadMessages, reason
from services.broker.declarations import quorum_arguments
from services.contracts import ContextSpec, topology
from services.models.files import pin_model
from tests.integration.conftest import (
    PATIENCE,
    Command,
    commands,
    delete_queues,
    plain_connection,
    wait_for_messages,
    wait_until,
)
from tests.integration.runs import submit

Start = Callable[..., Command]
# A collector reports a run that stands still after 30 s otherwise.
SOON = {"TEST_WAITS": "services.cli.collect._STALLED_SECONDS=5"}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateNode]:
    """With the management API."""
    directory = tmp_path_factory.mktemp("managed") / "node"
    with PrivateNode(directory, plugins=["rabbitmq_management"]) as running:
        wait_until(lambda: answers(management(running)), "the management API")
        yield running


def management(node: PrivateNode) -> str:
    return f"http://127.0.0.1:{node.plugin_ports['rabbitmq_management']}"


def answers(url: str) -> bool:
    with suppress(OSError):
        urllib.request.urlopen(url).close()
        return True
    return False


@pytest.fixture
def managed(environment: dict[str, str], node: PrivateNode) -> Iterator[Start]:
    with commands({**environment, "KEEPWARM_BROKER_MANAGEMENT_URL": management(node)}) as start:
        yield start


@pytest.fixture
def policy(node: PrivateNode) -> Iterator[Callable[..., None]]:
    """Sets the policy `site` on all queues, unless told otherwise."""
    url = f"{management(node)}/api/policies/%2F/site"
    with httpx.Client(auth=("keepwarm", node.password)) as api:

        def set_policy(definition: str, pattern: str = ".*") -> None:
            body = {"pattern": pattern, "definition": json.loads(definition)}
            api.put(url, json=body).raise_for_status()

        yield set_policy
        api.delete(url)  # a test that was skipped has set none


def doctor(start: Start) -> tuple[dict[str, str], int]:
    """What it finds of the broker."""
    looking = start("doctor", "--json")
    code = looking.wait()
    found = next(line for line in looking.lines if '"check": "broker"' in line)
    return json.loads(found), code


@pytest.mark.parametrize(
    ("definition", "says"),
    [
        ('{"message-ttl": 86400000}', "policy site sets message-ttl to 86400000 on "),
        (
            '{"max-length": 1000}',
            "policy site sets max-length to 1000 on dead-messages: the oldest",
        ),
    ],
)
def test_a_policy_that_loses_messages_is_reported_by_submit_collect_and_doctor(
    managed: Start, policy: Callable[..., None], definition: str, says: str
) -> None:
    policy(definition)
    submitting = managed("submit", "samples/claims.jsonl", "--batch-size", "64")
    assert submitting.wait() == 0, submitting.output
    told = " ".join(submitting.output.split())
    assert f"Warning: {says}" in told
    assert "rabbitmqctl clear_policy -p / site" in told
    collecting = managed("collect")
    collecting.said(says)
    collecting.signal(signal.SIGTERM)
    assert collecting.wait() == 0, collecting.output
    found, code = doctor(managed)
    assert (found["level"], code) == ("error", 5)
    assert says in found["message"]


def test_a_short_queue_that_refuses_what_is_too_much_is_a_warning(
    managed: Start, policy: Callable[..., None]
) -> None:
    policy('{"max-length": 1000, "overflow": "reject-publish"}')
    found, _ = doctor(managed)
    assert found["level"] == "warning"
    assert "publishers wait while the queue is full" in found["message"]


def test_without_policies_nothing_is_reported(managed: Start) -> None:
    submitting = managed("submit", "samples/claims.jsonl")
    assert submitting.wait() == 0 and "Warning" not in submitting.output, submitting.output
    found, _ = doctor(managed)
    assert found["level"] == "ok", found


def test_doctor_reports_that_a_user_may_not_read_policies(
    managed: Start, node: PrivateNode
) -> None:
    node.control("add_user", "stranger", "secret")
    try:
        node.control("set_permissions", "stranger", ".*", ".*", ".*")
        url = f"amqp://stranger@127.0.0.1:{node.port}/"
        found, _ = doctor(
            lambda *arguments: managed(
                *arguments, KEEPWARM_BROKER_URL=url, KEEPWARM_BROKER_PASSWORD="secret"
            )
        )
    finally:
        node.control("delete_user", "stranger")
    assert "Policies were not checked: stranger may not" in found["message"]


def test_claims_that_a_policy_dropped_are_dead_messages_with_that_reason(
    managed: Start, policy: Callable[..., None], node: PrivateNode, address: BrokerAddress
) -> None:
    policy('{"message-ttl": 100}', r"^claims\.")
    submit(managed)
    wait_for_messages(node, topology.DEAD_MESSAGES_QUEUE, 15, "all given up")
    with DeadMessages(address, PATIENCE) as messages:
        found = messages.first().values()
        assert {reason(message) for message in found} == {
            "the broker removed it: it waited longer than a policy's message-ttl"
        }
    wait_for_messages(node, topology.DEAD_MESSAGES_QUEUE, 15, "all of them back")
    with DeadMessages(address, PATIENCE) as messages:
        assert messages.settle(lambda _: "drop") == {"drop": 15}


def test_the_collector_reports_that_a_policy_lost_the_run_it_waits_for(
    managed: Start, policy: Callable[..., None], node: PrivateNode
) -> None:
    policy('{"message-ttl": 100}')
    run_id = submit(managed)
    for queue in (topology.RUNS_QUEUE, topology.DEAD_MESSAGES_QUEUE):
        wait_for_messages(node, queue, 0, "nothing is left of it")
    collecting = managed("collect", "--until", run_id, **SOON)
    collecting.said("run.waiting")
    assert "the run is not announced" in collecting.output
    collecting.signal(signal.SIGTERM)
    assert collecting.wait() == 0, collecting.output


def test_the_collector_reports_claims_that_a_policy_removed(
    managed: Start, policy: Callable[..., None], node: PrivateNode
) -> None:
    policy('{"message-ttl": 100}', r"^claims\.")
    run_id = submit(managed)
    wait_for_messages(node, topology.DEAD_MESSAGES_QUEUE, 15, "all given up")
    collecting = managed("collect", "--until", run_id, **SOON)
    collecting.said('"messages": 15')
    collecting.said("run.waiting")
    collecting.said("`keepwarm dead retry` sends them again")
    collecting.signal(signal.SIGTERM)
    assert collecting.wait() == 0, collecting.output


# Queues that RabbitMQ 4 took over from RabbitMQ 3 have no delivery limit among their arguments.


@pytest.fixture
def old_queues(node: PrivateNode, environment: dict[str, str]) -> Iterator[str]:
    """All of them, as RabbitMQ 3 has them; the claims queue's name."""
    connection = plain_connection(node)
    channel = connection.channel()
    if int(connection._impl.server_properties["version"].partition(".")[0]) < 4:
        connection.close()
        pytest.skip("only RabbitMQ 4 has queues from RabbitMQ 3: `make test-broker` runs it")
    claims = topology.claims_queue(
        pin_model(ContextSpec(model=environment["KEEPWARM_MODEL"])).context_id
    )
    for queue in (*topology.CORE_QUEUES, claims):
        channel.queue_delete(queue)
        letters = queue != topology.DEAD_MESSAGES_QUEUE
        arguments = quorum_arguments("3.13.7", dead_letters=letters)
        channel.queue_declare(queue, durable=True, arguments=arguments)
    connection.close()
    yield claims
    delete_queues(node, *topology.CORE_QUEUES, claims)


def test_a_run_on_queues_from_rabbitmq_3_is_complete_and_warns(
    managed: Start, old_queues: str
) -> None:
    run_id = submit(managed)
    collecting = managed("collect", "--until", run_id)
    for queue in topology.CORE_QUEUES:
        collecting.said(f'"queue": "{queue}"')
    assert "removes a message that was returned 20 times" in collecting.output
    working = managed("worker")
    assert collecting.wait() == 0, collecting.output
    working.signal(signal.SIGTERM)
    assert working.wait() == 0, working.output


def test_doctor_tells_of_queues_from_rabbitmq_3_until_a_policy_lifts_their_limit(
    managed: Start, policy: Callable[..., None], old_queues: str
) -> None:
    managed("collect", "--until", submit(managed)).said("broker.connected")
    found, _ = doctor(managed)
    assert found["level"] == "warning"
    assert "created before RabbitMQ 4" in found["message"]
    policy('{"delivery-limit": -1}')
    assert doctor(managed)[0]["level"] == "ok"


def test_a_policy_lets_messages_of_an_old_queue_be_returned_without_end(
    node: PrivateNode, policy: Callable[..., None], old_queues: str
) -> None:
    policy('{"delivery-limit": -1}')
    connection = plain_connection(node)
    channel = connection.channel()
    channel.confirm_delivery()
    channel.basic_publish("", old_queues, b"{}", pika.BasicProperties(delivery_mode=2))
    for _ in range(50):
        got, _, _ = wait_until(lambda: next_of(channel, old_queues), "the message again")
        channel.basic_nack(got.delivery_tag, requeue=True)
    connection.close()


def next_of(channel: pika.adapters.blocking_connection.BlockingChannel, queue: str):
    got = channel.basic_get(queue)
    return got if got[0] is not None else None


def test_a_queue_of_another_kind_is_still_refused(
    node: PrivateNode, managed: Start, old_queues: str
) -> None:
    connection = plain_connection(node)
    channel = connection.channel()
    channel.queue_delete(topology.VERDICTS_QUEUE)
    arguments = quorum_arguments("3.13.7", dead_letters=True)
    channel.queue_declare(
        topology.VERDICTS_QUEUE, durable=True, arguments=arguments | {"x-delivery-limit": 50}
    )
    connection.close()
    collecting = managed("collect")
    assert collecting.wait() == 5, collecting.output
    assert "has a queue with other arguments than Keepwarm's" in " ".join(collecting.output.split())
