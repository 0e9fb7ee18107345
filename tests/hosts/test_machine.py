"""tailsrv under a real systemd: its units and the operations manual, in a machine of their own."""

import os
import re
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.checkout import ROOT
from support.debian import (
    COMMAND_DEADLINE,
    Machine,
    NoMachineError,
    Service,
    is_required,
    locked,
    make_root,
    make_wheels,
    reason_to_skip,
)
from support.files import random_bytes
from support.sockets import expect, expect_eof, recv_all, recv_exactly
from support.waiting import eventually

pytestmark = [pytest.mark.machine, pytest.mark.slow]

PORT = 4321
UNITS = "/etc/systemd/system"

Boot = Callable[[], Machine]
MakeService = Callable[..., Service]


@pytest.fixture(scope="module")
def boot() -> Iterator[Boot]:
    """Yield a function that boots identical machines, which end after the tests."""
    if reason := reason_to_skip():
        pytest.skip(f"no machine: {reason}")
    with ExitStack() as stack:
        temporary = Path(
            stack.enter_context(tempfile.TemporaryDirectory(prefix="tailsrv-machine-"))
        )
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


def operations(page: str = "docs/operations.md", mark: str = "operations") -> dict[str, str]:
    """Return the commands for operators in the page, by their purpose, in order."""
    text = (ROOT / page).read_text()
    return dict(re.findall(rf"<!-- {mark}: (\w+) -->\n```sh\n(.*?)```", text, re.DOTALL))


def follow_manual(machine: Machine, what: str) -> str:
    """Run the manual's commands for `what` exactly, as root in a checkout; return their output."""
    return follow(machine, operations()[what])


def follow(machine: Machine, commands: str) -> str:
    """Run commands exactly, as root of a hardened machine in a checkout; return their output."""
    return machine.run("bash", "-euc", "umask 077\ncd /root/tailsrv\n" + commands)


@pytest.fixture(scope="module")
def machine(boot: Boot) -> Machine:
    """Return a machine in which tailsrv is installed according to the manual."""
    machine = boot()
    follow_manual(machine, "install")
    return machine


@pytest.fixture
def make_service(machine: Machine, request: pytest.FixtureRequest) -> Iterator[MakeService]:
    """Yield a function that makes instances, each with a file named after the test.

    All of them are stopped after the test.
    """
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
    """The service's exposure score is 1.5 at most, and systemd-analyze verifies both units."""
    assert_safe(machine, "tailsrv@.service")
    assert machine.run("systemd-analyze", "verify", f"{UNITS}/tailsrv@.socket") == ""


def assert_safe(machine: Machine, *services: str) -> None:
    """Assert an exposure score of 1.5 at most, and that systemd-analyze verifies the units."""
    for service in services:
        machine.run(
            "systemd-analyze",
            "security",
            "--offline=yes",
            "--threshold=15",
            "--no-pager",
            f"{UNITS}/{service}",
        )
        assert machine.run("systemd-analyze", "verify", f"{UNITS}/{service}") == ""


def test_a_log_of_group_adm_is_served(service: Service) -> None:
    """The sandboxed service serves a log of group adm, and monitors it with inotify."""
    sock = service.connect(PORT, b"0\n")
    expect(sock, b"first\n")
    service.append(b"second\n")
    expect(sock, b"second\n")
    assert service.show("ActiveState") == "active"
    assert not service.lines("once a second")


def test_the_log_has_priorities(service: Service) -> None:
    """The journal stores the priority of each log line."""
    query = (
        "journalctl",
        "--quiet",
        "--output=cat",
        "--unit",
        service.unit,
        "--identifier=tailsrv",
    )
    service.kill(service.workers()[0], signal.SIGKILL)
    assert "SIGKILL" in service.logged("worker", "SIGKILL")
    assert "SIGKILL" in service.machine.run(*query, "--priority=warning")
    assert "listening" not in service.machine.run(*query, "--priority=warning")


def test_a_reload_keeps_the_clients(service: Service) -> None:
    """A reload replaces the program and its workers, keeps the clients, and is no restart."""
    sock, pid, workers = service.connect(PORT, b"0\n"), service.pid, service.workers()
    expect(sock, b"first\n")
    reload(service)
    service.append(b"second\n")
    expect(sock, b"second\n")
    assert service.pid == pid
    assert not set(service.workers()) & set(workers)
    assert service.show("NRestarts") == "0"


