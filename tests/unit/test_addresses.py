"""Tests of parsing and writing HOST:PORT."""

import pytest

from tailsrv.addresses import EndpointError, endpoint, parse_endpoint


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("logserver:4321", "logserver", 4321),
        ("192.0.2.1:1", "192.0.2.1", 1),
        ("[::1]:65535", "::1", 65535),
        ("[fe80::1%eth0]:4321", "fe80::1%eth0", 4321),
        ("a:04321", "a", 4321),
    ],
)
def test_parse_endpoint(text: str, host: str, port: int) -> None:
    """An endpoint is a name, an IPv4 address or a bracketed IPv6 address, and a port."""
    assert parse_endpoint(text) == (host, port)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "not HOST:PORT"),
        ("logserver", "not HOST:PORT"),
        (":4321", "not HOST:PORT"),
        ("[]:4321", "not HOST:PORT"),
        ("::1:4321", "in brackets"),
        ("fe80::1", "in brackets"),
        ("[::1]", "in brackets"),
        ("a:", "not a port"),
        ("a:http", "not a port"),
        ("a:-1", "not a port"),
        ("a:1_000", "not a port"),
        ("a:\u0663", "not a port"),
        ("a:0", "from 1 to 65535"),
        ("a:65536", "from 1 to 65535"),
        ("a:" + "9" * 5000, "from 1 to 65535"),
    ],
)
def test_bad_endpoint(text: str, reason: str) -> None:
    """Any other text is refused, and the error gives the reason."""
    with pytest.raises(EndpointError, match=reason):
        parse_endpoint(text)


@pytest.mark.parametrize("text", ["logserver:4321", "[::1]:4321", "127.0.0.1:1"])
def test_endpoint_round_trip(text: str) -> None:
    """endpoint() writes what parse_endpoint() read."""
    assert endpoint(*parse_endpoint(text)) == text


@pytest.mark.parametrize(
    ("host", "port", "words"),
    [
        ("127.0.0.1", 4321, "127.0.0.1:4321"),
        ("::1", 4321, "[::1]:4321"),
        ("localhost", 1, "localhost:1"),
        ("fe80::1%eth0", 1, "[fe80::1%eth0]:1"),
    ],
)
def test_endpoint(host: str, port: int, words: str) -> None:
    """An address and a port are written as HOST:PORT, with IPv6 addresses in brackets."""
    assert endpoint(host, port) == words
