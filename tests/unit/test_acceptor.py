"""Tests of the networks from which clients are allowed."""

from ipaddress import ip_network

import pytest

from tailsrv.config import Network
from tailsrv.worker.acceptor import is_allowed

V4, V6, MAPPED = (
    ip_network("10.1.0.0/16"),
    ip_network("2001:db8::/32"),
    ip_network("::ffff:10.1.0.0/112"),
)


@pytest.mark.parametrize(
    ("host", "networks", "allowed"),
    [
        ("10.1.2.3", [V4], True),
        ("10.2.0.1", [V4], False),
        ("10.2.0.1", [V6, V4, ip_network("10.2.0.1")], True),
        ("::ffff:10.1.2.3", [V4], True),
        ("::ffff:10.2.0.1", [V4], False),
        # A mapped client is treated as IPv4, so a network in IPv6 notation does not match it.
        ("::ffff:10.1.2.3", [MAPPED], False),
        ("2001:db8::1", [V4], False),
        ("2001:db8::1", [V4, V6], True),
        ("2001:db9::1", [V6], False),
        ("fe80::1%eth0", [ip_network("fe80::/10")], True),
        ("fe80::1%eth0", [V6], False),
        ("10.1.2.3", [ip_network("0.0.0.0/0")], True),
        ("::1", [ip_network("0.0.0.0/0")], False),
        ("10.1.2.3", [], False),
    ],
)
def test_is_allowed(host: str, networks: list[Network], allowed: bool) -> None:
    """A client is allowed from each listed network; mapped IPv4 addresses follow the IPv4 rules."""
    assert is_allowed(host, networks) is allowed