def test_a_killed_worker_is_replaced(service: Service) -> None:
    """A killed worker is replaced, and its clients and the service continue."""
    sock, pid = service.connect(PORT, b"0\n"), service.pid
    expect(sock, b"first\n")
    for worker in service.workers():
        service.kill(worker, signal.SIGKILL)
    service.append(b"second\n")
    expect(sock, b"second\n")
    assert service.pid == pid
    assert service.show("ActiveState") == "active"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_killed_supervisor_costs_no_stream(service: Service, number: signal.Signals) -> None:
    """systemd starts another supervisor, which takes over, as often as one is killed."""
    sock = service.connect(PORT, b"0\n")
    expect(sock, b"first\n")
    for kills in range(1, 4):
        pid, workers = service.pid, service.workers()
        service.kill(pid, number)
        waiting = service.connect(PORT, b"-1\n")
        eventually(lambda pid=pid: service.pid not in (0, pid))  # type: ignore[misc]
        service.logged("took over: ", count=kills)
        assert not set(eventually(service.workers)) & set(workers)
        assert service.show("NRestarts") == str(kills)
        expect(waiting, b"\n")
        service.append(b"x\n")
        expect(sock, b"x\n")
    assert stop(service) < 10
    expect_eof(sock)
    assert processes(service) == []


def test_a_restart_costs_no_stream(service: Service) -> None:
    """A restart applies settings that have changed, and all clients stay."""
    sock, pid = service.connect(PORT, b"0\n"), service.pid
    expect(sock, b"first\n")
    service.configure(PORT=str(PORT), WORKERS="3", OPTIONS="--grace 1 --max-clients 7")
    service.machine.run("systemctl", "restart", service.unit)
    assert service.pid not in (0, pid)
    status = service.status(PORT)
    assert status["max_clients"] == 7
    assert len(status["workers"]) == 3
    assert status["clients"] == 1
    service.append(b"second\n")
    expect(sock, b"second\n")
    service.machine.run("systemctl", "try-restart", service.unit)
    service.append(b"third\n")
    expect(sock, b"third\n")
    assert stop(service) < 10
    expect_eof(sock)
    assert processes(service) == []


def test_many_supervisors_are_killed(service: Service) -> None:
    """The start limit allows for a supervisor that is killed every other second."""
    sock = service.connect(PORT, b"0\n")
    expect(sock, b"first\n")
    for kills in range(1, 21):
        service.machine.run("systemctl", "kill", "--kill-whom=main", "--signal=KILL", service.unit)
        service.append(b"x")
        expect(sock, b"x")
        service.logged("took over: ", count=kills)
    assert service.show("ActiveState") == "active"


def test_a_stop_while_there_is_no_supervisor(make_service: MakeService) -> None:
    """Workers that systemd has forgotten end by themselves, or at once by `systemctl kill`."""
    service = make_service(PORT=str(PORT), OPTIONS="--orphan-timeout 2")
    service.override("[Service]", "RestartSec=1h")
    service.create(b"first\n")
    service.start()
    sock = service.connect(PORT, b"0\n")
    expect(sock, b"first\n")
    service.kill(service.pid, signal.SIGKILL)
    service.reaches("activating")
    service.machine.run("systemctl", "stop", service.unit)
    service.append(b"second\n")
    expect(sock, b"second\n")
    expect_eof(sock)
    eventually(lambda: processes(service) == [])


def processes(service: Service) -> list[str]:
    """Return the titles of the processes of tailsrv in the machine."""
    return service.machine.ask("pgrep", "--list-full", "tailsrv").stdout.splitlines()


def test_a_stop_ends_streams_in_time(service: Service) -> None:
    """A stop completes the streams of clients that read, and is limited by the grace period."""
    data = random_bytes(30 << 20)
    service.append(data)
    stalled = service.connect(PORT, b"0\n", receive_buffer=4096)
    expect(stalled, b"first\n")
    sock = service.connect(PORT, b"6\n")
    expect(sock, data)
    assert stop(service) < 10
    expect_eof(sock)
    assert service.show("Result") == "success"
    assert service.log[-1] == "ended: status=0"


