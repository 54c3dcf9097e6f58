import ssl
import subprocess
from pathlib import Path

import certifi
import pytest

from services.broker import BrokerAddress
from services.contracts import load_settings
from services.contracts.errors import UsageError


def address(url: str | None, **settings: object) -> BrokerAddress:
    """Where the network is trusted, unless `plaintext_hosts` say otherwise."""
    settings = {"plaintext_hosts": "*", **settings}
    return BrokerAddress.from_settings(load_settings(broker_url=url, **settings))


@pytest.mark.parametrize(
    ("url", "host", "port", "virtual_host", "user"),
    [
        ("amqp://h", "h", 5672, "/", "guest"),
        ("amqp://h/", "h", 5672, "/", "guest"),
        ("amqp://h/%2f", "h", 5672, "/", "guest"),
        ("amqp://h/%2F", "h", 5672, "/", "guest"),
        ("amqp://h/keepwarm", "h", 5672, "keepwarm", "guest"),
        ("amqp://h/a%2Fb", "h", 5672, "a/b", "guest"),
        ("amqp://h/%C5%81%C3%B3d%C5%BA%20x", "h", 5672, "Łódź x", "guest"),
        ("amqp://worker@h:5673/v", "h", 5673, "v", "worker"),
        ("amqp://team%40lab@h/v", "h", 5672, "v", "team@lab"),
        ("amqps://h", "h", 5671, "/", "guest"),
        ("amqps://h:443/v", "h", 443, "v", "guest"),
        ("amqp://127.0.0.1/v", "127.0.0.1", 5672, "v", "guest"),
        ("amqp://", "localhost", 5672, "/", "guest"),
        ("AMQP://h/v", "h", 5672, "v", "guest"),
    ],
)
def test_a_url_gives_the_brokers_address_and_the_user(
    url: str, host: str, port: int, virtual_host: str, user: str
) -> None:
    found = address(url)
    assert (found.host, found.port, found.virtual_host, found.user) == (
        host,
        port,
        virtual_host,
        user,
    )
    assert (found.tls is not None) is url.startswith("amqps")


@pytest.mark.parametrize("url", ["amqp://[::1]:5672/", "amqps://[2001:db8::7]/v"])
def test_an_ip_v6_address_is_given_as_a_resolver_takes_it(url: str) -> None:
    assert address(url).host in ("::1", "2001:db8::7")


@pytest.mark.parametrize(
    ("url", "hosts", "allowed"),
    [
        ("amqp://u@broker.example.org/v", "", False),
        ("amqp://u@broker.example.org/v", "other", False),
        ("amqp://u@10.0.0.7/v", "", False),
        ("amqp://u@0.0.0.0/v", "", False),
        ("amqp://u@localhost.example.org/v", "", False),
        ("amqp://u@broker.example.org/v", "other broker.example.org", True),
        ("amqp://u@node-7/v", "node-*", True),
        ("amqps://u@broker.example.org/v", "", True),
        ("amqp://u@127.0.0.1/v", "", True),
        ("amqp://u@127.8.0.1/v", "", True),
        ("amqp://u@[::1]/v", "", True),
        ("amqp://u@localhost/v", "", True),
        ("amqp://", "", True),
    ],
)
def test_a_password_is_sent_unencrypted_only_where_the_operator_allows_it(
    url: str, hosts: str, allowed: bool
) -> None:
    if allowed:
        address(url, plaintext_hosts=hosts)
        return
    with pytest.raises(UsageError, match=r"use amqps:// .* KEEPWARM_PLAINTEXT_HOSTS=\S+ allows it"):
        address(url, plaintext_hosts=hosts)


def test_without_a_url_the_error_asks_for_a_broker() -> None:
    with pytest.raises(UsageError, match="set KEEPWARM_BROKER_URL or pass --broker"):
        address(None)


@pytest.mark.parametrize("url", ["http://h", "h:5672", "amqp://h:99999"])
def test_a_url_of_another_kind_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="the broker's URL is unusable"):
        address(url)


