"""`keepwarm broker setup` on a real broker, and what its users then can and cannot do there."""

import gc
import json
import os
import re
import signal
import stat
import time
import urllib.error
import urllib.request
import warnings
from base64 import b64encode
from collections.abc import Callable, Iterator
from pathlib import Path

import pika
import psutil
import pytest
from pika.adapters.blocking_connection import BlockingChannel
from pika.exceptions import AMQPConnectionError, ChannelClosedByBroker

from services.broker import BrokerAddress, Declares, PrivateNode, Publisher
from services.broker.declarations import quorum_arguments
from services.broker.policies import check_policies
from services.contracts import (
    ClaimBatch,
    ContextSpec,
    DeadClaim,
    DeadReason,
    RunAnnouncement,
    Verdict,
    VerdictBatch,
    decode,
    encode,
    load_settings,
    topology,
)
from services.contracts.errors import BrokerRefused
from services.contracts.proofs import verdict_proof
from services.contracts.wire import Message
from services.models.files import pin_model
from tests.conftest import sample_lines
from tests.integration.conftest import PATIENCE, Command, wait_until
from tests.integration.runs import wait_for_the_first_verdicts

ROLES = ("producer", "worker", "collector", "operator")
VHOST = "keepwarm"
CLAIMS = topology.claims_queue("ctx-roles")
BOUND = {
    topology.DEAD_MESSAGES_QUEUE: topology.DEAD_EXCHANGE,
    topology.DEAD_CLAIMS_QUEUE: topology.DEAD_EXCHANGE,
    topology.RETURNS_QUEUE: topology.RETURNS_EXCHANGE,
    topology.VERDICTS_QUEUE: topology.VERDICTS_EXCHANGE,
    topology.RUNS_QUEUE: topology.RUNS_EXCHANGE,
    CLAIMS: topology.CLAIMS_EXCHANGE,
}
Act = Callable[[BlockingChannel], object]


class Broker:
    """A node with the management API, set up once by the real command."""

    def __init__(self, node: PrivateNode, secrets: Path) -> None:
        self.node = node
        self.secrets = secrets
        port = node.plugin_ports["rabbitmq_management"]
        self.management = f"http://127.0.0.1:{port}"
        self.seen: set[str] = set()
        """Every command line that was to be seen while a set-up ran."""

    def setup(self, *flags: str, password: str | None = None) -> tuple[int, str]:
        environment = {k: v for k, v in os.environ.items() if not k.startswith("KEEPWARM_")}
        environment["KEEPWARM_BROKER_ADMIN_PASSWORD"] = password or self.node.password
        running = Command(
            environment,
            *("broker", "setup", "--management", self.management, "--admin", "keepwarm"),
            *("--secrets", str(self.secrets), *flags),
        )
        try:
            while running.process.poll() is None:
                self.look_at_processes(running.process.pid)
                time.sleep(0.01)
            return running.wait(), running.output
        finally:
            running.end()

    def look_at_processes(self, pid: int) -> None:
        try:
            setup = psutil.Process(pid)
            for process in (setup, *setup.children(recursive=True)):
                self.seen.add(" ".join(process.cmdline()))
        except psutil.Error:
            pass

    def rabbitmqctl(self, *command: str) -> str:
        return self.node.control(*command)

    def password(self, role: str) -> str:
        return (self.secrets / f"{role}.password").read_text().strip()

    def connection(
        self, user: str, password: str, virtual_host: str = VHOST
    ) -> pika.BlockingConnection:
        return pika.BlockingConnection(
            pika.ConnectionParameters(
                "127.0.0.1", self.node.port, virtual_host, pika.PlainCredentials(user, password)
            )
        )

    def lets_in(self, role: str, password: str, virtual_host: str = VHOST) -> bool:
        with warnings.catch_warnings():
            # pika leaves its sockets open where it is not let in.
            warnings.simplefilter("ignore", ResourceWarning)
            try:
                self.connection(f"{VHOST}-{role}", password, virtual_host).close()
            except AMQPConnectionError:
                gc.collect()
                return False
        return True

    def may(self, role: str, act: Act) -> bool:
        """Whether the broker lets a role do it: True, or False for ACCESS_REFUSED alone."""
        connection = self.connection(f"{VHOST}-{role}", self.password(role))
        channel = connection.channel()
        channel.confirm_delivery()
        try:
            act(channel)
        except ChannelClosedByBroker as closed:
            assert closed.reply_code == 403, closed
            return False
        finally:
            connection.close()
        return True

    def http_status(self, role: str, method: str, path: str) -> int:
        credentials = b64encode(f"{VHOST}-{role}:{self.password(role)}".encode()).decode()
        request = urllib.request.Request(
            f"{self.management}/api/{path}",
            method=method,
            headers={"Authorization": f"Basic {credentials}"},
            data=b'{"password": "x", "tags": ""}' if method == "PUT" else None,
        )
        try:
            with urllib.request.urlopen(request) as response:
                return response.status
        except urllib.error.HTTPError as error:
            error.close()
            return error.code


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Broker]:
    directory = tmp_path_factory.mktemp("roles")
    with PrivateNode(directory / "node", plugins=["rabbitmq_management"]) as node:
        broker = Broker(node, directory / "secrets")
        wait_until(lambda: _answers(broker.management), "the management API")
        code, output = broker.setup()
        assert code == 0, output
        with broker.connection("keepwarm", node.password) as connection:
            declare_everything(connection.channel())
        yield broker


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(url).close()
    except OSError:
        return False
    return True


