"""`amqps://`: a real node that listens for TLS, and what is told where there is no connection."""

import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from services.broker import BrokerAddress, PrivateNode, Publisher
from services.broker.private_node import free_ports
from services.contracts import Settings
from services.contracts.errors import BrokerRefused, BrokerUnreachable, BrokerUntrusted, UsageError
from tests.certificates import Authority, Certificate
from tests.integration.conftest import PATIENCE

Listen = Callable[..., int]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def ours(authority: Authority) -> Certificate:
    """The certificate of the user keepwarm."""
    return authority.sign("keepwarm")


@pytest.fixture(scope="module")
def node(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateNode]:
    """One that takes certificates as logins, too."""
    directory = tmp_path_factory.mktemp("broker") / "node"
    with PrivateNode(directory, plugins=["rabbitmq_auth_mechanism_ssl"]) as running:
        running.control(
            "eval",
            "application:set_env(rabbit, auth_mechanisms, ['PLAIN', 'EXTERNAL']), "
            "application:set_env(rabbit, ssl_cert_login_from, common_name), "
            # Without it no certificate is taken for a login.
            "application:set_env(rabbit, ssl_options, [{verify, verify_peer}]).",
        )
        yield running


@pytest.fixture(scope="module")
def listen(node: PrivateNode, authority: Authority) -> Listen:
    """`listen(certificate)`: a port where the node speaks TLS and shows this certificate."""
    numbers = count()

    def start(shows: Certificate | None = None, *, wants_certificate: bool = False) -> int:
        shows = shows or authority.sign(f"broker-{next(numbers)}")
        (port,) = free_ports(1)
        asks = "verify_peer}, {fail_if_no_peer_cert, true" if wants_certificate else "verify_none"
        node.control(
            "eval",
            f'rabbit_networking:start_ssl_listener({{"127.0.0.1", {port}}}, ['
            f'{{cacertfile, "{authority.certificate.file}"}}, {{certfile, "{shows.file}"}}, '
            f'{{keyfile, "{shows.key}"}}, {{verify, {asks}}}], 2).',
        )
        return port

    return start


@pytest.fixture
def secure(broker: Settings, authority: Authority) -> Callable[..., BrokerAddress]:
    """The address of such a port; settings may be changed."""

    def address(port: int, **changes: object) -> BrokerAddress:
        settings = {
            "broker_url": f"amqps://keepwarm@localhost:{port}/",
            "broker_ca_file": authority.certificate.file,
        }
        return BrokerAddress.from_settings(broker.model_copy(update={**settings, **changes}))

    return address


Secure = Callable[..., BrokerAddress]


def connects(address: BrokerAddress) -> None:
    with Publisher(address, "test", window=1).open(PATIENCE) as publisher:
        assert publisher.connected


def fault(address: BrokerAddress) -> str:
    """What is told of an address that is of no use, and told at once."""
    began = time.monotonic()
    with pytest.raises(BrokerUntrusted) as raised:
        Publisher(address, "test", window=1).open(PATIENCE)
    assert time.monotonic() - began < PATIENCE / 2
    return str(raised.value)


def test_a_broker_whose_certificate_the_ca_file_signs_is_trusted(
    listen: Listen, secure: Secure
) -> None:
    connects(secure(listen()))


def test_a_certificate_of_an_unknown_authority_is_reported(listen: Listen, secure: Secure) -> None:
    said = fault(secure(listen(), broker_ca_file=None))
    assert (
        "not signed by an authority that this machine trusts" in said
        and "KEEPWARM_BROKER_CA_FILE" in said
    )


def test_a_certificate_for_another_name_is_reported(
    listen: Listen, secure: Secure, authority: Authority
) -> None:
    said = fault(secure(listen(authority.sign("elsewhere", host="DNS:elsewhere.example"))))
    assert "its certificate is not valid for the name localhost" in said


def test_a_certificate_that_has_expired_is_reported(
    listen: Listen, secure: Secure, authority: Authority
) -> None:
    said = fault(secure(listen(authority.sign("old", years=(2001, 2002)))))
    assert "its certificate has expired. Renew it on the broker" in said


def test_a_certificate_that_is_not_yet_valid_is_reported(
    listen: Listen, secure: Secure, authority: Authority
) -> None:
    said = fault(secure(listen(authority.sign("new", years=(2098, 2099)))))
    assert "not valid yet. Check this machine's clock" in said


def test_a_port_without_tls_is_reported(node: PrivateNode, secure: Secure) -> None:
    assert "the port does not speak TLS. Use the port that does, 5671" in fault(secure(node.port))


def test_amqp_without_tls_to_a_port_with_tls_is_reported(listen: Listen, broker: Settings) -> None:
    address = BrokerAddress.from_settings(
        broker.model_copy(update={"broker_url": f"amqp://keepwarm@localhost:{listen()}/"})
    )
    with pytest.raises(BrokerUnreachable, match="If that port expects TLS, write amqps://"):
        Publisher(address, "test", window=1).open(5)


def test_a_missing_client_certificate_is_reported(listen: Listen, secure: Secure) -> None:
    said = fault(secure(listen(wants_certificate=True)))
    assert "the broker requires a client certificate" in said
    assert "KEEPWARM_BROKER_CERT_FILE" in said and "KEEPWARM_BROKER_KEY_FILE" in said


def test_a_broker_that_wants_a_certificate_gets_it(
    listen: Listen, secure: Secure, ours: Certificate
) -> None:
    port = listen(wants_certificate=True)
    connects(secure(port, broker_cert_file=ours.file, broker_key_file=ours.key))


def test_a_certificate_and_its_key_may_be_in_one_file(
    listen: Listen, secure: Secure, ours: Certificate, tmp_path: Path
) -> None:
    both = tmp_path / "both.pem"
    both.write_text(ours.file.read_text() + ours.key.read_text())
    connects(secure(listen(wants_certificate=True), broker_cert_file=both))


def test_without_a_password_the_certificate_is_the_login(
    listen: Listen, secure: Secure, ours: Certificate
) -> None:
    port = listen(wants_certificate=True)
    files = {"broker_cert_file": ours.file, "broker_key_file": ours.key}
    connects(secure(port, **files, broker_password=None))


def test_a_certificate_that_is_nobodys_login_is_refused(
    listen: Listen, secure: Secure, authority: Authority
) -> None:
    nobody = authority.sign("nobody")
    files = {"broker_cert_file": nobody.file, "broker_key_file": nobody.key}
    with pytest.raises(BrokerRefused):
        address = secure(listen(wants_certificate=True), **files, broker_password=None)
        Publisher(address, "test", window=1).open(PATIENCE)


def test_a_client_certificate_that_the_broker_does_not_trust_is_reported(
    listen: Listen, secure: Secure, tmp_path: Path
) -> None:
    stranger = Authority(tmp_path, "stranger").sign("keepwarm")
    port = listen(wants_certificate=True)
    said = fault(secure(port, broker_cert_file=stranger.file, broker_key_file=stranger.key))
    assert "does not trust the authority that signed our certificate" in said


def test_a_key_of_another_certificate_is_reported(
    secure: Secure, ours: Certificate, authority: Authority
) -> None:
    other = authority.sign("another")
    with pytest.raises(UsageError, match="must be matching PEM files"):
        secure(1, broker_cert_file=ours.file, broker_key_file=other.key)