@pytest.mark.parametrize(
    ("url", "settings", "password"),
    [
        ("amqp://h", {}, "guest"),
        ("amqp://u:p%2Fw%40@h", {}, "p/w@"),
        ("amqp://u@h", {"broker_password": "p%2Fw"}, "p%2Fw"),
        ("amqp://u:from-the-url@h", {"broker_password": "from-the-setting"}, "from-the-setting"),
    ],
)
def test_the_password_is_the_settings_or_else_the_urls(
    url: str, settings: dict[str, str], password: str
) -> None:
    assert address(url, **settings).parameters("x").credentials.password == password


def test_the_password_may_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("hunter2\n")
    found = address("amqp://u@h", broker_password_file=tmp_path / "password")
    assert found.parameters("x").credentials.password == "hunter2"


def test_the_password_is_in_no_text_form_of_the_address() -> None:
    found = address("amqps://worker:from-the-url@h/v", broker_password="hunter2")
    for shown in (repr(found), str(found), f"{found}", f"{[found]}"):
        assert "hunter2" not in shown
        assert "from-the-url" not in shown
    assert str(found) == "amqps://worker@h:5671/v"


def test_pika_gets_the_settings() -> None:
    found = address("amqp://worker@h:5673/v", broker_heartbeat_seconds=45)
    parameters = found.parameters("keepwarm producer")
    assert (parameters.host, parameters.port, parameters.virtual_host) == ("h", 5673, "v")
    assert parameters.heartbeat == 45
    assert parameters.credentials.username == "worker"
    assert parameters.ssl_options is None
    assert parameters.client_properties["connection_name"].startswith("keepwarm producer ")


def test_tls_checks_the_brokers_certificate_and_name() -> None:
    options = address("amqps://broker.example.org").parameters("x").ssl_options
    assert options.server_hostname == "broker.example.org"
    assert options.context.verify_mode is ssl.CERT_REQUIRED
    assert options.context.check_hostname


def test_a_bundle_of_ones_own_replaces_the_systems() -> None:
    own = address("amqps://h", broker_ca_file=Path(certifi.where()))
    assert own.tls is not None
    assert own.tls.get_ca_certs()


@pytest.mark.parametrize("content", [None, "", "no certificate at all\n"])
def test_a_bundle_that_is_missing_or_not_pem_is_named(content: str | None, tmp_path: Path) -> None:
    file = tmp_path / "ca.pem"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=f"KEEPWARM_BROKER_CA_FILE: cannot use {file}: .* PEM"):
        address("amqps://h", broker_ca_file=file)


def test_a_directory_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="KEEPWARM_BROKER_CA_FILE"):
        address("amqps://h", broker_ca_file=tmp_path)


def test_addresses_of_the_same_settings_are_equal() -> None:
    """By that a link finds those of its process that wait for the same broker."""
    one, other = (address("amqps://keepwarm@broker.lab/") for _ in range(2))
    assert one.tls is not other.tls and one == other
    assert one != address("amqps://keepwarm@other.lab/")


def test_a_bundle_without_tls_is_refused_for_it_would_protect_nothing() -> None:
    with pytest.raises(UsageError, match="use amqps:// or unset it"):
        address("amqp://h", broker_ca_file=Path(certifi.where()))


@pytest.mark.parametrize("name", ["broker_cert_file", "broker_key_file"])
def test_a_certificate_without_tls_is_refused_for_it_would_not_be_shown(
    name: str, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=f"KEEPWARM_{name.upper()} is set .* use amqps://"):
        address("amqp://h", **{name: tmp_path / "cert.pem"})


def test_a_key_without_its_certificate_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="KEEPWARM_BROKER_CERT_FILE is not; set both"):
        address("amqps://h", broker_key_file=tmp_path / "key.pem")


@pytest.mark.parametrize("content", [None, "no certificate at all\n"])
def test_a_certificate_that_is_missing_or_not_pem_is_named(
    content: str | None, tmp_path: Path
) -> None:
    file = tmp_path / "cert.pem"
    if content is not None:
        file.write_text(content)
    with pytest.raises(UsageError, match=f"cannot use the certificate {file}"):
        address("amqps://h", broker_cert_file=file)


def test_a_key_with_a_passphrase_is_refused_and_nobody_is_asked_for_it(tmp_path: Path) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-passout", "pass:hunter2"),
            *("-subj", "/CN=keepwarm", "-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
    )
    with pytest.raises(UsageError, match=f"the key in {key} is encrypted"):
        address("amqps://h", broker_cert_file=cert, broker_key_file=key)
