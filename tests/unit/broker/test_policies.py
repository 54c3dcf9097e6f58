from collections.abc import Iterator
from typing import Any

import pytest

from services.broker.address import BrokerAddress
from services.broker.policies import _has_same_owner, check_policies
from services.contracts import Settings, load_settings, topology
from services.contracts.errors import UsageError
from tests.unit.management_double import ManagementDouble, management_double


@pytest.fixture
def broker() -> Iterator[ManagementDouble]:
    with management_double() as double:
        double.admin, double.tags = ("producer", "secret"), ["management"]
        double.things["/api/queues/keepwarm"] = [{"name": "claims.ctx-a"}, {"name": "another"}]
        yield double


@pytest.fixture
def settings(broker: ManagementDouble) -> Settings:
    return load_settings(
        broker_url="amqp://producer@127.0.0.1/keepwarm",
        broker_password="secret",
        broker_management_url=broker.url,
    )


def policy(name: str, pattern: str = ".*", priority: int = 0, **definition: Any) -> dict[str, Any]:
    return {
        "name": name,
        "pattern": pattern,
        "apply-to": definition.pop("apply_to", "queues"),
        "priority": priority,
        "definition": {key.replace("_", "-"): value for key, value in definition.items()},
    }


def test_no_policy_does_no_harm(settings: Settings) -> None:
    assert check_policies(settings) == check_policies(settings, ["claims.ctx-b"])
    assert not check_policies(settings).problems
    assert check_policies(settings).unknown is None


@pytest.mark.parametrize(
    ("definition", "says"),
    [
        ({"message_ttl": 60_000}, "message-ttl to 60000"),
        ({"expires": 60_000}, "expires to 60000"),
        ({"delivery_limit": 5}, "delivery-limit to 5"),
    ],
)
def test_a_policy_that_loses_messages_is_reported_with_queues_and_remedy(
    broker: ManagementDouble, settings: Settings, definition: dict[str, int], says: str
) -> None:
    broker.things["/api/policies/keepwarm"] = [policy("site", **definition)]
    (harm,) = check_policies(settings, ["claims.ctx-b"]).problems
    assert harm.loses_messages
    assert set(harm.queues) == {*topology.CORE_QUEUES, "claims.ctx-a", "claims.ctx-b"}
    assert str(harm).startswith(f"policy site sets {says} on claims.ctx-a, claims.ctx-b, ")
    assert str(harm).endswith("or remove it: `rabbitmqctl clear_policy -p keepwarm site`")


def test_an_operator_policy_counts_as_well(broker: ManagementDouble, settings: Settings) -> None:
    broker.things["/api/policies/keepwarm"] = [policy("site", priority=9, max_in_memory_length=1)]
    broker.things["/api/operator-policies/keepwarm"] = [policy("limits", message_ttl=1)]
    (harm,) = check_policies(settings).problems
    assert "operator policy limits" in str(harm)
    assert "`rabbitmqctl clear_operator_policy -p keepwarm limits`" in str(harm)


def test_an_exchange_that_hides_a_missing_queue_is_reported(
    broker: ManagementDouble, settings: Settings
) -> None:
    broker.things["/api/policies/keepwarm"] = [
        policy("astray", apply_to="exchanges", alternate_exchange="site.lost"),
    ]
    (harm,) = check_policies(settings).problems
    assert harm.loses_messages
    assert harm.queues == topology.DIRECT_EXCHANGES
    assert "sets alternate-exchange to site.lost on keepwarm.claims, " in str(harm)


@pytest.mark.parametrize("key", ["max_length", "max_length_bytes"])
def test_a_full_queue_drops_dead_messages_and_lets_others_wait(
    broker: ManagementDouble, settings: Settings, key: str
) -> None:
    broker.things["/api/policies/keepwarm"] = [policy("short", **{key: 10})]
    problems = {harm.loses_messages: harm for harm in check_policies(settings).problems}
    assert problems[True].queues == (topology.DEAD_MESSAGES_QUEUE,)
    assert topology.DEAD_MESSAGES_QUEUE not in problems[False].queues
    assert "publishers wait" in str(problems[False])


@pytest.mark.parametrize(
    "harmless",
    [
        policy("not-ours", "^mine", message_ttl=1),
        policy("other-kind", apply_to="classic_queues", message_ttl=1),
        policy("exchanges", apply_to="exchanges", message_ttl=1),
        policy("lower", priority=-1, message_ttl=1),
        policy("unlimited", delivery_limit=-1),
    ],
    ids=lambda each: each["name"],
)
def test_a_policy_that_does_not_match_our_queues_is_not_reported(
    broker: ManagementDouble, settings: Settings, harmless: dict[str, Any]
) -> None:
    first = policy("first", overflow="reject-publish")
    broker.things["/api/policies/keepwarm"] = [
        harmless,
        *([first] if harmless["priority"] < 0 else []),
    ]
    assert check_policies(settings).problems == ()


