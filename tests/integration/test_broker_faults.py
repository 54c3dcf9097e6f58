"""The broker and the way to it fail in the midst of a run; each claim has one outcome all the same.

Everything is real but the model: a RabbitMQ node of this module's own, the commands as processes,
and a proxy where the network fails.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from services.broker import PrivateNode
from services.broker.declarations import quorum_arguments
from services.contracts import ContextSpec, Settings, topology
from services.models.files import pin_model
from tests.conftest import sample_lines
from tests.integration.conftest import (
    delete_queues,
    ended,
    let_queues_age,
    messages_in,
    plain_connection,
    wait_until,
)
from tests.integration.runs import (
    CLAIMS,
    SLOWLY,
    Start,
    UnderWay,
    assert_complete,
    begin,
    end_well,
    go_on,
    held,
    status_of,
    submit,
    warm_here,
    write_claims,
)
from tests.proxy import Proxy

# Else a link waits up to 15 s before it tries again,
SOON = {"TEST_WAITS": "services.broker.link._LONGEST_DELAY_SECONDS=2"}
# bears a broker that refuses it for a minute,
AT_ONCE = {"TEST_WAITS": "services.broker.link._REFUSED_SECONDS=5"}
# and looks every 15 s, four times, whether it hears nothing where there is something.
LOOKS_OFTEN = {"TEST_WAITS": "services.broker.consumer._IDLE_CHECK_SECONDS=2"}


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateNode]:
    """A node that may be killed."""
    with PrivateNode(tmp_path_factory.mktemp("faults") / "node") as running:
        yield running


@pytest.fixture
def old_queues(broker: Settings) -> Callable[[], None]:
    """Waits until the queues are old enough to outlive their node's violent end."""
    made = time.monotonic()
    return lambda: let_queues_age(made)


@pytest.fixture
def proxy(node: PrivateNode) -> Iterator[Proxy]:
    with Proxy(node.port) as running:
        yield running


@pytest.fixture
def claims_queue(small_model: Path) -> str:
    return topology.claims_queue(pin_model(ContextSpec(model=str(small_model))).context_id)


def through(proxy: Proxy) -> dict[str, str]:
    return {
        "KEEPWARM_BROKER_URL": f"amqp://keepwarm@127.0.0.1:{proxy.port}/",
        "KEEPWARM_BROKER_HEARTBEAT_SECONDS": "5",
    }


def is_complete(environment: dict[str, str], run_id: str) -> bool:
    status = status_of(environment, run_id)
    return status is not None and status.complete


def test_services_whose_password_was_changed_end_and_give_their_engine_back(
    command: Start, environment: dict[str, str], node: PrivateNode
) -> None:
    run = begin(command, environment, **AT_ONCE)
    try:
        with held(environment):
            node.control("change_password", "keepwarm", "another one")
            node.control("close_all_connections", "the password was changed")
        for service in run.services:
            assert service.wait() == 5, service.output
            assert "refused us" in service.lines[-1]
            assert "Check the user, the password (KEEPWARM_BROKER_PASSWORD" in service.lines[-1]
        wait_until(lambda: warm_here(environment)[0].attached == 0, "the lease given back")
    finally:
        node.control("change_password", "keepwarm", node.password)
    go_on(command, environment, run.run_id).completes()


@pytest.fixture
def small_messages(node: PrivateNode) -> Iterator[Callable[[], None]]:
    """Lets the broker refuse messages over 3,000 bytes, on channels that are opened later."""

    def limit(size: int) -> str:
        # Read by RabbitMQ 3 and by RabbitMQ 4.
        return (
            f"application:set_env(rabbit, max_message_size, {size}),"
            f" persistent_term:put(max_message_size, {size})."
        )

    yield lambda: node.control("eval", limit(3_000)) and None
    node.control("eval", limit(2**27))


@pytest.mark.parametrize("service", ["producer", "worker", "collector"])
def test_a_service_whose_message_is_too_large_for_the_broker_ends_with_the_next_step(
    service: str,
    command: Start,
    environment: dict[str, str],
    node: PrivateNode,
    broker: Settings,
    claims_queue: str,
    small_messages: Callable[[], None],
) -> None:
    if service != "producer":
        submit(command)
    if service == "collector":
        connection = plain_connection(node)
        channel = connection.channel()
        _, properties, body = channel.basic_get(claims_queue, auto_ack=True)
        channel.confirm_delivery()
        channel.basic_publish(topology.RETURNS_EXCHANGE, topology.RETURNS_QUEUE, body, properties)
        connection.close()
    small_messages()
    arguments = {
        "producer": ("submit", CLAIMS),
        "worker": ("worker",),
        "collector": ("collect",),
    }[service]
    refused = command(*arguments)
    assert refused.wait() == 5, refused.output
    (said,) = [line for line in refused.lines if line.startswith("keepwarm: ")]
    assert "is larger than" in said
    assert "Set max_message_size = 16777216 in its rabbitmq.conf" in said
    assert "a smaller --batch-size" in said


