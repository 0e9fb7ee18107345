"""Listening on hosts where some addresses or ports are not available."""

import errno
import os
import sys
from pathlib import Path

import pytest

from support.hooks import install_hook
from support.interpreter import program
from support.processes import runs
from support.server import Serve, activated, run_tailsrv
from support.sockets import needs_ipv6, skip_without_mptcp

WITH_FEW_PORTS = ("unshare", "--net", "--map-root-user", sys.executable, program("few_ports"))

needs_network = pytest.mark.skipif(
    not runs(*WITH_FEW_PORTS, "", "true"), reason="cannot create a network namespace"
)


@needs_ipv6
@needs_network
@pytest.mark.parametrize("free", range(40000, 40004))
def test_port_0_is_free_at_all_addresses(serve: Serve, path: Path, free: int) -> None:
    """If the kernel's choice for one address is in use at another, another port is tried."""
    taken = " ".join(str(port) for port in range(40000, 40004) if port != free)
    assert serve(path, "-w", "2", wrapper=(*WITH_FEW_PORTS, taken)).port == free


@needs_ipv6
@needs_network
def test_no_port_is_free_at_all_addresses(path: Path) -> None:
    """If no port is free at all addresses, the server exits after trying every port."""
    path.touch()
    refused = run_tailsrv("-p", "0", path, wrapper=(*WITH_FEW_PORTS, "40000 40001 40002 40003"))
    assert (
        "cannot listen on 0.0.0.0:0: Address already in use; "
        "no port of net.ipv4.ip_local_port_range is free" in refused.stderr
    )
    assert refused.returncode == 1


def test_passed_mptcp_socket(path: Path) -> None:
    """A passed MPTCP socket is refused in one line."""
    skip_without_mptcp()
    path.touch()
    ended = run_tailsrv(path, wrapper=activated("mptcp"))
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert (
        "descriptor 3, passed by the service manager, is not a TCP socket but MPTCP; "
        "use SocketProtocol=tcp" in line
    )


def test_mptcpize(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the kernel creates MPTCP sockets for the server, one line says so, with a hint."""
    skip_without_mptcp()
    path.touch()
    install_hook(tmp_path, "mptcp_sockets")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ended = run_tailsrv("-p", "0", path)
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert (
        "the kernel creates MPTCP sockets instead of TCP sockets; start tailsrv without mptcpize"
        in line
    )


# Names with two addresses each, of which this host has one or none.
NAMES = """
127.0.0.1 half.test
::1 half.test
192.0.2.1 none.test
2001:db8::1 none.test
"""
# Takes a file for /etc/hosts and a command, which it executes on a host without IPv6.
SET_UP_WITHOUT_IPV6 = """
mount --bind "$1" /etc/hosts &&
ip link set lo up &&
echo 1 >/proc/sys/net/ipv6/conf/all/disable_ipv6 &&
shift &&
exec "$@"
"""
WITHOUT_IPV6 = (
    "unshare",
    "--net",
    "--mount",
    "--map-root-user",
    "sh",
    "-c",
    SET_UP_WITHOUT_IPV6,
    "sh",
)


@pytest.fixture
def without_ipv6(tmp_path: Path) -> list[str]:
    """Return a wrapper that starts a program on a host whose loopback has no IPv6 address."""
    (tmp_path / "hosts").write_text(NAMES)
    wrapper = [*WITHOUT_IPV6, str(tmp_path / "hosts")]
    if not runs(*wrapper, "true") or runs(
        *wrapper, sys.executable, "-c", "import socket; socket.socket(10).bind(('::1', 0))"
    ):
        pytest.skip("cannot create a namespace without IPv6")
    return wrapper


def test_name_with_an_unavailable_address(
    serve: Serve, path: Path, without_ipv6: list[str]
) -> None:
    """Addresses of a name that this host does not have are skipped, with a warning for each."""
    path.touch()
    server = serve(path, "-w", "2", "--bind", "half.test", wrapper=without_ipv6)
    server.workers(2)
    assert " endpoints=half.test:" in server.logged("listening: ")
    [line] = server.lines("warning: ")
    assert "this machine does not have one of the addresses of a name" in line
    assert "name=half.test address=::1 " in line


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("bind", "addresses"),
    [
        (["::1"], ["[::1]"]),
        (["half.test", "::1"], ["[::1]"]),
        (["::1", "half.test"], ["[::1]"]),
        (["none.test"], ["192.0.2.1", "[2001:db8::1]"]),
        (["half.test", "none.test"], ["192.0.2.1", "[2001:db8::1]"]),
    ],
)
def test_unavailable_address(
    path: Path, without_ipv6: list[str], bind: list[str], addresses: list[str]
) -> None:
    """If --bind names an address that the host lacks, or a name without any, it exits: status 1."""
    path.touch()
    ended = run_tailsrv(
        "-p", "0", *(word for host in bind for word in ("--bind", host)), path, wrapper=without_ipv6
    )
    assert ended.returncode == 1
    (line,) = ended.stderr.splitlines()
    assert any(f"cannot listen on {address}:" in line for address in addresses)
    assert os.strerror(errno.EADDRNOTAVAIL) in line


def test_default_without_ipv6(serve: Serve, path: Path, without_ipv6: list[str]) -> None:
    """Without --bind, a host without IPv6 listens on its IPv4 addresses without a warning."""
    path.touch()
    server = serve(path, wrapper=without_ipv6)
    server.workers(1)
    assert not server.lines("warning: ")
