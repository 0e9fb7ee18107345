"""READY=1 and its like reach a service manager whose socket is full at first: sd_notify(3)."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from support.files import random_bytes
from support.server import Serve, Server
from support.service_manager import ServiceManager
from tailsrv.linux.systemd import Lifecycle, notify


@pytest.fixture(autouse=True)
def told(manager: ServiceManager, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have all that we start tell the service manager, and tell it ourselves."""
    monkeypatch.setenv("NOTIFY_SOCKET", manager.address)


Plans = list[tuple[Callable[[], object], float]]


@pytest.fixture
def plans() -> Plans:
    """Return what is planned, for the test to do."""
    return []


@pytest.fixture
def lifecycle(plans: Plans) -> Lifecycle:
    """Return a lifecycle that plans for the test."""
    return Lifecycle(lambda action, when: plans.append((action, when)))


def again(manager: ServiceManager, plans: Plans) -> list[str]:
    """Make room, do what is planned, and return what comes of it, without the times."""
    manager.unread()
    plans.pop()[0]()
    return [message.partition("\n")[0] for message in manager.unread()]


def test_taken_at_once(manager: ServiceManager, lifecycle: Lifecycle, plans: Plans) -> None:
    """What is taken is not sent again."""
    lifecycle.ready()
    lifecycle.reloading()
    lifecycle.ready()
    lifecycle.stopping()
    said = manager.unread()
    assert [message.partition("\n")[0] for message in said] == [
        "READY=1",
        "RELOADING=1",
        "READY=1",
        "STOPPING=1",
    ]
    assert said[1].partition("MONOTONIC_USEC=")[2].isdigit()
    assert plans == []


def test_tried_several_times(manager: ServiceManager, lifecycle: Lifecycle, plans: Plans) -> None:
    """A message is sent again until there is room for it."""
    manager.stuff()
    lifecycle.ready()
    for _ in range(3):
        plans.pop()[0]()
    assert again(manager, plans) == ["READY=1"]
    assert plans == []


@pytest.mark.parametrize(
    ("calls", "said"),
    [
        (("reloading", "ready"), ["RELOADING=1", "READY=1"]),
        # READY=1 will come when that is over
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
    said: list[str],
) -> None:
    """Unsent messages come in order, without those that a later one replaces."""
    manager.stuff()
    for call in calls:
        getattr(lifecycle, call)()
    assert again(manager, plans) == said


def test_order_when_room_comes_between(manager: ServiceManager, lifecycle: Lifecycle) -> None:
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
    """An address at which there is no service manager, or of another family, is not tried again."""
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


@pytest.mark.parametrize("there", [True, False])
def test_busy_at_the_start(serve: Serve, path: Path, manager: ServiceManager, there: bool) -> None:
    """READY=1 comes as soon as there is room, with the file and without it."""
    manager.stuff()
    if there:
        serving(serve, path)
    else:
        serve(path).logged("waiting for file")
    assert manager.phases(1) == ["READY=1"]


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False])
def test_busy_during_an_upgrade(
    serve: Serve, path: Path, manager: ServiceManager, before: bool
) -> None:
    """RELOADING=1 and then READY=1 come as soon as there is room, whichever of them found none."""
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
def test_busy_until_the_end(serve: Serve, path: Path, manager: ServiceManager) -> None:
    """A server that must end before READY=1 could be sent sends STOPPING=1 instead."""
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