@pytest.mark.parametrize("end", [psutil.Process.kill, psutil.Process.terminate])
def test_a_node_that_ends_in_the_midst_of_a_run_is_waited_for_and_nothing_is_lost(
    command: Start,
    environment: dict[str, str],
    node: PrivateNode,
    old_queues: Callable[[], None],
    end: Callable[[psutil.Process], None],
) -> None:
    run_id = submit(command)
    old_queues()
    run = go_on(command, environment, run_id, **SOON)
    with held(environment):
        end(node.process())
        ended(node)
        for service in run.services:
            service.said("broker.waiting")
    node.start()
    with held(environment):  # links come back one by one
        for service in run.services:
            service.said("broker.connected", times=4)
    run.completes()


def test_a_node_that_is_away_while_an_engine_starts_is_waited_for(
    command: Start,
    environment: dict[str, str],
    node: PrivateNode,
    old_queues: Callable[[], None],
) -> None:
    run_id = submit(command)
    old_queues()
    collecting = command("collect", "--until", run_id, **SOON)
    worker = command(
        "worker", VLLM_TEST_START_SECONDS="8", KEEPWARM_BROKER_CONNECT_TIMEOUT_SECONDS="2", **SOON
    )
    worker.said("engine.starting")
    collecting.said("broker.connected", times=2)
    node.process().terminate()
    ended(node)
    worker.said("engine.ready")
    time.sleep(4)  # twice of what it waits at first
    assert worker.process.poll() is None, worker.output
    node.start()
    assert collecting.wait() == 0, worker.output
    assert_complete(environment, run_id)
    end_well(worker)


def test_connections_that_are_reset_again_and_again_lose_nothing(
    command: Start, environment: dict[str, str], proxy: Proxy
) -> None:
    run = begin(command, environment, **through(proxy), **SOON)
    for _ in range(4):
        wait_until(lambda: proxy.connections, "a connection")
        proxy.cut()
        time.sleep(0.6)
    run.completes()
    for service in run.services:
        assert "broker.waiting" in service.output


def test_a_network_that_swallows_everything_for_a_while_loses_nothing(
    command: Start, environment: dict[str, str], proxy: Proxy
) -> None:
    run = begin(command, environment, **through(proxy), **SOON)
    proxy.black_hole()
    for service in run.services:
        service.said("broker.waiting")  # the heartbeats are missed
    time.sleep(5)  # what connects again comes to nothing
    proxy.heal()
    run.completes()


def test_a_submit_whose_connection_is_reset_in_its_midst_sends_everything(
    command: Start,
    environment: dict[str, str],
    proxy: Proxy,
    node: PrivateNode,
    claims_queue: str,
    tmp_path: Path,
) -> None:
    lines = [{**line, "id": f"{line['id']}-{n}"} for n in range(4) for line in sample_lines()]
    file = write_claims(tmp_path / "many.jsonl", lines)
    submitting = command(
        *("submit", str(file), "--batch-size", "1"),
        **through(proxy),
        KEEPWARM_PUBLISH_WINDOW="1",
    )
    wait_until(lambda: messages_in(node, claims_queue) > 10, "some claims sent")
    proxy.cut()
    assert submitting.wait() == 0, submitting.output
    assert "broker.waiting" in submitting.output
    run_id = submitting.lines[-1].strip()
    run = go_on(command, environment, run_id)
    run.completes([line["id"] for line in lines])


def test_queues_that_are_deleted_under_a_collector_are_made_again(
    command: Start, environment: dict[str, str], node: PrivateNode
) -> None:
    collecting = command("collect")
    collecting.said("broker.connected", times=2)
    delete_queues(node, topology.RETURNS_QUEUE, topology.VERDICTS_QUEUE)
    collecting.said("broker.cancelled")
    collecting.said("broker.connected", times=3)
    run_id = submit(command)
    worker = command("worker")
    wait_until(lambda: is_complete(environment, run_id), "the run's end")
    assert_complete(environment, run_id)
    end_well(worker, collecting)


def test_verdicts_that_no_queue_takes_wait_in_the_worker_until_one_does(
    command: Start, environment: dict[str, str], node: PrivateNode
) -> None:
    run_id = submit(command)
    delete_queues(node, topology.VERDICTS_QUEUE)
    worker = command("worker", **SLOWLY)
    worker.said("broker.unroutable", times=3)
    collecting = command("collect", "--until", run_id)
    UnderWay(run_id, collecting, worker, environment).completes()
    assert worker.output.count("broker.connected") == 2  # it held its connection all the while


