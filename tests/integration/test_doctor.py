"""What `keepwarm doctor` says of a broker: a real one."""

from collections.abc import Callable

import pytest
from pika.exceptions import ChannelClosedByBroker

from services.broker import PrivateNode
from services.contracts import topology
from tests.integration.conftest import Command, delete_queues, plain_connection

Start = Callable[..., Command]


def diagnosis(command: Start, *arguments: str, **variables: str) -> tuple[int, str]:
    doctor = command("doctor", "--json", *arguments, KEEPWARM_ENGINE_PYTHON="python3", **variables)
    code = doctor.wait()
    return code, next(line for line in doctor.lines if '"broker"' in line)


def test_a_broker_that_is_well_is_said_to_be(command: Start) -> None:
    code, says = diagnosis(command)
    assert code == 0
    assert '"well"' in says and "its queues are as they should be" in says
    assert f"{topology.VERDICTS_QUEUE} 0" in says


def test_a_broker_without_queues_keeps_none(command: Start, node: PrivateNode) -> None:
    queue = topology.VERDICTS_QUEUE
    delete_queues(node, queue)
    code, says = diagnosis(command)
    assert code == 0
    assert '"note"' in says and "a collector makes them" in says
    connection = plain_connection(node)
    with pytest.raises(ChannelClosedByBroker, match="NOT_FOUND"):
        connection.channel().queue_declare(queue, passive=True)
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
    assert "Is it running, and is the address right?" in says
