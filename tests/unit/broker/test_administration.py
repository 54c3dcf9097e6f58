import json
import socket
from collections.abc import Iterator

import pytest

from services.broker.administration import (
    amqp_address,
    check_virtual_host,
    has_user,
    make_user,
    make_virtual_host,
    password_hash,
)
from services.broker.management_api import ManagementApi
from services.broker.roles import ROLES
from services.broker.tls import TlsFiles
from services.contracts.errors import (
    BrokerError,
    BrokerRefused,
    BrokerUnreachable,
    BrokerUntrusted,
    UsageError,
)
from tests.unit.management_double import ManagementDouble, management_double

PRODUCER, OPERATOR = ROLES[0], ROLES[-1]


@pytest.fixture
def broker() -> Iterator[ManagementDouble]:
    with management_double() as double:
        yield double


@pytest.fixture
def api(broker: ManagementDouble) -> Iterator[ManagementApi]:
    with connected(broker.url) as api:
        yield api


def connected(url: str, password: str = "guest") -> ManagementApi:
    return ManagementApi(url, "guest", password, tls=TlsFiles(), timeout_seconds=5)


# What is made.


def test_a_virtual_host_is_made_once(broker: ManagementDouble, api: ManagementApi) -> None:
    make_virtual_host(api, "keepwarm")
    make_virtual_host(api, "keepwarm")
    assert broker.puts == ["/api/vhosts/keepwarm"]


def test_a_user_gets_its_roles_rights_and_tags(
    broker: ManagementDouble, api: ManagementApi
) -> None:
    assert not has_user(api, OPERATOR, "keepwarm")
    assert make_user(api, OPERATOR, "keepwarm", "secret") == "made"
    assert has_user(api, OPERATOR, "keepwarm")
    assert broker.things["/api/users/keepwarm-operator"]["tags"] == "monitoring"
    rights = broker.things["/api/permissions/keepwarm/keepwarm-operator"]
    assert rights["write"] == OPERATOR.permissions.write
    assert rights.keys() == {"configure", "write", "read"}


def test_a_password_does_not_leave_this_machine(
    broker: ManagementDouble, api: ManagementApi
) -> None:
    make_user(api, PRODUCER, "keepwarm", "secret")
    assert "secret" not in json.dumps(broker.things)


def test_a_user_whose_password_fits_is_kept_and_its_rights_are_set_again(
    broker: ManagementDouble, api: ManagementApi
) -> None:
    make_user(api, PRODUCER, "keepwarm", "secret")
    broker.things["/api/permissions/keepwarm/keepwarm-producer"] = {"write": ".*"}
    broker.puts.clear()
    assert make_user(api, PRODUCER, "keepwarm", "secret") == "kept"
    assert broker.puts == ["/api/permissions/keepwarm/keepwarm-producer"]
    assert broker.things[broker.puts[0]]["write"] == PRODUCER.permissions.write


@pytest.mark.parametrize(
    "there",
    [
        {
            "password_hash": "AAAA",
            "hashing_algorithm": "rabbit_password_hashing_sha256",
            "tags": "",
        },
        {"password_hash": "", "hashing_algorithm": "rabbit_password_hashing_sha256", "tags": ""},
        {"password_hash": "AAAA", "hashing_algorithm": "rabbit_password_hashing_md5", "tags": ""},
        {"tags": ""},
    ],
)
def test_a_user_whose_password_does_not_fit_gets_it(
    there: dict[str, str], broker: ManagementDouble, api: ManagementApi
) -> None:
    broker.things["/api/users/keepwarm-producer"] = there
    assert make_user(api, PRODUCER, "keepwarm", "secret") == "changed"
    assert make_user(api, PRODUCER, "keepwarm", "secret") == "kept"


def test_a_role_that_someone_made_administrator_is_none_any_more(
    broker: ManagementDouble, api: ManagementApi
) -> None:
    make_user(api, PRODUCER, "keepwarm", "secret")
    broker.things["/api/users/keepwarm-producer"]["tags"] = "administrator"
    assert make_user(api, PRODUCER, "keepwarm", "secret") == "changed"
    assert broker.things["/api/users/keepwarm-producer"]["tags"] == "management"


