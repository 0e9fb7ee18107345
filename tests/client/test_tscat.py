"""The command `tscat`: its output, its exit statuses and its messages."""

import os
import signal
import subprocess
from pathlib import Path

import pytest

from support.commands import TSCAT, Command, closed_port, kill, restart, run_client, started
from support.cutter import Cutter
from support.fake_server import FakeServer
from support.files import append, random_bytes
from support.processes import as_root, runs
from support.server import Serve, Server
from support.sockets import can_ipv6
from support.waiting import DEADLINE
from tailsrv import __version__

DATA = random_bytes(300_000)
OTHER = random_bytes(300_000, seed=2)
LINES = b"".join(b"line %d\n" % number for number in range(1000))


def endpoint_of(server: Server) -> str:
    return f"127.0.0.1:{server.port}"


def tscat(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return run_client(*TSCAT, *arguments)


@pytest.mark.sample(1)
@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", LINES),
        ("1000", LINES[1000:]),
        ("-1000", LINES[-1000:]),
        ("-0", b""),
        ("--lines -9", b"line 999\n"),
        ("-10 --lines", b"line 999\n"),
        ("--lines -8", b""),
        ("--lines -0", b""),
        ("--lines -999999", LINES),
        (f"--lines -{len(LINES)}", LINES),
        (f"--lines -{len(LINES) - 1}", LINES[7:]),
        ("--follow 5", LINES[5:]),
    ],
)
def test_offset(serve: Serve, path: Path, arguments: str, expected: bytes) -> None:
    """The offset is allowed before or after options; --lines drops only a partial first line."""
    path.write_bytes(LINES)
    done = tscat(endpoint_of(serve(path)), *arguments.split(), "--until-idle", "0.2")
    assert (done.stdout.encode(), done.stderr, done.returncode) == (expected, "", 0)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [("", LINES), ("-1000", LINES[-1000:]), ("--lines -10", b"line 999\n"), ("999999", b"")],
)
def test_no_follow(serve: Serve, path: Path, arguments: str, expected: bytes) -> None:
    """With --no-follow, tscat prints what there is now, and ends."""
    path.write_bytes(LINES)
    done = tscat(endpoint_of(serve(path)), *arguments.split(), "--no-follow")
    assert (done.stdout.encode(), done.stderr, done.returncode) == (expected, "", 0)


@pytest.mark.parametrize(
    ("old", "arguments", "status", "message"),
    [
        (True, ["--no-follow"], 1, "the end of its log is unknown; use --until-idle\n"),
        (False, ["5"], 3, "the log starts at offset 100 now; start again with offset 0 "),
    ],
)
def test_server_without_offsets_or_bytes(
    old: bool, arguments: list[str], status: int, message: str
) -> None:
    """A server that is too old has status 1, and one that has deleted the bytes has status 3."""
    with FakeServer(LINES, 100, old=old) as server:
        done = tscat(server.endpoint, *arguments)
    assert (done.stdout, done.returncode, done.stderr.count("\n")) == ("", status, 1)
    assert message in done.stderr


def test_line_that_is_not_finished_is_left_out(serve: Serve, path: Path, tmp_path: Path) -> None:
    """With --lines and -0, the rest of a line that is already begun is left out, however late."""
    path.write_bytes(b"whole\nbegun")
    server = serve(path, "-v")
    with Command(tmp_path, *TSCAT, endpoint_of(server), "--lines", "-0") as command:
        server.logged("client streams: ")
        append(path, b" and finished\nnew\n")
        command.wrote(b"new\n")
        assert command.end(signal.SIGINT) == 0


@pytest.mark.skipif(not can_ipv6(), reason="IPv6 is not available")
def test_ipv6_literal(serve: Serve, path: Path) -> None:
    """An IPv6 address is written in brackets."""
    path.write_bytes(LINES)
    assert tscat(f"[::1]:{serve(path).port}", "--until-idle", "0.1").stdout.encode() == LINES


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize("offset", ["0", "-200000"])
def test_cuts_and_a_killed_server(serve: Serve, path: Path, tmp_path: Path, offset: str) -> None:
    """Each byte is written once despite lost connections and a server that is restarted."""
    path.write_bytes(DATA)
    start = int(offset)
    server = serve(path, "-v")
    with (
        Cutter(server.port, cuts=15, longest=60_000) as cutter,
        Command(tmp_path, *TSCAT, *cutter.endpoints(), offset) as command,
    ):
        command.wrote(DATA[start:])
        cutter.left = 15
        kill(server)
        append(path, OTHER)
        restart(serve, server, path)
        command.wrote(DATA[start:] + OTHER)
        append(path, b"end")
        command.wrote(DATA[start:] + OTHER + b"end")
        assert command.end(signal.SIGINT) == 0


