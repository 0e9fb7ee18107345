"""Tests of Config: defaults and refused values."""

from dataclasses import FrozenInstanceError
from math import inf, nan

import pytest

from tailsrv.config import MAX_WORKERS, Config, ConfigError, ExitStatus


def test_defaults() -> None:
    """The defaults are one worker, all addresses, 5 s of grace, no header timeout, no lingering."""
    expected = Config(
        path="log", port=4321, workers=1, bind=(), grace=5.0, header_timeout=0.0, linger=False
    )
    assert expected == Config("log", 4321)


def test_edges() -> None:
    """The smallest and the largest allowed values are accepted unchanged."""
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
    """Return the error message of Config for values that it must refuse."""
    with pytest.raises(ConfigError) as caught:
        Config(path, port, workers, grace=grace, header_timeout=header_timeout)
    return str(caught.value)


def test_bad_path() -> None:
    """A path must not be empty, and must not contain NUL, which no system call accepts."""
    assert ["FILE" in bad(path=path) for path in ("", "a\0b")] == [True, True]


@pytest.mark.parametrize("port", [-1, 65536, 10**20])
def test_bad_port(port: int) -> None:
    """A port outside TCP's range is refused, and the message names the setting and the value."""
    message = bad(port=port)
    assert "port" in message
    assert str(port) in message


def test_bind_without_a_port() -> None:
    """--bind requires a port."""
    with pytest.raises(ConfigError, match="argument --bind: needs -p/--port"):
        Config("log", None, bind=("127.0.0.1",))


@pytest.mark.parametrize("workers", [0, -1, MAX_WORKERS + 1])
def test_bad_workers(workers: int) -> None:
    """Fewer than one worker or too many are refused, and the message names setting and value."""
    message = bad(workers=workers)
    assert "workers" in message
    assert str(workers) in message


@pytest.mark.parametrize("seconds", [-0.1, inf, -inf, nan])
def test_bad_seconds(seconds: float) -> None:
    """Times must be finite and not negative, and the message names the option."""
    assert "grace" in bad(grace=seconds)
    assert "header-timeout" in bad(header_timeout=seconds)


def test_frozen() -> None:
    """A Config cannot be changed."""
    config = Config("log", 1)
    with pytest.raises(FrozenInstanceError):
        config.port = 2  # type: ignore[misc]


def test_exit_statuses() -> None:
    """The exit statuses do not change, because scripts depend on them."""
    assert {status.name: int(status) for status in ExitStatus} == {
        "DONE": 0,
        "CANNOT_SERVE": 1,
        "USAGE": 2,
        "CANNOT_BOOT": 3,
    }