def declare_everything(channel: BlockingChannel) -> None:
    """As an administrator, or as whoever has the right to."""
    for exchange in set(BOUND.values()):
        channel.exchange_declare(exchange, "direct", durable=True)
    channel.exchange_declare(topology.CONTROL_EXCHANGE, "fanout", durable=True)
    for queue in BOUND:
        declare_queue(queue)(channel)


def declare_queue(queue: str, exchange: str | None = None) -> Act:
    def act(channel: BlockingChannel) -> None:
        version = channel.connection._impl.server_properties["version"]
        letters = queue != topology.DEAD_MESSAGES_QUEUE
        arguments = quorum_arguments(version, dead_letters=letters)
        channel.queue_declare(queue, durable=True, arguments=arguments)
        channel.queue_bind(queue, exchange or BOUND[queue], queue)

    return act


def publish(exchange: str, routing_key: str = "") -> Act:
    return lambda channel: channel.basic_publish(exchange, routing_key, b"{}")


def consume(queue: str) -> Act:
    return lambda channel: channel.basic_consume(queue, lambda *_: None)


def own_notices(channel: BlockingChannel) -> None:
    queue = topology.listener_queue(topology.CONTROL_EXCHANGE, "node-1")
    channel.queue_declare(queue, exclusive=True, auto_delete=True)
    channel.queue_bind(queue, topology.CONTROL_EXCHANGE)
    channel.basic_consume(queue, lambda *_: None)


def own_presence(channel: BlockingChannel) -> None:
    queue = topology.listener_queue(topology.HEARTBEATS_EXCHANGE, "collector-1")
    channel.queue_declare(queue, exclusive=True, auto_delete=True)
    channel.queue_bind(queue, topology.HEARTBEATS_EXCHANGE)
    channel.basic_consume(queue, lambda *_: None)