def test_the_hash_is_the_one_that_rabbitmq_documents() -> None:
    # The example of https://www.rabbitmq.com/docs/passwords#computing-password-hash.
    assert password_hash("test12", bytes.fromhex("908DC60A")) == (
        "kI3GCqW5JLMJa4iX1lo7X4D6XbYqlLgxIs30+P6tENUV2POR"
    )


@pytest.mark.parametrize("name", ["/", "", "a b", "-x", "a/b", "x" * 65, "ä"])
def test_a_virtual_host_that_cannot_be_in_a_users_name_is_refused(name: str) -> None:
    with pytest.raises(UsageError, match="--vhost"):
        check_virtual_host(name)


def test_tls_is_preferred_where_the_broker_listens_for_it(
    broker: ManagementDouble, api: ManagementApi
) -> None:
    assert amqp_address(api) == "amqp://127.0.0.1:5672"
    broker.listeners.append({"protocol": "amqp/ssl", "port": 5671})
    assert amqp_address(api) == "amqps://127.0.0.1:5671"
    broker.listeners.clear()
    with pytest.raises(BrokerError, match=r"listeners\.ssl"):
        amqp_address(api)


# What is refused.


def test_an_unreachable_api_is_reported_with_the_plug_in_to_enable() -> None:
    with socket.create_server(("127.0.0.1", 0)) as held:
        port = held.getsockname()[1]
    with (
        connected(f"http://127.0.0.1:{port}") as api,
        pytest.raises(BrokerUnreachable, match="rabbitmq-plugins enable rabbitmq_management"),
    ):
        api.check_administrator()


def test_tls_to_a_port_without_it_is_reported(broker: ManagementDouble) -> None:
    with (
        connected(broker.url.replace("http:", "https:")) as api,
        pytest.raises(BrokerUntrusted, match=r"does not speak TLS.* 15671 by default"),
    ):
        api.check_administrator()


def test_a_wrong_password_is_reported_with_its_setting_and_not_repeated(
    broker: ManagementDouble,
) -> None:
    with (
        connected(broker.url, "hunter2") as api,
        pytest.raises(BrokerRefused, match="KEEPWARM_BROKER_ADMIN_PASSWORD") as refused,
    ):
        api.check_administrator()
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("tags", [[], ["monitoring"]])
def test_a_user_who_is_not_an_administrator_is_shown_the_next_step(
    tags: list[str], broker: ManagementDouble, api: ManagementApi
) -> None:
    broker.tags = tags
    with pytest.raises(BrokerRefused, match="rabbitmqctl set_user_tags guest administrator"):
        api.check_administrator()


@pytest.mark.parametrize(
    "always",
    [(404, b"<html>"), (200, b"<html>"), (200, []), (200, {}), (302, None), (500, {"reason": "x"})],
)
def test_a_server_that_is_not_a_management_api_is_reported(
    always: tuple[int, object], broker: ManagementDouble, api: ManagementApi
) -> None:
    broker.always = always
    with pytest.raises(BrokerError, match="Pass the address of the management API"):
        api.check_administrator()


@pytest.mark.parametrize(
    "url", ["http://broker.example.org:15672", "http://10.0.0.7", "http://127.0.0.1.example.org"]
)
def test_plain_http_beyond_loopback_is_refused_with_a_tunnel(url: str) -> None:
    with pytest.raises(UsageError, match="ssh -N -L"):
        connected(url)


@pytest.mark.parametrize(
    "url",
    ["http://localhost:1", "http://127.3.2.1", "http://[::1]:15672/", "https://b.example.org/rmq"],
)
def test_loopback_and_https_are_taken(url: str) -> None:
    connected(url).__exit__()


@pytest.mark.parametrize(
    "url", ["", "broker:15672", "amqp://h", "http://", "https://h:99999", "https://[h"]
)
def test_what_is_no_address_is_refused_with_an_example(url: str) -> None:
    with pytest.raises(UsageError, match="https://broker.example.org:15671"):
        connected(url)


def test_a_password_in_the_address_is_refused_and_not_repeated() -> None:
    for url in ("https://admin:hunter2@h", "ftp://admin:hunter2@h", "https://a:hunter2@h:x"):
        with pytest.raises(UsageError) as refused:
            connected(url)
        assert "hunter2" not in str(refused.value)


def test_a_proxy_from_the_environment_does_not_get_the_password(
    broker: ManagementDouble, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("ALL_PROXY", "http://127.0.0.1:9")
    with connected(broker.url) as api:
        api.check_administrator()
