import pytest

from services.contracts.addresses import is_host, join_address, split_address


@pytest.mark.parametrize(
    ("address", "host", "port"),
    [
        ("127.0.0.1:0", "127.0.0.1", 0),
        ("[::1]:9464", "::1", 9464),
        ("node-7.example.org:65535", "node-7.example.org", 65535),
        ("gpu_worker:1", "gpu_worker", 1),
    ],
)
def test_an_address_is_host_and_port(address: str, host: str, port: int) -> None:
    assert split_address(address) == (host, port)
    assert join_address(host, port) == address


@pytest.mark.parametrize(
    "address",
    [
        *("", "node", ":80", "node:", "node:65536", "node:-1", "node:8o", "::1:80", "[::1]"),
        *("http://node:80", "node:80/metrics", "user@node:80", "node:80\n", " node:80", "-n:80"),
        *("node:80,other:80", 'node":80', "nöde:80", "node:٣"),
    ],
)
def test_what_is_no_address_is_refused_with_the_right_form(address: str) -> None:
    with pytest.raises(ValueError, match=r"write it like 127\.0\.0\.1:9464"):
        split_address(address)


@pytest.mark.parametrize(
    ("text", "is_one"),
    [("node", True), ("[::1]", True), ("10.0.0.1", True), ("node:80", False), ("a b", False)],
)
def test_a_host_has_no_port(text: str, is_one: bool) -> None:
    assert is_host(text) is is_one
