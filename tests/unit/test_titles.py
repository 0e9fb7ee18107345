"""Tests of the text of process titles."""

import pytest

from tailsrv.config import MAX_CLIENTS, MAX_WORKERS
from tailsrv.status_schema import ServerState
from tailsrv.titles import longest_title, service_status, supervisor_title, worker_title

SERVING, STARTING, WAITING, DRAINING = ServerState


@pytest.mark.parametrize(
    ("endpoints", "path", "state", "workers", "clients", "title"),
    [
        (
            ["*:4321"],
            "/log",
            SERVING,
            4,
            137,
            "tailsrv: supervisor *:4321 /log [4 workers, 137 clients]",
        ),
        (["*:4321"], "/log", SERVING, 1, 1, "tailsrv: supervisor *:4321 /log [1 worker, 1 client]"),
        (["*:4321"], "/log", STARTING, 1, 0, "tailsrv: supervisor *:4321 /log [starting]"),
        (
            ["*:4321"],
            "/log",
            WAITING,
            0,
            0,
            "tailsrv: supervisor *:4321 /log [waiting for file]",
        ),
        (
            ["*:4321"],
            "/log",
            DRAINING,
            2,
            1,
            "tailsrv: supervisor *:4321 /log [draining, 2 workers, 1 client]",
        ),
        (
            ["127.0.0.1:1", "[::1]:1"],
            "/log",
            SERVING,
            1,
            0,
            "tailsrv: supervisor 127.0.0.1:1,[::1]:1 /log [1 worker, 0 clients]",
        ),
        (["*:1"], "a b", SERVING, 1, 0, "tailsrv: supervisor *:1 a b [1 worker, 0 clients]"),
        (["*:1"], "a\nb", SERVING, 1, 0, "tailsrv: supervisor *:1 'a\\nb' [1 worker, 0 clients]"),
        (
            ["*:1"],
            "a\udcff",
            SERVING,
            1,
            0,
            "tailsrv: supervisor *:1 'a\\udcff' [1 worker, 0 clients]",
        ),
        (["*:1"], "/lög", SERVING, 1, 0, "tailsrv: supervisor *:1 /lög [1 worker, 0 clients]"),
    ],
)
def test_supervisor_title(
    endpoints: list[str], path: str, state: ServerState, workers: int, clients: int, title: str
) -> None:
    """The supervisor's title gives endpoints, path and state on one line that can be encoded."""
    assert title == supervisor_title(endpoints, path, state, workers, clients)
    assert title.encode().decode().isprintable()


@pytest.mark.parametrize(
    ("slot", "state", "clients", "title"),
    [
        (2, "", 35, "tailsrv: worker 2 *:4321 [35 clients]"),
        (0, "", 1, "tailsrv: worker 0 *:4321 [1 client]"),
        (0, "starting", 0, "tailsrv: worker 0 *:4321 [starting]"),
        (1, "draining", 3, "tailsrv: worker 1 *:4321 [draining, 3 clients]"),
    ],
)
def test_worker_title(slot: int, state: str, clients: int, title: str) -> None:
    """A worker's title gives its slot and its clients."""
    assert title == worker_title(slot, ["*:4321"], state, clients)


@pytest.mark.parametrize(
    ("state", "workers", "clients", "status"),
    [
        (SERVING, 4, 137, "4 workers, 137 clients"),
        (WAITING, 0, 0, "waiting for file"),
        (DRAINING, 2, 1, "draining, 2 workers, 1 client"),
    ],
)
def test_service_status(state: ServerState, workers: int, clients: int, status: str) -> None:
    """The service manager shows what the title has in its brackets."""
    assert service_status(state, workers, clients) == status


@pytest.mark.parametrize("state", ServerState)
@pytest.mark.parametrize("path", ["/log", "/l\xf6g", "a\nb", "a\udcff"])
def test_longest_title(state: ServerState, path: str) -> None:
    """No title is longer than the space that is reserved for it."""
    endpoints = ["127.0.0.1:65535", "[::1]:65535"]
    supervisor = supervisor_title(endpoints, path, state, MAX_WORKERS, MAX_CLIENTS)
    worker = worker_title(MAX_WORKERS - 1, endpoints, state, MAX_CLIENTS)
    assert max(len(supervisor.encode()), len(worker.encode())) <= longest_title(endpoints, path)
