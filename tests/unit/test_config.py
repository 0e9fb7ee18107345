"""Config: defaults, and what it refuses."""

from dataclasses import FrozenInstanceError
from math import inf, nan

import pytest

from tailsrv.config import MAX_WORKERS, Config, ConfigError, ExitStatus


def test_defaults() -> None:
    """One worker on all addresses, five seconds of grace, no header timeout, and no lingering."""
    expected = Config(
        path="log", port=4321, workers=1, bind=(), grace=5.0, header_timeout=0.0, linger=False
    )
    assert expected == Config("log", 4321)


def test_edges() -> None:
    """Values at the edges are taken as they are."""
    config = Config(
        "a b\n\udcff",
        65535,
        workers=MAX_WORKERS,
        bind=("127.0.0.1", "::1"),
        grace=0.0,
        header_timeout=1e-9,
        linger=True,
    )
    assert (config.path, config.port, config.workers) == ("a b\n\udcff", 65535, 1024)
    assert (config.bind, config.grace, config.header_timeout, config.linger) == (
        ("127.0.0.1", "::1"),
        0.0,
        1e-9,
        True,
    )
    assert Config("log", 0).port == 0


def bad(
    path: str = "log",
    port: int = 1,
    workers: int = 1,
    grace: float = 5.0,
    header_timeout: float = 0.0,
) -> str:
    """Return what Config says about values that it must refuse."""
    with pytest.raises(ConfigError) as caught:
        Config(path, port, workers, grace=grace, header_timeout=header_timeout)
    return str(caught.value)


def test_bad_path() -> None:
    """A path is neither empty nor has it a NUL, which no system call takes."""
    assert ["FILE" in bad(path=path) for path in ("", "a\0b")] == [True, True]


@pytest.mark.parametrize("port", [-1, 65536, 10**20])
def test_bad_port(port: int) -> None:
    """A port is a TCP port; the message names the setting and the value."""
    message = bad(port=port)
    assert "port" in message
    assert str(port) in message


def test_bind_without_a_port() -> None:
    """Addresses are for a port of our own."""
    with pytest.raises(ConfigError, match="argument --bind: needs -p/--port"):
        Config("log", None, bind=("127.0.0.1",))


@pytest.mark.parametrize("workers", [0, -1, MAX_WORKERS + 1])
def test_bad_workers(workers: int) -> None:
    """There is at least one worker, and no fork bomb."""
    message = bad(workers=workers)
    assert "workers" in message
    assert str(workers) in message


@pytest.mark.parametrize("seconds", [-0.1, inf, -inf, nan])
def test_bad_seconds(seconds: float) -> None:
    """Times are finite and not negative; the message calls them by the options' names."""
    assert "grace" in bad(grace=seconds)
    assert "header-timeout" in bad(header_timeout=seconds)


def test_frozen() -> None:
    """Nobody changes a configuration."""
    config = Config("log", 1)
    with pytest.raises(FrozenInstanceError):
        config.port = 2  # type: ignore[misc]


def test_exit_statuses() -> None:
    """The exit statuses are a contract."""
    assert {status.name: int(status) for status in ExitStatus} == {
        "DONE": 0,
        "CANNOT_SERVE": 1,
        "USAGE": 2,
        "CANNOT_BOOT": 3,
    }