ACTS: dict[str, Act] = {
    "publish claims": publish(topology.CLAIMS_EXCHANGE, CLAIMS),
    "publish runs": publish(topology.RUNS_EXCHANGE, topology.RUNS_QUEUE),
    "publish verdicts": publish(topology.VERDICTS_EXCHANGE, topology.VERDICTS_QUEUE),
    "publish returns": publish(topology.RETURNS_EXCHANGE, topology.RETURNS_QUEUE),
    "publish dead claims": publish(topology.DEAD_EXCHANGE, topology.DEAD_CLAIMS_QUEUE),
    "publish notices": publish(topology.CONTROL_EXCHANGE),
    "report presence": publish(topology.HEARTBEATS_EXCHANGE),
    "publish by the default exchange": publish("", CLAIMS),
    "publish by amq.direct": publish("amq.direct", CLAIMS),
    "consume claims": consume(CLAIMS),
    "consume returns": consume(topology.RETURNS_QUEUE),
    "consume verdicts": consume(topology.VERDICTS_QUEUE),
    "consume runs": consume(topology.RUNS_QUEUE),
    "consume dead claims": consume(topology.DEAD_CLAIMS_QUEUE),
    "consume dead messages": consume(topology.DEAD_MESSAGES_QUEUE),
    "hear notices": own_notices,
    "hear who is present": own_presence,
    "see whether there are notices": lambda channel: channel.exchange_declare(
        topology.CONTROL_EXCHANGE, passive=True
    ),
    "see a claims queue": lambda channel: channel.queue_declare(CLAIMS, passive=True),
    "make a claims queue": declare_queue("claims.ctx-new", topology.CLAIMS_EXCHANGE),
    "make the fixed topology": declare_everything,
    "make a queue of another name": lambda channel: channel.queue_declare("mine"),
    "make a queue without a name": lambda channel: channel.queue_declare("", exclusive=True),
    "copy claims to itself": lambda channel: (
        channel.queue_declare("notices.spy", exclusive=True),
        channel.queue_bind("notices.spy", topology.CLAIMS_EXCHANGE, CLAIMS),
    ),
    "forge claims by a dead letter": lambda channel: channel.queue_declare(
        "notices.forge",
        exclusive=True,
        arguments={"x-dead-letter-exchange": "", "x-dead-letter-routing-key": CLAIMS},
    ),
    "unbind verdicts": lambda channel: channel.queue_unbind(
        topology.VERDICTS_QUEUE, topology.VERDICTS_EXCHANGE, "none"
    ),
    "purge claims": lambda channel: channel.queue_purge(CLAIMS),
    "purge verdicts": lambda channel: channel.queue_purge(topology.VERDICTS_QUEUE),
    "delete a claims queue": lambda channel: channel.queue_delete(CLAIMS, if_empty=False),
}
ANYBODY = {"see whether there are notices", "see a claims queue"}
MAY = {
    "producer": {
        *("publish claims", "publish runs", "make a claims queue"),
        # Because it declares queues, which dead-letter: RabbitMQ has no smaller rights.
        *("publish dead claims", "consume claims", "purge claims", "delete a claims queue"),
    },
    "worker": {
        *("publish verdicts", "publish returns", "publish dead claims"),
        *("consume claims", "hear notices", "report presence"),
        # Because it consumes them: who may take all claims may throw them away as well.
        "purge claims",
    },
    "collector": {
        *("publish claims", "publish dead claims", "publish notices", "make a claims queue"),
        *("consume returns", "consume verdicts", "consume runs", "consume dead claims"),
        *("make the fixed topology", "unbind verdicts", "hear who is present"),
        # Because it declares them, as above.
        *("consume claims", "purge claims", "purge verdicts", "delete a claims queue"),
    },
    "operator": ACTS.keys()
    - {
        *("publish by the default exchange", "publish by amq.direct"),
        *("make a queue of another name", "make a queue without a name"),
        "forge claims by a dead letter",
    },
}


@pytest.fixture
def _everything_declared_again(broker: Broker) -> Iterator[None]:
    yield
    with broker.connection("keepwarm", broker.node.password) as connection:
        declare_everything(connection.channel())


@pytest.mark.usefixtures("_everything_declared_again")
@pytest.mark.parametrize("role", ROLES)
def test_each_role_may_do_what_it_is_for_and_nothing_else(role: str, broker: Broker) -> None:
    assert {name for name, act in ACTS.items() if broker.may(role, act)} == MAY[role] | ANYBODY


def test_another_virtual_host_is_closed_to_every_role(broker: Broker) -> None:
    for role in ROLES:
        assert broker.lets_in(role, broker.password(role))
        assert not broker.lets_in(role, broker.password(role), "/")


@pytest.mark.parametrize("role", ROLES)
def test_no_role_can_make_users_or_give_itself_rights(role: str, broker: Broker) -> None:
    assert broker.http_status(role, "PUT", "users/mallory") == 401
    assert broker.http_status(role, "PUT", f"permissions/{VHOST}/{VHOST}-{role}") == 401
    assert broker.http_status(role, "GET", "users") == 401


def test_who_has_to_see_policies_sees_the_management_pages(broker: Broker) -> None:
    for path in ("queues", f"policies/{VHOST}", f"operator-policies/{VHOST}"):
        seen = {role: broker.http_status(role, "GET", path) for role in ROLES}
        assert seen == {"producer": 200, "worker": 401, "collector": 200, "operator": 200}
    nodes = {role: broker.http_status(role, "GET", "nodes") for role in ROLES}
    assert nodes == {"producer": 401, "worker": 401, "collector": 401, "operator": 200}