def test_a_hung_worker_does_not_hold_a_stop_up(service: Service) -> None:
    """With a hung worker, a stop ends successfully, long before the timeout of systemd."""
    service.kill(service.workers()[0], signal.SIGSTOP)
    assert stop(service) < 15
    assert service.show("Result") == "success"


def stop(service: Service) -> float:
    """Stop the service; return the seconds that this needed."""
    began = time.monotonic()
    service.machine.run("systemctl", "stop", service.unit)
    return time.monotonic() - began


def reload(service: Service) -> None:
    """Reload the service, and wait for the end of the reload."""
    service.machine.run("systemctl", "reload", service.unit)
    service.logged("upgraded: ")
    service.reaches("active")


def test_the_status_says_clients_and_workers(service: Service) -> None:
    """`systemctl status` shows the numbers of workers and clients, and their changes."""
    eventually(lambda: service.show("StatusText") == "2 workers, 0 clients")
    socks = [service.connect(PORT, b"0\n") for _ in range(3)]
    eventually(lambda: service.show("StatusText") == "2 workers, 3 clients")
    for sock in socks:
        expect(sock, b"first\n")


def test_a_file_that_comes_later_is_waited_for(make_service: MakeService) -> None:
    """The service starts before its file exists, reports that, and serves waiting clients later."""
    service = make_service(PORT=str(PORT))
    service.start()
    eventually(lambda: service.show("StatusText") == "waiting for file")
    sock = service.connect(PORT, b"0\n")
    service.create(b"first\n")
    expect(sock, b"first\n")


def test_health_is_for_root(service: Service) -> None:
    """A health check works as root despite the sandbox, and is UNKNOWN for other users."""
    health = ("/opt/tailsrv/bin/tailsrv-health", "-p", str(PORT))
    first, *rest = service.machine.run(*health).splitlines()
    assert first.startswith("OK: ")
    assert first.endswith(" to 0 clients with 2 workers")
    # The lines that show the descriptors in use and their limit.
    assert sum(bool(re.search(r" \d+/\d+ ?", line)) for line in rest) == 3
    assert (
        service.machine.ask("setpriv", "--reuid=nobody", "--clear-groups", *health).returncode == 3
    )
    service.kill(service.workers()[0], signal.SIGSTOP)
    assert service.machine.ask(*health).returncode == 2


@pytest.mark.parametrize("reloaded", [False, True])
def test_a_hung_worker_is_replaced(make_service: MakeService, reloaded: bool) -> None:
    """A hung worker is killed and replaced; its clients and the service continue."""
    service = make_service(PORT=str(PORT), WORKERS="2")
    service.override("[Service]", "WatchdogSec=6")
    service.create(b"first\n")
    service.start()
    if reloaded:
        reload(service)
    sock, pid = service.connect(PORT, b"0\n"), service.pid
    expect(sock, b"first\n")
    for worker in service.workers():
        service.kill(worker, signal.SIGSTOP)
    service.append(b"second\n")
    expect(sock, b"second\n")
    service.logged("worker does not answer", count=2)
    service.logged("worker ready", count=6 if reloaded else 4)
    assert service.pid == pid
    assert service.show("NRestarts") == "0"


def test_a_hung_supervisor_is_ended_by_the_watchdog(make_service: MakeService) -> None:
    """systemd kills a hung supervisor and starts another one, which takes over."""
    service = make_service(PORT=str(PORT))
    service.override("[Service]", "WatchdogSec=2")
    service.create(b"first\n")
    service.start()
    sock, pid = service.connect(PORT, b"0\n"), service.pid
    expect(sock, b"first\n")
    service.kill(pid, signal.SIGSTOP)
    eventually(lambda: service.pid not in (0, pid))
    service.logged("took over: ", "clients=1")
    service.append(b"second\n")
    expect(sock, b"second\n")
    expect(service.connect(PORT, b"0\n"), b"first\nsecond\n")


# Socket activation.


def test_one_socket_is_shared(make_service: MakeService) -> None:
    """The first client starts the service; all workers share one socket, also after a reload."""
    service = make_service(PORT="", WORKERS="2")
    service.create(b"first\n")
    service.listen("ListenStream=4322")
    assert service.show("ActiveState") == "inactive"
    socks = [service.connect(4322, b"0\n") for _ in range(10)]
    for sock in socks:
        expect(sock, b"first\n")
    service.reaches("active")
    assert len(service.workers()) == 2
    assert [listener["slot"] for listener in service.status(4322)["listeners"]] == [None]
    reload(service)
    service.append(b"second\n")
    for sock in socks:
        expect(sock, b"second\n")
    expect(service.connect(4322, b"0\n"), b"first\nsecond\n")