def test_server_that_starts_later(serve: Serve, path: Path, tmp_path: Path) -> None:
    """A refused connection is reported in one line and retried until a server is running."""
    path.write_bytes(LINES)
    server = serve(path)
    endpoint = endpoint_of(server)
    kill(server)
    with Command(tmp_path, *TSCAT, endpoint) as command:
        command.says("refused")
        restart(serve, server, path)
        command.wrote(LINES)
        assert command.end(signal.SIGINT) == 0
        assert (
            command.errors
            == f"tscat: {endpoint}: Connection refused; retrying\ntscat: connected to {endpoint}\n"
        )


@pytest.mark.thorough
@pytest.mark.skipif(
    not (as_root and runs("unshare", "-m", "true")),
    reason="needs root, for an /etc/hosts of its own",
)
def test_each_address_of_a_name(serve: Serve, path: Path, tmp_path: Path) -> None:
    """If the first address of a name refuses the connection, the second one is tried."""
    path.write_bytes(LINES)
    hosts = tmp_path / "hosts"
    hosts.write_text("127.0.0.2 replicas\n127.0.0.3 replicas\n")
    script = 'mount --bind "$1" /etc/hosts && shift && exec "$@"'
    for address in ("127.0.0.2", "127.0.0.3"):
        endpoint = f"replicas:{serve(path, '--bind', address).port}"
        done = run_client(
            "unshare",
            "-m",
            "sh",
            "-c",
            script,
            "sh",
            hosts,
            *TSCAT,
            endpoint,
            "--until-idle",
            "0.2",
        )
        assert (done.stdout.encode(), done.stderr) == (LINES, "")


@pytest.mark.skipif(
    not (as_root and runs("unshare", "-n", "ip", "link")),
    reason="needs root, for a network of its own",
)
def test_connection_to_itself_is_refused() -> None:
    """A TCP connection of a port to itself is reported as refused."""
    ports = "/proc/sys/net/ipv4/ip_local_port_range"
    script = f'ip link set lo up && echo "40000 40000" > {ports} && exec "$@"'
    done = run_client(
        "unshare", "-n", "sh", "-c", script, "sh", *TSCAT, "--once", "127.0.0.1:40000"
    )
    assert (done.stdout, done.stderr, done.returncode) == (
        "",
        "tscat: 127.0.0.1:40000: Connection refused\n",
        1,
    )