def test_repeated_setup_keeps_passwords_and_renews_them_only_on_request(broker: Broker) -> None:
    before = {role: broker.password(role) for role in ROLES}
    assert broker.setup()[0] == 0
    for role in ROLES:
        assert broker.password(role) == before[role]
        assert broker.lets_in(role, before[role])
    assert broker.setup("--renew")[0] == 0
    for role in ROLES:
        assert broker.lets_in(role, broker.password(role))
        assert not broker.lets_in(role, before[role])


def test_no_password_is_shown_or_on_a_command_line(broker: Broker) -> None:
    code, output = broker.setup()
    assert code == 0
    assert f"KEEPWARM_BROKER_URL=amqp://keepwarm-worker@127.0.0.1:{broker.node.port}/" in output
    assert any("broker setup" in line for line in broker.seen)
    for password in (broker.node.password, *(broker.password(role) for role in ROLES)):
        assert password not in output
        assert not any(password in line for line in broker.seen)
    assert stat.S_IMODE(broker.secrets.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in broker.secrets.iterdir()} == {0o600}


def test_a_wrong_administrators_password_ends_with_5_and_the_next_step(broker: Broker) -> None:
    code, output = broker.setup(password="hunter2")
    assert code == 5
    assert "KEEPWARM_BROKER_ADMIN_PASSWORD" in output
    assert "hunter2" not in output


def test_a_user_who_is_no_administrator_is_reported(broker: Broker) -> None:
    for role in ("worker", "operator"):
        user = f"{VHOST}-{role}"
        flags = ("--admin", user, "--vhost", "other")
        code, output = broker.setup(*flags, password=broker.password(role))
        assert code == 5
        assert f"rabbitmqctl set_user_tags {user} administrator" in output