def test_as_many_sockets_as_workers_are_used_one_each(make_service: MakeService) -> None:
    """With a ReusePort socket for each slot, each worker has its own queue, and all get clients."""
    service = make_service(PORT="", WORKERS="2")
    service.create(b"first\n")
    service.listen("ReusePort=yes", "ListenStream=[::]:4322", "ListenStream=[::]:4322")
    socks = [service.connect(4322, b"0\n") for _ in range(40)]
    for sock in socks:
        expect(sock, b"first\n")
    assert [listener["slot"] for listener in service.status(4322)["listeners"]] == [0, 1]
    assert all(worker["clients"] for worker in eventually(lambda: workers_with(service, 40)))
    reload(service)
    service.append(b"second\n")
    for sock in socks:
        expect(sock, b"second\n")


def workers_with(service: Service, clients: int) -> list[dict[str, int]]:
    """Return the workers from the status once there are `clients` clients."""
    status = service.status(4322)
    workers: list[dict[str, int]] = status["workers"]
    return workers if status["clients"] == clients else []


def test_clients_wait_while_systemd_holds_the_socket(make_service: MakeService) -> None:
    """A client that connects while the service is down is served after its restart."""
    service = make_service(PORT="", OPTIONS="--orphan-timeout 0")
    service.override("[Service]", "RestartSec=3")
    service.create(b"first\n")
    service.listen("ListenStream=4322")
    expect(service.connect(4322, b"0\n"), b"first\n")
    service.reaches("active")
    service.kill(service.pid, signal.SIGKILL)
    service.reaches("activating")
    expect(service.connect(4322, b"0\n"), b"first\n")


def test_a_socket_is_no_obstacle_to_a_takeover(make_service: MakeService) -> None:
    """With sockets of systemd, neither a killed supervisor nor a restart costs a stream."""
    service = make_service(PORT="", WORKERS="2")
    service.create(b"first\n")
    service.listen("ListenStream=4322")
    socks = [service.connect(4322, b"0\n") for _ in range(10)]
    for sock in socks:
        expect(sock, b"first\n")
    service.reaches("active")
    service.kill(service.pid, signal.SIGKILL)
    socks.append(service.connect(4322, b"0\n"))
    expect(socks[-1], b"first\n")
    service.logged("took over: ")
    service.machine.run("systemctl", "restart", service.unit)
    service.logged("took over: ", "clients=11", count=1)
    service.append(b"second\n")
    for sock in socks:
        expect(sock, b"second\n")
    assert len(service.status(4322)["listeners"]) == 1


def test_a_port_and_sockets_exclude_each_other(make_service: MakeService) -> None:
    """A port in addition to passed sockets is a usage error with a hint, and is not retried."""
    service = make_service(PORT=str(PORT))
    service.create()
    service.listen("ListenStream=4322")
    assert service.fails() == "2"
    assert "PORT=" in service.log[-1]


# Rotation.


def rotate(service: Service, *directives: str) -> None:
    """Make logrotate rotate the file."""
    name = f"/etc/logrotate.d/{os.path.basename(service.path)}"
    service.machine.write(name, "\n".join([f'"{service.path}" {{', "rotate 9", *directives, "}\n"]))
    service.machine.run("logrotate", "--force", name)


@pytest.mark.parametrize("activated", [False, True])
@pytest.mark.parametrize("dated", [False, True])
def test_a_rotation_is_followed(make_service: MakeService, activated: bool, dated: bool) -> None:
    """With --follow-name, streams continue with the next file, and later ones get all files."""
    service = make_service(
        PORT="" if activated else str(PORT), WORKERS="2", OPTIONS="--follow-name"
    )
    service.create(b"first\n")
    service.listen(f"ListenStream={PORT}") if activated else service.start()
    sock = service.connect(PORT, b"0\n")
    expect(sock, b"first\n")
    pid = service.pid
    for number, data in enumerate([b"second\n", b"third\n"]):
        dates = ["dateext", f"dateformat -%Y%m%d-{number}"] if dated else []
        rotate(service, "create 0640 root adm", *dates)
        service.append(data)
        expect(sock, data)
    expect(service.connect(PORT, b"-8\n"), b"d\nthird\n")
    expect(service.connect(PORT, b"0\n"), b"first\nsecond\nthird\n")
    assert service.pid == pid
    assert service.show("NRestarts") == "0"


