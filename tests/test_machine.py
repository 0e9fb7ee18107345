"""tailsrv under a real systemd: its units, and the README's operations part, in a machine of their own."""

import os
import re
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from helpers import eventually, expect, expect_eof, random_bytes
from machine import CHECKOUT, Machine, NoMachineError, Service, is_required, locked, make_root, make_wheels, reason_to_skip

pytestmark = [pytest.mark.machine, pytest.mark.slow]

PORT = 4321

Boot = Callable[[], Machine]
MakeService = Callable[..., Service]


@pytest.fixture(scope="module")
def boot() -> Iterator[Boot]:
    """Boot machines that are alike, and end them at the end."""
    if reason := reason_to_skip():
        pytest.skip(f"no machine: {reason}")
    with ExitStack() as stack:
        temporary = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tailsrv-machine-")))
        folder = Path(os.environ.get("TAILSRV_TEST_MACHINE") or temporary)
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with locked(folder):
                root, wheels = make_root(folder), make_wheels(folder)
        except NoMachineError as error:
            if is_required():
                raise
            pytest.skip(f"no machine: {error}")
        booted: list[Machine] = []

        def start() -> Machine:
            machine = Machine(root, wheels, temporary / f"{len(booted)}.log")
            stack.callback(machine.end)
            machine.use_wheels()
            machine.copy_checkout("/root/tailsrv")
            booted.append(machine)
            return machine

        yield start


def operations() -> dict[str, str]:
    """Return the README's commands for operators, by what they are for, in order."""
    text = (CHECKOUT / "README.md").read_text()
    return dict(re.findall(r"<!-- operations: (\w+) -->\n```sh\n(.*?)```", text, re.DOTALL))


def follow_readme(machine: Machine, what: str) -> str:
    """Run the README's commands for `what` by the letter, as root in a checkout; return what they print."""
    return machine.run("bash", "-euc", "cd /root/tailsrv\n" + operations()[what])


@pytest.fixture(scope="module")
def machine(boot: Boot) -> Machine:
    """Return a machine in which tailsrv is installed as the README says."""
    machine = boot()
    follow_readme(machine, "install")
    return machine


@pytest.fixture
def make_service(machine: Machine, request: pytest.FixtureRequest) -> Iterator[MakeService]:
    """Make instances that are stopped at the end; each test has files of its own, and so a log of its own."""
    name = re.sub(r"\W+", "_", request.node.name)
    with ExitStack() as stack:

        def make(path: str = f"/var/log/{name}.log", **settings: str) -> Service:
            service = Service(machine, path)
            stack.callback(service.finish)
            if settings:
                service.configure(**settings)
            return service

        yield make


@pytest.fixture
def service(make_service: MakeService) -> Service:
    """Return a running service of two workers, whose file belongs to group adm."""
    service = make_service(PORT=str(PORT), WORKERS="2")
    service.create(b"first\n")
    service.start()
    return service


def test_the_units_are_what_systemd_calls_safe(machine: Machine) -> None:
    """The service scores 1.5 at most, and systemd has nothing to say against either unit."""
    folder = "/etc/systemd/system"
    machine.run("systemd-analyze", "security", "--offline=yes", "--threshold=15", "--no-pager", f"{folder}/tailsrv@.service")
    for unit in ("tailsrv@.service", "tailsrv@.socket"):
        assert machine.run("systemd-analyze", "verify", f"{folder}/{unit}") == ""


def test_a_log_of_group_adm_is_served(service: Service) -> None:
    """The sandboxed service is ready, serves a log that only group adm may read, and watches it with inotify."""
    sock = service.connect(PORT, b"0\n")
    expect(sock, b"first\n")
    service.append(b"second\n")
    expect(sock, b"second\n")
    assert service.show("ActiveState") == "active"
    assert not [line for line in service.log if "once a second" in line], service.log


def test_the_log_has_priorities(service: Service) -> None:
    """The journal knows how grave a line is."""
    query = ("journalctl", "--quiet", "--output=cat", "--unit", service.unit, "--identifier=tailsrv")
    service.kill(service.workers()[0], signal.SIGKILL)
    assert "SIGKILL" in service.logged("worker", "SIGKILL")
    assert "SIGKILL" in service.machine.run(*query, "--priority=warning")
    assert "listening" not in service.machine.run(*query, "--priority=warning")


def test_a_reload_keeps_the_clients(service: Service) -> None:
    """A reload replaces the program and its workers; no client notices, and systemd sees no restart."""
    sock, pid, workers = service.connect(PORT, b"0\n"), service.pid, service.workers()
    expect(sock, b"first\n")
    service.machine.run("systemctl", "reload", service.unit)
    service.logged("upgraded: ")
    service.reaches("active")
    service.append(b"second\n")
    expect(sock, b"second\n")
    assert service.pid == pid
    assert not set(service.workers()) & set(workers)
    assert service.show("NRestarts") == "0"


def test_a_killed_worker_costs_nothing(service: Service) -> None:
    """A worker that is killed is replaced; its clients and the service go on."""
    sock, pid = service.connect(PORT, b"0\n"), service.pid
    expect(sock, b"first\n")
    for worker in service.workers():
        service.kill(worker, signal.SIGKILL)
    service.append(b"second\n")
    expect(sock, b"second\n")
    assert service.pid == pid
    assert service.show("ActiveState") == "active"


def test_a_killed_supervisor_is_started_again(service: Service) -> None:
    """A supervisor that is killed takes its workers with it and comes back; clients go on where they were."""
    sock, pid, workers = service.connect(PORT, b"0\n"), service.pid, service.workers()
    expect(sock, b"first\n")
    service.kill(pid, signal.SIGKILL)
    eventually(lambda: service.pid not in (0, pid))
    service.reaches("active")
    assert not set(service.workers()) & set(workers)
    assert service.show("NRestarts") == "1"
    service.append(b"second\n")
    expect(service.connect(PORT, b"6\n"), b"second\n")


def test_a_stop_is_in_time_and_in_good_order(service: Service) -> None:
    """Clients that read get all and an orderly end; one that does not read holds the stop up for the grace only."""
    data = random_bytes(30 << 20)
    service.append(data)
    stalled = service.connect(PORT, b"0\n", receive_buffer=4096)
    expect(stalled, b"first\n")
    sock = service.connect(PORT, b"6\n")
    expect(sock, data)
    began = time.monotonic()
    service.machine.run("systemctl", "stop", service.unit)
    assert time.monotonic() - began < 10
    expect_eof(sock)
    assert service.show("Result") == "success"
    assert service.log[-1] == "ended: status=0"
