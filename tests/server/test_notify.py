"""sd_notify(3): READY=1 and the like reach a service manager whose socket is full at first."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from support.files import random_bytes
from support.server import Serve, Server
from support.service_manager import ServiceManager
from tailsrv.linux.systemd import Lifecycle, notify


@pytest.fixture(autouse=True)
def notify_socket(manager: ServiceManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set NOTIFY_SOCKET for this process and the programs that it starts."""
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)


Plans = list[tuple[Callable[[], object], float]]


@pytest.fixture
def plans() -> Plans:
    """Return the list of scheduled calls, which the test executes."""
    return []


@pytest.fixture
def lifecycle(plans: Plans) -> Lifecycle:
    """Return a Lifecycle that schedules its calls in `plans`."""
    return Lifecycle(lambda action, when: plans.append((action, when)))


def retry(manager: ServiceManager, plans: Plans) -> list[str]:
    """Make room in the socket, execute the planned call, and return the messages it sends."""
    manager.unread()
    plans.pop()[0]()
    return [message.partition("\n")[0] for message in manager.unread()]


def test_accepted_at_once(manager: ServiceManager, lifecycle: Lifecycle, plans: Plans) -> None:
    """A message that the socket accepts is not sent again."""
    lifecycle.ready()
    lifecycle.reloading()
    lifecycle.ready()
    lifecycle.stopping()
    sent = manager.unread()
    assert [message.partition("\n")[0] for message in sent] == [
        "READY=1",
        "RELOADING=1",
        "READY=1",
        "STOPPING=1",
    ]
    assert sent[1].partition("MONOTONIC_USEC=")[2].isdigit()
    assert plans == []


def test_retried_several_times(manager: ServiceManager, lifecycle: Lifecycle, plans: Plans) -> None:
    """A message is retried until the socket accepts it."""
    manager.stuff()
    lifecycle.ready()
    for _ in range(3):
        plans.pop()[0]()
    assert retry(manager, plans) == ["READY=1"]
    assert plans == []


@pytest.mark.parametrize(
    ("calls", "sent"),
    [
        (("reloading", "ready"), ["RELOADING=1", "READY=1"]),
        # Another READY=1 follows when the reload is done.
        (("ready", "reloading"), ["RELOADING=1"]),
        (("ready", "reloading", "ready"), ["RELOADING=1", "READY=1"]),
        (("reloading", "ready", "reloading"), ["RELOADING=1"]),
        (("reloading", "ready", "reloading", "ready"), ["RELOADING=1", "READY=1"]),
        (("ready", "ready"), ["READY=1"]),
        (("ready", "stopping"), ["STOPPING=1"]),
        (("reloading", "stopping"), ["STOPPING=1"]),
    ],
)
def test_order(
    manager: ServiceManager,
    lifecycle: Lifecycle,
    plans: Plans,
    calls: tuple[str, ...],
    sent: list[str],
) -> None:
    """Unsent messages are sent in order, without those that a later one replaces."""
    manager.stuff()
    for call in calls:
        getattr(lifecycle, call)()
    assert retry(manager, plans) == sent


def test_order_when_the_socket_has_room_again(
    manager: ServiceManager, lifecycle: Lifecycle
) -> None:
    """A later message does not overtake an unsent one."""
    manager.stuff()
    lifecycle.reloading()
    manager.unread()
    lifecycle.ready()
    assert [message.partition("\n")[0] for message in manager.unread()] == [
        "RELOADING=1",
        "READY=1",
    ]


@pytest.mark.parametrize(
    "address",
    [
        "",
        "/nowhere/at/all",
        "@nobody",
        "@",
        "/" + 200 * "x",
        "relative",
        "vsock:2:1234",
        "vsock-stream:2:1234",
    ],
)
def test_no_such_address(
    monkeypatch: pytest.MonkeyPatch, lifecycle: Lifecycle, plans: Plans, address: str
) -> None:
    """An address without a service manager, or of another family, is not retried."""
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    lifecycle.ready()
    assert plans == []
    assert notify("STATUS=caf\udce9")


def serving(serve: Serve, path: Path) -> Server:
    """Return a server whose worker is ready."""
    path.write_bytes(b"")
    server = serve(path)
    server.logged("worker ready: ")
    return server


@pytest.mark.parametrize("exists", [True, False])
def test_full_socket_at_the_start(
    serve: Serve, path: Path, manager: ServiceManager, exists: bool
) -> None:
    """READY=1 is sent as soon as the socket has room, with or without the served file."""
    manager.stuff()
    if exists:
        serving(serve, path)
    else:
        serve(path).logged("waiting for file")
    assert manager.phases(1) == ["READY=1"]


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False])
def test_full_socket_during_an_upgrade(
    serve: Serve, path: Path, manager: ServiceManager, before: bool
) -> None:
    """RELOADING=1 and READY=1 are sent in order, if the socket is full before either of them."""
    server = serving(serve, path)
    assert manager.phases(1) == ["READY=1"]
    if before:
        manager.stuff()
    server.signal(signal.SIGHUP)
    if not before:
        assert manager.phases(1) == ["RELOADING=1"]
        manager.stuff()
    server.logged("upgraded: ")
    assert manager.phases(2) == ["RELOADING=1", "READY=1"]


@pytest.mark.slow
def test_full_socket_until_the_end(serve: Serve, path: Path, manager: ServiceManager) -> None:
    """A server that ends before READY=1 could be sent sends STOPPING=1 instead."""
    manager.stuff()
    path.write_bytes(random_bytes(16 << 20))
    server = serve(path)
    stalled = server.connect(b"0\n", receive_buffer=4096)
    assert stalled.recv(1)
    server.logged("worker ready: ")
    server.signal(signal.SIGTERM)
    server.logged("draining: ")
    assert manager.phases(1) == ["STOPPING=1"]
    server.signal(signal.SIGQUIT)