def test_offsets_survive_a_restart(make_service: MakeService) -> None:
    """The sandboxed service keeps a state file: rotations and restarts change no offset."""
    service = make_service(PORT=str(PORT), OPTIONS="--follow-name")
    service.create(b"first\n")
    service.start()
    rotate(service, "create 0640 root adm")
    service.append(b"second\n")
    service.logged("rolled")
    service.machine.run("systemctl", "stop", service.unit)
    for data in (b"third\n", b"fourth\n"):
        rotate(service, "create 0640 root adm")
        service.append(data)
    service.start()
    data = b"first\nsecond\nthird\nfourth\n"
    sock = service.connect(PORT, b"?7\n")
    # The files that came while the service was down follow a moment after its start.
    assert recv_exactly(sock, 40).startswith(b"%019d " % 7)
    expect(sock, data[7:])
    # A kill leaves the sizes that were saved at the last roll.
    service.append(b"fifth\n")
    pid = service.pid
    service.kill(pid, signal.SIGKILL)
    eventually(lambda: service.pid not in (0, pid))
    service.reaches("active")
    expect(service.connect(PORT, b"19\n"), b"fourth\nfifth\n")


def state_files(machine: Machine) -> list[str]:
    """Return the paths of all state files in the machine."""
    return machine.run("find", "/var/lib/private/tailsrv", "-name", "*.json").splitlines()


def test_each_instance_has_a_state_file(machine: Machine, make_service: MakeService) -> None:
    """Each instance has its own state file; a damaged one is named, and stops its instance."""
    before = state_files(machine) if (machine.files / "var/lib/private/tailsrv").exists() else []
    services = [
        make_service(f"/var/log/instance{number}.log", PORT=str(PORT + number), OPTIONS=options)
        for number, options in enumerate(["--follow-name", "--follow-name", ""])
    ]
    for service in services:
        service.create(b"first\n")
        service.start()
    made = sorted(set(state_files(machine)) - set(before))
    assert [os.path.basename(path).partition("-")[0] for path in made] == [
        "instance0.log",
        "instance1.log",
    ]
    machine.run("systemctl", "stop", services[0].unit)
    machine.run("truncate", "--size=9", made[0])
    services[0].start(succeeds=False)
    assert os.path.basename(made[0]) in services[0].log[-1]
    machine.run("rm", made[0])
    services[0].reaches("active")


def require(machine: Machine, program: str) -> None:
    """Skip the test if the machine, which may be an older one, does not have `program`."""
    if machine.ask("sh", "-c", f"command -v {program}").returncode:
        pytest.skip(f"no {program} in the machine")


def recv_lines(sock: socket.socket, mark: bytes, count: int) -> list[bytes]:
    """Receive until `count` lines contain `mark`, and return these lines."""
    data = b""
    while not data.endswith(b"\n") or data.count(mark) < count:
        received = sock.recv(1 << 16)
        assert received, f"the stream ended after {data!r}"
        data += received
    return [line for line in data.splitlines() if mark in line]


def test_nginx_reopens_its_log(machine: Machine, make_service: MakeService) -> None:
    """Debian's logrotate configuration for nginx rotates without a lost or repeated line."""
    require(machine, "nginx")
    service = make_service("/var/log/nginx/access.log", PORT=str(PORT), OPTIONS="--follow-name")
    machine.run("systemctl", "start", "nginx")
    service.start()
    sock = service.connect(PORT, b"0\n")
    for number in range(40):
        if number % 10 == 5:
            machine.run("logrotate", "--force", "/etc/logrotate.d/nginx")
        with machine.connect(80, b"GET /request-%02d HTTP/1.0\r\n\r\n" % number) as request:
            recv_all(request)
    lines = recv_lines(sock, b"/request-", 40)
    # nginx has several workers, which reopen the log one after another.
    numbers = sorted(int(line.partition(b"/request-")[2][:2]) for line in lines)
    assert numbers == list(range(40))
    service.logged("rolled", count=4)