def test_a_lifted_delivery_limit_is_known(broker: ManagementDouble, settings: Settings) -> None:
    broker.things["/api/policies/keepwarm"] = [policy("lift", "^claims", delivery_limit=-1)]
    assert check_policies(settings).delivery_unlimited == {"claims.ctx-a"}


def test_a_pattern_that_python_cannot_read_is_reported(
    broker: ManagementDouble, settings: Settings
) -> None:
    broker.things["/api/policies/keepwarm"] = [policy("site", "^(?|claims|runs)", message_ttl=1)]
    assert check_policies(settings).problems


def test_what_set_up_limits_is_checked_where_it_was_set_up(
    broker: ManagementDouble, settings: Settings
) -> None:
    assert check_policies(settings, limits=True).unlimited == ()  # a broker of another kind
    limits = [{"value": {"max-connections": 6}}]
    broker.things["/api/user-limits/keepwarm-worker"] = limits
    broker.things["/api/vhost-limits/keepwarm"] = limits
    unlimited = ("the queues notices.*", "the queues presence.*")
    assert check_policies(settings, limits=True).unlimited == unlimited
    broker.things["/api/policies/keepwarm"] = [
        policy("keepwarm-notices", r"^notices\.", expires=1),
        policy("keepwarm-presence", r"^presence\.", expires=1),
    ]
    assert check_policies(settings, limits=True).unlimited == ()
    broker.things["/api/user-limits/keepwarm-worker"] = []
    broker.things["/api/vhost-limits/keepwarm"] = []
    unlimited = ("the virtual host keepwarm", "the user keepwarm-worker")
    assert check_policies(settings, limits=True).unlimited == unlimited


def test_a_user_without_the_tag_is_shown_how_to_get_it(
    broker: ManagementDouble, settings: Settings
) -> None:
    broker.tags = []
    unknown = check_policies(settings).unknown
    assert unknown is not None
    assert "`rabbitmqctl set_user_tags producer management`" in unknown


def test_an_api_that_does_not_answer_is_reported(settings: Settings) -> None:
    nobody = settings.model_copy(update={"broker_management_url": "http://127.0.0.1:1"})
    unknown = check_policies(nobody).unknown
    assert unknown is not None
    assert "http://127.0.0.1:1 does not answer" in unknown


@pytest.mark.parametrize(
    "url",
    [
        "amqps://u@broker.example.org/",
        "amqp://u@127.0.0.1/",  # a tunnel for AMQP, and none for the API
        "amqp://u@trusted.example.org/",
    ],
)
def test_the_password_is_sent_unencrypted_only_where_the_operator_allows_it(url: str) -> None:
    settings = load_settings(
        broker_url=url,
        broker_password="secret",
        broker_management_url="http://broker.example.org",
        plaintext_hosts="trusted.example.org",
    )
    with pytest.raises(UsageError, match="KEEPWARM_BROKER_MANAGEMENT_URL: http to"):
        check_policies(settings)


@pytest.mark.parametrize(
    ("url", "management"),
    [
        ("amqp://u@broker.example.org/", "http://broker.example.org:15672"),
        ("amqps://u@broker.example.org:5671/x", "https://broker.example.org:15671"),
        ("amqp://u@[::1]/", "http://[::1]:15672"),
    ],
)
def test_the_apis_default_address_is_the_brokers_host(url: str, management: str) -> None:
    settings = load_settings(broker_url=url, plaintext_hosts="broker.example.org")
    address = BrokerAddress.from_settings(settings)
    assert address.management_url == management


def test_on_loopback_only_the_brokers_own_user_is_given_the_password(
    broker: ManagementDouble,
) -> None:
    _, _, port = broker.url.rpartition(":")
    to_it = load_settings(broker_url=f"amqp://u@127.0.0.1:{port}/")
    assert _has_same_owner(broker.url, BrokerAddress.from_settings(to_it))
    nowhere = load_settings(broker_url="amqp://u@127.0.0.1:1/")
    assert not _has_same_owner(broker.url, BrokerAddress.from_settings(nowhere))
    assert "belongs to the broker's own user" in str(check_policies(nowhere).unknown)