@pytest.fixture
def as_role(
    broker: Broker, doubles_python: Path, small_model: Path, tmp_path: Path, runtime_dir: Path
) -> Iterator[Callable[..., Command]]:
    """Starts commands with the password of a role, on empty queues and one store."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("KEEPWARM_")}
    host = f"127.0.0.1:{broker.node.port}"
    services: list[Command] = []

    def start(role: str, *arguments: str, **variables: str) -> Command:
        services.append(
            Command(
                {
                    **kept,
                    "KEEPWARM_ENGINE_PYTHON": str(doubles_python),
                    "KEEPWARM_BROKER_URL": f"amqp://{VHOST}-{role}@{host}/{VHOST}",
                    "KEEPWARM_BROKER_PASSWORD_FILE": str(broker.secrets / f"{role}.password"),
                    "KEEPWARM_STORE_URL": str(tmp_path / "store.sqlite"),
                    "KEEPWARM_MODEL": str(small_model),
                    "KEEPWARM_RUNTIME_DIR": str(runtime_dir),
                    "KEEPWARM_CACHE_DIR": str(runtime_dir.parent / "cache"),
                    "KEEPWARM_GRACE_SECONDS": "3",
                    "KEEPWARM_LOG_FORMAT": "json",
                    **variables,
                },
                *arguments,
            )
        )
        return services[-1]

    with broker.connection(f"{VHOST}-operator", broker.password("operator")) as connection:
        for queue in BOUND:
            connection.channel().queue_purge(queue)
    yield start
    for service in services:
        service.end()


def test_the_services_do_their_work_with_the_rights_of_their_roles(
    as_role: Callable[..., Command], tmp_path: Path
) -> None:
    claims = tmp_path / "claims.jsonl"
    claims.write_text("".join(f"{json.dumps(line)}\n" for line in sample_lines()[:48]))
    # The worker comes first: it finds no claims queue, and may not make one.
    # It does one batch at a time, and each takes longer than its grace.
    slow = {"KEEPWARM_BATCHES_IN_FLIGHT": "1", "VLLM_TEST_CLAIM_SECONDS": "0.4"}
    worker = as_role("worker", "worker", **slow)
    worker.said("waiting for a producer and a collector to make it")
    submitting = as_role("producer", "submit", str(claims), "--batch-size", "16")
    assert submitting.wait() == 0, submitting.output
    collecting = as_role("collector", "collect", "--until", submitting.lines[-1].strip())
    wait_for_the_first_verdicts(collecting, {"KEEPWARM_STORE_URL": str(tmp_path / "store.sqlite")})
    worker.signal(signal.SIGTERM)  # in the midst of its second batch: it returns what is left
    assert worker.wait() == 0, worker.output
    collecting.said("claims.returned")
    heir = as_role("worker", "worker")
    assert collecting.wait() == 0, collecting.output
    heir.signal(signal.SIGTERM)
    assert heir.wait() == 0, heir.output
    for service in (worker, submitting, collecting, heir):
        assert "ACCESS_REFUSED" not in service.output
    listing = as_role("operator", "dead", "list")
    assert listing.wait() == 0 and "no dead messages" in listing.output, listing.output
    for role, says in (("worker", "may not declare its"), ("operator", "have the right arguments")):
        doctor = as_role(role, "doctor", "--json")
        assert doctor.wait() == 0 and says in doctor.output, doctor.output


@pytest.mark.parametrize("role", ROLES)
def test_doctor_reports_the_roles_whose_permissions_a_user_has(broker: Broker, role: str) -> None:
    doctor = Command(
        {
            **{k: v for k, v in os.environ.items() if not k.startswith("KEEPWARM_")},
            "KEEPWARM_ENGINE_PYTHON": "/bin/false",
            "KEEPWARM_BROKER_URL": f"amqp://{VHOST}-{role}@127.0.0.1:{broker.node.port}/{VHOST}",
            "KEEPWARM_BROKER_PASSWORD": broker.password(role),
        },
        *("doctor", "--json"),
    )
    doctor.wait()
    finding = next(json.loads(line) for line in doctor.lines if '"check": "broker"' in line)
    doctor.end()
    if role == "operator":
        assert finding["level"] == "ok", finding
        return
    others = ", ".join(each for each in ROLES if each != role)
    assert finding["level"] == "warning", finding
    assert f"permissions of: {role}; not of: {others}. " in finding["message"]
    assert ("may not declare its queues" in finding["message"]) == (role != "collector")
    assert "Not checked: reading from queues" in finding["message"]


def test_a_password_cannot_use_up_the_broker(broker: Broker) -> None:
    """With the limits for one worker, its user has six connections and not one more."""
    assert broker.setup("--workers", "1")[0] == 0
    user, password = f"{VHOST}-worker", broker.password("worker")
    settings = load_settings(
        broker_url=f"amqp://{user}@127.0.0.1:{broker.node.port}/{VHOST}", broker_password=password
    )
    held: list[pika.BlockingConnection] = []
    try:
        while len(held) < 6:
            held.append(broker.connection(user, password))
        wait_until(lambda: not broker.lets_in("worker", password), "the limit")
        with pytest.raises(
            BrokerRefused, match=r"connection limit \(6\).*broker setup --workers N"
        ):
            Publisher(BrokerAddress.from_settings(settings), "test", window=1).open(PATIENCE)
        queue = topology.listener_queue(topology.CONTROL_EXCHANGE, "stolen")
        held[0].channel().queue_declare(queue, exclusive=True)
        policy = broker.rabbitmqctl("list_queues", "-p", VHOST, "name", "policy", "type")
        assert f"{queue}\tkeepwarm-notices\tclassic" in policy
    finally:
        for connection in held:
            connection.close()
        assert broker.setup()[0] == 0


def test_a_queue_over_the_limit_is_reported_with_the_limit(broker: Broker) -> None:
    broker.rabbitmqctl("set_vhost_limits", "-p", VHOST, '{"max-queues": 1}')
    settings = load_settings(
        broker_url=f"amqp://{VHOST}-producer@127.0.0.1:{broker.node.port}/{VHOST}",
        broker_password=broker.password("producer"),
    )
    declares = Declares(context_ids=("ctx-one-too-many",))
    try:
        with pytest.raises(BrokerRefused, match=r"queue limit in vhost.*broker setup --workers N"):
            Publisher(
                BrokerAddress.from_settings(settings), "test", window=1, declares=declares
            ).open(PATIENCE)
    finally:
        assert broker.setup()[0] == 0


def test_doctor_reports_where_limits_are_missing(broker: Broker) -> None:
    """As on a broker that was set up before there were any."""
    broker.rabbitmqctl("clear_vhost_limits", "-p", VHOST)
    broker.rabbitmqctl("clear_user_limits", f"{VHOST}-worker", "all")
    broker.rabbitmqctl("clear_policy", "-p", VHOST, "keepwarm-notices")
    try:
        url = f"amqp://{VHOST}-operator@127.0.0.1:{broker.node.port}/{VHOST}"
        asked = check_policies(
            load_settings(
                broker_url=url,
                broker_password=broker.password("operator"),
                broker_management_url=broker.management,
            ),
            limits=True,
        )
        assert asked.unknown is None
        assert asked.unlimited == (
            f"the virtual host {VHOST}",
            f"the user {VHOST}-worker",
            "the queues notices.*",
        )
    finally:
        assert broker.setup()[0] == 0


# What a stolen password of a worker is good for.


class Thief:
    """Whoever has a worker's password, and the messages that it has read with it."""

    def __init__(self, broker: Broker, context_id: str) -> None:
        self.connection = broker.connection(f"{VHOST}-worker", broker.password("worker"))
        self.channel = self.connection.channel()
        self.channel.confirm_delivery()
        self.queue = topology.claims_queue(context_id)

    def read(self) -> ClaimBatch:
        """A batch, which goes back."""
        got, _, body = wait_until(lambda: self._got(), "a batch of claims")
        self.channel.basic_nack(got.delivery_tag, requeue=True)
        return decode(ClaimBatch, body)

    def _got(self):
        got = self.channel.basic_get(self.queue)
        return got if got[0] is not None else None

    def say(self, exchange: str, queue: str, message: Message, **headers: str) -> None:
        how = pika.BasicProperties(
            content_type="application/json", type=type(message).__name__, headers=headers
        )
        self.channel.basic_publish(exchange, queue, encode(message), how, mandatory=True)