def test_rsyslog_reopens_its_log(machine: Machine, make_service: MakeService) -> None:
    """Debian's logrotate configuration for rsyslog rotates without a lost or repeated line."""
    require(machine, "rsyslogd")
    machine.run("logger", "--tag=first", "the file exists")
    service = make_service("/var/log/syslog", PORT=str(PORT), OPTIONS="--follow-name -q")
    service.start()
    sock = service.connect(PORT, b"-0\n")
    for number in range(40):
        if number % 10 == 5:
            machine.run("logrotate", "--force", "/etc/logrotate.d/rsyslog")
        machine.run("logger", "--tag=rotation", f"message-{number:02d}")
    lines = recv_lines(sock, b" message-", 40)
    assert [int(line.partition(b" message-")[2]) for line in lines] == list(range(40))


@pytest.mark.parametrize("activated", [False, True])
def test_a_rotation_restarts_a_service_that_does_not_follow(
    make_service: MakeService, activated: bool
) -> None:
    """Without --follow-name, the service ends and restarts with the new file."""
    service = make_service(PORT="" if activated else str(PORT))
    service.create(b"first\n")
    service.listen(f"ListenStream={PORT}") if activated else service.start()
    sock = service.connect(PORT, b"0\n")
    expect(sock, b"first\n")
    rotate(service, "create 0640 root adm")
    expect_eof(sock)
    service.append(b"new\n")
    if not activated:
        service.logged("listening", count=2)
        service.reaches("active")
    expect(service.connect(PORT, b"0\n"), b"new\n")
    service.reaches("active")


def test_a_truncation_is_logged(make_service: MakeService) -> None:
    """copytruncate is logged as a warning, and streams that had everything continue."""
    service = make_service(PORT=str(PORT), OPTIONS="--follow-name")
    service.create(b"first\n")
    service.start()
    sock, pid = service.connect(PORT, b"0\n"), service.pid
    expect(sock, b"first\n")
    rotate(service, "copytruncate")
    service.logged("file was truncated")
    service.append(b"second\n")
    expect(sock, b"second\n")
    expect(service.connect(PORT, b"0\n"), b"second\n")
    expect(service.connect(PORT, b"?-2\n"), b"%019d %019d\nd\n" % (11, 13))
    # The bytes before the truncation no longer exist.
    expect_eof(service.connect(PORT, b"1\n"))
    assert service.pid == pid


def test_a_new_file_that_may_not_be_read_is_waited_for(make_service: MakeService) -> None:
    """A rotation to an unreadable file is logged, and completes once the file is readable."""
    service = make_service(PORT=str(PORT), OPTIONS="--follow-name")
    service.create(b"first\n")
    service.start()
    sock = service.connect(PORT, b"0\n")
    expect(sock, b"first\n")
    rotate(service, "create 0600 root root")
    line = service.logged("cannot serve")
    assert "mode 0600, user 0 and group 0" in line
    # The id of group adm is 4.
    assert "groups 4," in line
    service.append(b"new\n")
    service.machine.run("chgrp", "adm", service.path)
    service.machine.run("chmod", "640", service.path)
    expect(sock, b"new\n")
    expect(service.connect(PORT, b"0\n"), b"first\nnew\n")


# Mistakes of operators.


def test_a_missing_file_of_settings(make_service: MakeService) -> None:
    """A service without an environment file names its folder in the log, and is not retried."""
    service = make_service()
    service.create()
    assert service.fails() == "2"
    assert "/etc/tailsrv/" in service.log[-1]
    assert service.show("NRestarts") == "0"


def test_a_wrong_setting(make_service: MakeService) -> None:
    """An invalid option is named in the log, and is not retried."""
    service = make_service(PORT=str(PORT), OPTIONS="--grace soon")
    service.create()
    assert service.fails() == "2"
    assert "--grace" in service.log[-1]
    assert service.show("NRestarts") == "0"


def test_settings_of_a_path_with_odd_characters(make_service: MakeService) -> None:
    """The environment file of a path with dashes and blanks has a name without backslashes."""
    service = make_service("/var/log/my-app of today.log", PORT=str(PORT), WORKERS="auto")
    assert "\\" in service.instance
    service.create(b"first\n")
    service.start()
    expect(service.connect(PORT, b"0\n"), b"first\n")