@pytest.mark.parametrize("quiet", [True, False], ids=["quiet", "no server"])
def test_closed_pipe_ends_it(serve: Serve, path: Path, quiet: bool) -> None:
    """If the output's reader exits, the client exits at once, even without data or a server."""
    path.write_bytes(b"line\n")
    server = serve(path)
    with started(*TSCAT, endpoint_of(server), stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(5) == b"line\n"
        if not quiet:
            server.signal(signal.SIGTERM)
            assert b"closed" in process.stderr.readline()
        process.stdout.close()
        assert process.wait(DEADLINE) == 0
        assert b"Traceback" not in process.stderr.read()


def test_head_ends_it(serve: Serve, path: Path) -> None:
    """A reader that closes the pipe early is not an error."""
    path.write_bytes(DATA * 10)
    script = '"$@" | head -c 5; echo ${PIPESTATUS[0]}'
    done = subprocess.run(
        ["bash", "-c", script, "bash", *TSCAT, endpoint_of(serve(path))],
        capture_output=True,
        timeout=DEADLINE,
    )
    assert (done.stdout, done.stderr) == (DATA[:5] + b"0\n", b"")


@pytest.mark.parametrize("served", [True, False], ids=["following", "no server"])
def test_interrupt_ends_it(serve: Serve, path: Path, tmp_path: Path, served: bool) -> None:
    """SIGINT ends the client with status 0 and without a message."""
    path.write_bytes(LINES)
    endpoint = endpoint_of(serve(path)) if served else f"127.0.0.1:{closed_port()}"
    with Command(tmp_path, *TSCAT, endpoint) as command:
        command.wrote(LINES) if served else command.says("refused")
        before = command.errors
        assert command.end(signal.SIGINT) == 0
        assert command.errors == before


def test_output_that_does_not_block(serve: Serve, path: Path) -> None:
    """Data that a full non-blocking pipe does not accept yet is written later."""
    path.write_bytes(DATA * 5)
    out, into = os.pipe()
    os.set_blocking(into, False)
    with started(*TSCAT, endpoint_of(serve(path)), "--until-idle", "0.2", stdout=into) as process:
        os.close(into)
        with open(out, "rb") as reader:
            assert reader.read() == DATA * 5
        assert process.wait(DEADLINE) == 0


@pytest.mark.parametrize(
    ("redirection", "message"),
    [
        (">/dev/full", "tscat: cannot write to standard output: No space left on device\n"),
        (">&-", "tscat: standard output is closed: redirect it to a file or a pipe\n"),
        ("2>&- <&-", ""),
    ],
)
def test_odd_descriptors(serve: Serve, path: Path, redirection: str, message: str) -> None:
    """An output that cannot be written is one line; a closed stderr and stdin do no harm."""
    path.write_bytes(LINES)
    script = f'exec "$@" {redirection}'
    done = run_client(
        "sh", "-c", script, "sh", *TSCAT, endpoint_of(serve(path)), "--until-idle", "0.2"
    )
    assert (done.stderr, done.returncode) == (message, 1 if message else 0)
    assert done.stdout.encode() == (b"" if message else LINES)


@pytest.mark.parametrize(
    ("arguments", "redirection", "status"),
    [
        ("--help", ">/dev/full", 0),
        ("--help", ">&- 2>&-", 0),
        ("localhost", "2>/dev/full", 2),
        ("localhost", "2>&-", 2),
    ],
)
def test_messages_that_cannot_be_written(arguments: str, redirection: str, status: int) -> None:
    """A help text or error message that cannot be written does not change the exit status."""
    done = run_client("sh", "-c", f'exec "$@" {redirection}', "sh", *TSCAT, arguments)
    assert (done.stdout, done.stderr, done.returncode) == ("", "", status)


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["127.0.0.1:CLOSED", "--once"], 1, "127.0.0.1:CLOSED: Connection refused"),
        (["nosuch.invalid:4321"], 1, "nosuch.invalid:4321: "),
        (["a" * 64 + ":4321"], 1, ": not a host name"),
        (["localhost:99999"], 2, "port must be from 1 to 65535, not 99999"),
        (["localhost:http"], 2, "not a port: 'http' in 'localhost:http'"),
        (["localhost"], 2, "not HOST:PORT: 'localhost'"),
        (
            ["::1:4321"],
            2,
            "not HOST:PORT: '::1:4321'; write an IPv6 address in brackets: [::1]:4321",
        ),
        (["-1000"], 2, "no HOST:PORT"),
        (["localhost:1", "9" * 20], 2, "offset does not fit 64 bits"),
    ],
)
def test_error_is_one_line(arguments: list[str], status: int, message: str) -> None:
    """Each error is one line that starts with the command's name."""
    port = str(closed_port())
    done = tscat(*(argument.replace("CLOSED", port) for argument in arguments))
    assert done.returncode == status
    assert done.stderr.startswith("tscat: ")
    assert message.replace("CLOSED", port) in done.stderr
    assert done.stderr.count("\n") == 1
    assert done.stdout == ""


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["--nonsense", "a:1"],
        ["a:1", "--until-idle", "soon"],
        ["a:1", "--until-idle", "-1"],
        ["a:1", "--follow", "--no-follow"],
    ],
)
def test_usage_error(arguments: list[str]) -> None:
    """A wrong command line has status 2 and prints the usage."""
    done = tscat(*arguments)
    assert done.returncode == 2
    assert "usage: tscat" in done.stderr


def test_other_file_has_its_status(serve: Serve, path: Path, tmp_path: Path) -> None:
    """A different file after a lost connection has status 3."""
    path.write_bytes(DATA)
    server = serve(path)
    with Command(tmp_path, *TSCAT, endpoint_of(server)) as command:
        command.wrote(DATA)
        kill(server)
        path.write_bytes(DATA[1:] + DATA)
        restart(serve, server, path)
        assert command.end() == 3
        assert "tscat: the server has a different file: " in command.errors
        command.wrote(DATA)


def test_once_ends_with_the_server(serve: Serve, path: Path, tmp_path: Path) -> None:
    """With --once, the end of the connection ends the client with status 0."""
    path.write_bytes(DATA)
    server = serve(path)
    with Command(tmp_path, *TSCAT, "--once", endpoint_of(server)) as command:
        command.wrote(DATA)
        server.signal(signal.SIGTERM)
        assert command.end() == 0
        assert command.errors == ""


def test_idle_without_a_server_is_an_error() -> None:
    """With --until-idle, a missing server has status 1, because there may be unread data."""
    done = tscat(f"127.0.0.1:{closed_port()}", "--until-idle", "0.1")
    assert (done.stdout, done.returncode) == ("", 1)
    assert done.stderr.splitlines()[-1].endswith(": Connection refused")


def test_version_and_help() -> None:
    """--version and --help print to a pipe, which the reader of the help may close early."""
    assert tscat("--version").stdout == f"tscat {__version__}\n"
    assert "examples:" in tscat("--help").stdout
    done = subprocess.run(
        ["bash", "-c", '"$@" --help | true; echo ${PIPESTATUS[0]}', "bash", *TSCAT],
        capture_output=True,
        timeout=DEADLINE,
    )
    assert (done.stdout, done.stderr) == (b"0\n", b"")