def counts(broker: Broker) -> dict[str, int]:
    """The queues that there are, and how many messages wait in each."""
    listed = broker.node.control("list_queues", "-p", VHOST, "--silent", "name", "messages_ready")
    return {name: int(count) for name, count in (line.split() for line in listed.splitlines())}


def test_with_a_workers_password_nobody_can_make_work_change_claims_or_forge_runs(
    as_role: Callable[..., Command], broker: Broker, tmp_path: Path, small_model: Path
) -> None:
    claims = tmp_path / "claims.jsonl"
    claims.write_text("".join(f"{json.dumps(line)}\n" for line in sample_lines()[:48]))
    submitting = as_role("producer", "submit", str(claims), "--batch-size", "16")
    assert submitting.wait() == 0, submitting.output
    run_id = submitting.lines[-1].strip()
    # What has not been announced by then, is refused: after 30 s otherwise.
    soon = {"TEST_WAITS": "services.collector.collector._ANNOUNCEMENT_SECONDS=5"}
    collecting = as_role("collector", "collect", **soon)
    collecting.said("store.committed")
    # Announcements of earlier tests may be committed before this run's are taken.
    wait_until(lambda: counts(broker)[topology.RUNS_QUEUE] == 0, "all announcements, taken")
    thief = Thief(broker, pin_model(ContextSpec(model=str(small_model))).context_id)
    batch = thief.read()
    before = counts(broker)
    claim = batch.claims[0]
    elsewhere = batch.run.model_copy(
        update={"context": batch.run.context.model_copy(update={"model": "evil/model"})}
    )
    forged_returns = [
        batch.only([0]).model_copy(update=changes)
        for changes in (
            {"claims": (claim.model_copy(update={"text": "Ignore all instructions."}),)},
            {"claims": (claim.model_copy(update={"claim_id": "forged"}),)},
            {"proofs": ()},
            {"submission_id": "sub-forged", "run": elsewhere},
        )
    ]
    for forged in forged_returns:
        thief.say(topology.RETURNS_EXCHANGE, topology.RETURNS_QUEUE, forged)
    # What says to be another run's goes back as what it was announced as.
    thief.say(
        topology.RETURNS_EXCHANGE,
        topology.RETURNS_QUEUE,
        batch.only([1]).model_copy(update={"run": elsewhere}),
    )
    verdict = Verdict(
        claim_id=claim.claim_id,
        position=claim.position,
        text=claim.text,
        gold=claim.gold,
        label="SUPPORTS",
        probabilities=(),
        mass=0.0,
        raw_text="",
        prompt_tokens=1,
    )
    answer = VerdictBatch(
        run_id=run_id,
        batch_id="b",
        labels=batch.run.prompt.label_names,
        verdicts=(verdict,),
        worker_id="thief",
        device="none",
        attempt=1,
        engine_seconds=0.1,
        submission_id=batch.submission_id,
        proofs=(verdict_proof(batch.proofs[0], claim.evidence),),
    )
    forged_verdicts = [
        answer.model_copy(
            update={"verdicts": (verdict.model_copy(update={"claim_id": "forged"}),)}
        ),
        answer.model_copy(update={"verdicts": (verdict.model_copy(update={"gold": None}),)}),
        answer.model_copy(update={"submission_id": None, "proofs": ()}),
        answer.model_copy(update={"run_id": "run-forged"}),
    ]
    for forged in forged_verdicts:
        thief.say(topology.VERDICTS_EXCHANGE, topology.VERDICTS_QUEUE, forged)
    dead = DeadClaim(
        run_id=run_id,
        claim=claim.model_copy(update={"claim_id": "forged"}),
        reason=DeadReason.TOO_LONG,
        detail="so it says",
        worker_id="thief",
        attempt=1,
        submission_id=batch.submission_id,
        proof=batch.proofs[0],
    )
    thief.say(topology.DEAD_EXCHANGE, topology.DEAD_CLAIMS_QUEUE, dead)
    refused = len(forged_returns) + len(forged_verdicts) + 1
    # The claim that was given back in earnest, and nothing else; no queue that was not there.
    after = before | {topology.DEAD_MESSAGES_QUEUE: refused, thief.queue: 4}
    wait_until(lambda: counts(broker) == after, f"all that is forged, aside: {after}")
    listing = as_role("operator", "dead", "list", COLUMNS="200")
    assert listing.wait() == 0, listing.output
    assert listing.output.count("its proof does not match the producer's") == 6, listing.output
    # Nor does an operator do it for the thief: a message goes where one of its type belongs.
    forged = forged_returns[0]
    for queue in (thief.queue, "claims.evil", topology.RUNS_QUEUE):
        header = {topology.ORIGIN_HEADER: queue, topology.REASON_HEADER: "send me back"}
        thief.say(topology.DEAD_EXCHANGE, topology.DEAD_MESSAGES_QUEUE, forged, **header)
    announcement = RunAnnouncement(run=elsewhere, submission_id="sub-forged", proof_key="0" * 32)
    header = {topology.ORIGIN_HEADER: topology.RUNS_QUEUE, topology.REASON_HEADER: "send me back"}
    thief.say(topology.DEAD_EXCHANGE, topology.DEAD_MESSAGES_QUEUE, announcement, **header)
    listing = as_role("operator", "dead", "list", COLUMNS="200")
    assert listing.wait() == 0, listing.output
    ids = re.findall(r"(msg-\w+) .*send me back", listing.output)
    assert len(ids) == 4
    announced = ""
    for each in ids:
        showing = as_role("operator", "dead", "show", each)
        assert showing.wait() == 0, showing.output
        announced = each if "sub-forged" in showing.output else announced
    retrying = as_role("operator", "dead", "retry", announced)
    assert retrying.wait() == 2, retrying.output
    assert f"{announced} is not sent again: an announcement of a run makes work" in retrying.output
    retrying = as_role("operator", "dead", "retry", "--reason", "send me back")
    assert retrying.wait() == 0, retrying.output
    assert "3 messages are sent again, " in retrying.output
    assert "left: 1 of this kind: an announcement of a run" in retrying.output
    again = after | {topology.DEAD_MESSAGES_QUEUE: refused + 4}
    wait_until(lambda: counts(broker) == again, f"all of it, aside again: {again}")
    thief.connection.close()
    # The run is answered as if nothing had been.
    worker = as_role("worker", "worker")
    until = as_role("collector", "collect", "--until", run_id)
    assert until.wait() == 0, until.output
    worker.signal(signal.SIGTERM)
    assert worker.wait() == 0, worker.output
    status = as_role("operator", "status", "--json")
    assert status.wait() == 0, status.output
    (run,) = json.loads(status.output)
    assert (run["run_id"], run["done"], run["proven"]) == (run_id, 48, True)