def test_a_port_in_use(make_service: MakeService) -> None:
    """A port in use is logged with a command that finds its user, and is retried until free."""
    service = make_service(PORT=str(PORT))
    service.create(b"first\n")
    service.machine.run(
        "systemd-run",
        "--unit=squatter",
        "socat",
        f"TCP-LISTEN:{PORT},reuseaddr,fork",
        "OPEN:/dev/null",
    )
    eventually(lambda: service.machine.ask("nc", "-z", "localhost", str(PORT)).returncode == 0)
    service.start(succeeds=False)
    assert service.show("ActiveState") == "activating"
    assert "Address already in use" in service.log[-1]
    assert f"ss -tanp sport = :{PORT}" in service.log[-1]
    service.machine.run("systemctl", "stop", "squatter")
    service.reaches("active")
    expect(service.connect(PORT, b"0\n"), b"first\n")


def test_a_port_of_another_tailsrv(service: Service, make_service: MakeService) -> None:
    """For a port that another tailsrv uses, the log has the pid of that server."""
    other = make_service("/var/log/other.log", PORT=str(PORT))
    other.create()
    other.start(succeeds=False)
    assert str(service.pid) in other.log[-1]


def test_a_privileged_port(make_service: MakeService) -> None:
    """For a port below 1024, the log tells to choose another one; a socket unit can use it."""
    service = make_service(PORT="443")
    service.create(b"first\n")
    service.start(succeeds=False)
    assert "choose a port above 1023" in service.log[-1]
    service.machine.run("systemctl", "stop", service.unit)
    service.configure(PORT="")
    service.listen("ListenStream=443")
    expect(service.connect(443, b"0\n"), b"first\n")


def test_a_file_that_may_not_be_read(make_service: MakeService) -> None:
    """An unreadable file is logged with mode, user and groups, and is retried until readable."""
    service = make_service(PORT=str(PORT))
    service.create(b"first\n", mode=0o600, group="root")
    service.start(succeeds=False)
    assert "mode 0600, user 0 and group 0" in service.log[-1]
    # The id of group adm is 4.
    assert "groups 4," in service.log[-1]
    service.machine.run("chgrp", "adm", service.path)
    service.machine.run("chmod", "640", service.path)
    service.reaches("active")


@pytest.mark.parametrize(
    ("folder", "remedy"),
    [
        ("/home/me", "ProtectHome=read-only"),
        ("/root", "ProtectHome=read-only"),
        ("/run/user/1000", "ProtectHome=read-only"),
        ("/tmp", "BindReadOnlyPaths=/tmp"),
        ("/var/tmp/logs", "BindReadOnlyPaths=/var/tmp/logs"),
    ],
)
def test_a_file_that_the_sandbox_hides(make_service: MakeService, folder: str, remedy: str) -> None:
    """For a file hidden by the sandbox, the log names the setting that makes it visible."""
    service = make_service(f"{folder}/app.log", PORT=str(PORT))
    service.create(b"first\n")
    service.machine.run("chmod", "o+x", folder)
    service.machine.ask("systemctl", "start", service.unit)
    assert remedy in service.logged("cannot see")
    assert "cannot see" in service.log[-1]
    service.override("[Service]", remedy)
    service.machine.run("systemctl", "restart", service.unit)
    expect(service.connect(PORT, b"0\n"), b"first\n")


# A relay.


def test_a_relay(machine: Machine, make_service: MakeService) -> None:
    """The relay's page works: clients survive a killed tssync and a restart of the origin."""
    origin = make_service("/var/log/origin.log", PORT="5321")
    origin.create(b"first\n")
    origin.start()
    pages = operations("contrib/relay/README.md", "relay")
    follow(machine, pages["install"])
    assert_safe(machine, "tailsrv-relay@.service", "tssync@.service")
    machine.run(
        "sed", "-i", "s/^ORIGIN=.*/ORIGIN=localhost:5321/", "/etc/tailsrv-relay/app.log.env"
    )
    assert follow(machine, pages["start"]).endswith("first")
    relay, sync = "tailsrv-relay@app.log.service", "tssync@app.log.service"
    pid, sock = (
        machine.run("systemctl", "show", "--value", "--property=MainPID", relay),
        machine.connect(PORT, b"0\n"),
    )
    with sock:
        expect(sock, b"first\n")
        machine.run("systemctl", "kill", "--signal=KILL", sync)
        eventually(
            lambda: machine.run("systemctl", "show", "--value", "--property=NRestarts", sync) == "1"
        )
        machine.run("systemctl", "restart", origin.unit)
        origin.append(b"second\n")
        expect(sock, b"second\n")
    assert machine.run("systemctl", "show", "--value", "--property=MainPID", relay) == pid
    machine.run("systemctl", "disable", "--now", relay)
    assert machine.ask("systemctl", "is-active", sync).stdout == "inactive\n"