def test_a_worker_whose_claims_queue_is_deleted_waits_for_the_next_producer(
    command: Start, environment: dict[str, str], node: PrivateNode, claims_queue: str
) -> None:
    worker = command("worker", **SLOWLY)
    worker.said("worker.taking")
    delete_queues(node, claims_queue)
    worker.said("broker.cancelled")
    worker.said("waiting for a producer and a collector to make it")
    run_id = submit(command)
    collecting = command("collect", "--until", run_id)
    UnderWay(run_id, collecting, worker, environment).completes()


def make_again(node: PrivateNode, queue: str, exchange: str) -> None:
    """Delete a queue and make it again so fast that RabbitMQ does not tell its consumer."""
    connection = plain_connection(node)
    version = connection._impl.server_properties["version"]
    arguments = quorum_arguments(version, dead_letters=True)
    channel = connection.channel()
    channel.queue_delete(queue)
    channel.queue_declare(queue, durable=True, arguments=arguments)
    channel.queue_bind(queue, exchange, queue)
    connection.close()


def test_a_worker_whose_queue_was_deleted_and_made_again_at_once_is_served_again(
    command: Start, environment: dict[str, str], node: PrivateNode, claims_queue: str
) -> None:
    worker = command("worker", **SLOWLY, **LOOKS_OFTEN)
    worker.said("worker.taking")
    make_again(node, claims_queue, topology.CLAIMS_EXCHANGE)
    run_id = submit(command)
    collecting = command("collect", "--until", run_id)
    UnderWay(run_id, collecting, worker, environment).completes()


def test_a_collector_whose_queue_was_deleted_and_made_again_at_once_is_served_again(
    command: Start, environment: dict[str, str], node: PrivateNode
) -> None:
    collecting = command("collect", **LOOKS_OFTEN)
    collecting.said("broker.connected", times=2)
    make_again(node, topology.VERDICTS_QUEUE, topology.VERDICTS_EXCHANGE)
    run_id = submit(command)
    worker = command("worker")
    wait_until(lambda: is_complete(environment, run_id), "the run's end")
    assert_complete(environment, run_id)
    end_well(worker, collecting)


@pytest.fixture
def impatient(node: PrivateNode) -> Iterator[None]:
    """A broker that closes channels whose messages are not acknowledged within three seconds."""

    def set_both(timeout: int, interval: int) -> list[int]:
        """What they were."""
        values = f"[{{consumer_timeout, {timeout}}}, {{channel_tick_interval, {interval}}}]"
        change = "{ok, Was} = application:get_env(rabbit, Key), application:set_env(rabbit, Key, V)"
        return json.loads(
            node.control("eval", f"[begin {change}, Was end || {{Key, V}} <- {values}].")
        )

    was = set_both(3_000, 500)
    yield
    set_both(*was)


@pytest.mark.usefixtures("impatient")
def test_a_worker_that_held_claims_for_too_long_answers_them_all_the_same(
    command: Start, environment: dict[str, str]
) -> None:
    run = begin(command, environment)
    with held(environment):
        run.worker.said("PRECONDITION_FAILED")
    run.completes()


@pytest.mark.parametrize(
    ("alarm", "all_clear", "reason"),
    [
        (
            ("set_vm_memory_high_watermark", "absolute", "1000000"),
            ("set_vm_memory_high_watermark", "0.4"),
            "memory",
        ),
        (("set_disk_free_limit", "1000000GB"), ("set_disk_free_limit", "50MB"), "disk"),
    ],
)
def test_an_alarm_of_the_broker_is_waited_for_and_reported(
    command: Start,
    environment: dict[str, str],
    node: PrivateNode,
    alarm: tuple[str, ...],
    all_clear: tuple[str, ...],
    reason: str,
) -> None:
    run_id = submit(command)
    run = go_on(command, environment, run_id)
    with held(environment):
        node.control(*alarm)
    try:
        run.worker.said("broker.blocked")
        submitting = command("submit", CLAIMS, "--limit", "32", "--batch-size", "8")
        submitting.said("broker.blocked")
        assert reason in submitting.output
        time.sleep(2)
        assert submitting.process.poll() is None
        assert run.collecting.process.poll() is None and run.worker.process.poll() is None
    finally:
        node.control(*all_clear)
    assert submitting.wait() == 0, submitting.output
    assert "broker.unblocked" in submitting.output
    run.completes()


def test_a_claims_queue_of_another_kind_is_refused_with_the_remedy(
    command: Start, node: PrivateNode, claims_queue: str
) -> None:
    delete_queues(node, claims_queue)
    connection = plain_connection(node)
    connection.channel().queue_declare(claims_queue, durable=True)
    connection.close()
    submitting = command("submit", CLAIMS)
    assert submitting.wait() == 5
    assert claims_queue in submitting.output
    assert (
        "Drain and delete that queue, or use a virtual host of Keepwarm's own" in submitting.output
    )
    delete_queues(node, claims_queue)
