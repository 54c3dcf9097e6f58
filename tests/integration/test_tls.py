"""`amqps://`, through a TLS end of the test's own in front of the real node."""

import asyncio
import ssl
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from services.broker import BrokerAddress, PrivateNode, Publisher
from services.contracts import Settings
from services.contracts.errors import BrokerUnreachable
from tests.integration.conftest import PATIENCE


@pytest.fixture
def certificate(tmp_path: Path) -> tuple[Path, Path]:
    """A certificate for localhost and its key, signed by itself."""
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    subprocess.run(
        [
            *("openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2"),
            *("-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"),
            *("-keyout", str(key), "-out", str(cert)),
        ],
        check=True,
        capture_output=True,
    )
    return cert, key


@pytest.fixture
def tls_port(node: PrivateNode, certificate: tuple[Path, Path]) -> Iterator[int]:
    """A port that speaks TLS and passes everything on to the node."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*certificate)
    ready, ports = threading.Event(), []

    async def pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while data := await reader.read(65536):
                writer.write(data)
                await writer.drain()
        except (ConnectionError, ssl.SSLError):
            pass
        finally:
            writer.close()

    async def serve() -> None:
        async def bridge(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            inner_reader, inner_writer = await asyncio.open_connection("127.0.0.1", node.port)
            await asyncio.gather(pump(reader, inner_writer), pump(inner_reader, writer))

        server = await asyncio.start_server(bridge, "127.0.0.1", 0, ssl=context)
        ports.append(server.sockets[0].getsockname()[1])
        ready.set()
        await stop.wait()
        server.close()

    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    thread = threading.Thread(target=lambda: loop.run_until_complete(serve()))
    thread.start()
    ready.wait(PATIENCE)
    yield ports[0]
    loop.call_soon_threadsafe(stop.set)
    thread.join(10)
    for task in asyncio.all_tasks(loop):
        task.cancel()
        loop.run_until_complete(asyncio.gather(task, return_exceptions=True))
    loop.close()


def secure(broker: Settings, port: int, ca_file: Path | None) -> BrokerAddress:
    return BrokerAddress.from_settings(
        broker.model_copy(
            update={
                "broker_url": f"amqps://keepwarm@localhost:{port}/",
                "broker_ca_file": ca_file,
            }
        )
    )


def test_a_broker_whose_certificate_the_ca_file_signs_is_trusted(
    broker: Settings, tls_port: int, certificate: tuple[Path, Path]
) -> None:
    address = secure(broker, tls_port, certificate[0])
    with Publisher(address, "test", window=1).open(PATIENCE) as publisher:
        assert publisher.connected


def test_a_broker_with_a_strange_certificate_is_not_spoken_to(
    broker: Settings, tls_port: int
) -> None:
    with pytest.raises(BrokerUnreachable, match="certificate verify failed"):
        Publisher(secure(broker, tls_port, None), "test", window=1).open(10)