# The manual.


def test_the_manual(boot: Boot, request: pytest.FixtureRequest) -> None:
    """The manual leads from pip to a rotated log, an activated service, and a clean removal."""
    machine = boot()
    service = Service(machine, "/var/log/app.log")
    request.addfinalizer(service.finish)
    printed = {}
    for what in operations():
        printed[what] = follow_manual(machine, what)
        if what == "serve":
            sock = service.connect(PORT, b"0\n")
            expect(sock, b"".join(b"%d\n" % number for number in range(1, 1001)))
        if what == "upgrade":
            service.logged("upgraded: ")
            service.append(b"after the upgrade\n")
            expect(sock, b"after the upgrade\n")
        if what == "rotate":
            service.append(b"new\n")
            expect(sock, b"new\n")
            expect(service.connect(PORT, b"-22\n"), b"after the upgrade\nnew\n")
    assert list(printed) == ["install", "serve", "look", "upgrade", "rotate", "activate", "remove"]
    assert printed["serve"].endswith("1000")
    assert "Status:" in printed["look"]
    assert "serving: path=/var/log/app.log" in printed["look"]
    assert re.search(
        r"^OK: tailsrv \*:4321 .* serves /var/log/app.log to ", printed["look"], re.MULTILINE
    )
    assert printed["activate"].endswith("new")
    assert machine.run("find", "/etc", "/opt", "/var/lib", "-name", "*tailsrv*") == ""
    assert machine.ask("pgrep", "-f", "^tailsrv: ").stdout == ""


# The README.


def test_the_readme(boot: Boot) -> None:
    """The README's commands lead from a bare Debian to a server and a client; Ctrl-C ends both."""
    machine, page = boot(), (ROOT / "README.md").read_text()
    install = re.findall(r"`(apt install .*?)`", page)[0]
    serve, read = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)[:2]
    strip(machine, but=install.split()[2:])
    # There is no network, so this succeeds only if all packages are installed.
    follow(machine, install)
    log = launch(machine, "server", serve)
    eventually(lambda: "waiting for file: path=app.log" in log.read_text(), COMMAND_DEADLINE)
    received = launch(machine, "client", read)
    numbers = "".join(f"{number}\n" for number in range(1, 1001))
    eventually(lambda: received.read_text() == numbers)
    follow(machine, "echo more >> app.log")
    eventually(lambda: received.read_text() == numbers + "more\n")
    # To all of its processes, as for Ctrl-C.
    machine.run("systemctl", "kill", "--signal=INT", "server")
    state = ("systemctl", "show", "--value", "--property=SubState", "server", "client")
    # A service with another status would be "failed".
    eventually(lambda: machine.run(*state).split() == ["exited"] * 2)


def strip(machine: Machine, but: list[str]) -> None:
    """Remove what a bare Debian does not have, except systemd, `but`, and their dependencies."""
    query = r"dpkg-query --show --showformat '${Priority} ${Package}\n'"
    all_but_required = rf"{query} | sed -n '/^required /!s/.* //p'"
    machine.run("sh", "-ec", f"{all_but_required} | xargs apt-mark -qq auto")
    machine.run("apt-mark", "-qq", "manual", "apt", "systemd", "systemd-sysv", *but)
    machine.run("apt-get", "-qq", "--yes", "autoremove")


def launch(machine: Machine, name: str, commands: str) -> Path:
    """Run commands exactly, as in a terminal of their own; return the file with their output."""
    # systemd creates the file a moment later.
    machine.run("touch", f"/{name}")
    machine.run(
        "systemd-run",
        f"--unit={name}",
        "--remain-after-exit",
        f"--property=StandardOutput=file:/{name}",
        "--working-directory=/root/tailsrv",
        "bash",
        "-euc",
        commands,
    )
    return machine.files / name
