"""The command line, the addresses, the log, and file names with unusual characters."""

import os
import re
from pathlib import Path

import psutil  # type: ignore[import-untyped]
import pytest

from support.files import append, random_bytes
from support.processes import runs
from support.server import Serve, run_tailsrv
from support.sockets import connect, expect, expect_eof
from support.waiting import eventually
from tailsrv import __version__
from tailsrv.linux.process import count_processors

DATA = random_bytes(100)

LINE = re.compile(
    r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3} tailsrv\[\d+\] "
    r"(debug|info|warning|error|critical): [ -~]+"
)

USAGE_ERRORS = [
    ([], "the following arguments are required: FILE"),
    (["file"], "the following arguments are required: -p/--port"),
    (["-p", "0"], "the following arguments are required: FILE"),
    (["-p", "0", "one", "two"], "unrecognized arguments: two"),
    (["-p", "0", "--unknown", "file"], "unrecognized arguments: --unknown"),
    (["-p", "0", "--gra=1", "file"], "unrecognized arguments: --gra=1"),
    (["-p", "0", ""], "argument FILE: must not be empty"),
    (["-p", "abc", "file"], "argument -p/--port: not a whole number of 0 or more: 'abc'"),
    (["-p", "", "file"], "the following arguments are required: -p/--port"),
    (["-p", "-1", "file"], "argument -p/--port: "),
    (["-p", "1_0", "file"], "argument -p/--port: not a whole number of 0 or more: '1_0'"),
    (["-p", "٣", "file"], "argument -p/--port: not a whole number of 0 or more: "),
    (["-p", "65536", "file"], "argument -p/--port: must be from 0 to 65535, not 65536"),
    (["-p", "9" * 5000, "file"], "argument -p/--port: must be from 0 to 65535, not 9999"),
    (["-p", "0", "-w", "0", "file"], "argument -w/--workers: must be from 1 to 1024, not 0"),
    (["-p", "0", "-w", "1025", "file"], "argument -w/--workers: must be from 1 to 1024, not 1025"),
    (
        ["-p", "0", "-w", "abc", "file"],
        "argument -w/--workers: expected a number from 1 to 1024, or \"auto\": 'abc'",
    ),
    (
        ["-p", "0", "-w", "1_0", "file"],
        "argument -w/--workers: expected a number from 1 to 1024, or \"auto\": '1_0'",
    ),
    (
        ["-p", "0", "-w=-1", "file"],
        "argument -w/--workers: expected a number from 1 to 1024, or \"auto\": '-1'",
    ),
    (
        ["-p", "0", "--max-clients", "many", "file"],
        "argument --max-clients: not a whole number of 0 or more: 'many'",
    ),
    (["-p", "0", "--max-clients", "9" * 20, "file"], "argument --max-clients: must be from 0 to "),
    (["-p", "0", "--allow", "", "file"], "argument --allow: not a network: "),
    (
        ["-p", "0", "--allow", "10.0.0.0/33", "file"],
        "argument --allow: not a network: '10.0.0.0/33'",
    ),
    (
        ["-p", "0", "--allow", "10.0.0.1/8", "file"],
        "argument --allow: not a network: 10.0.0.1/8 has host bits set; did you mean 10.0.0.0/8?",
    ),
    (
        ["-p", "0", "--allow", "::ffff:10.0.0.1", "file"],
        "argument --allow: not a network: '::ffff:10.0.0.1'; leave out %scope, and",
    ),
    (
        ["-p", "0", "--allow", "fe80::1%lo", "file"],
        "argument --allow: not a network: 'fe80::1%lo'; leave out %scope",
    ),
    (
        ["-p", "0", "--allow", "example.com", "file"],
        "argument --allow: not a network: 'example.com'",
    ),
    (
        ["-p", "0", "--follow-name", "--linger-after-file-is-gone", "file"],
        "argument --follow-name: not allowed with argument --linger-after-file-is-gone",
    ),
    (["-p", "0", "--grace", "abc", "file"], "argument --grace: not a number of seconds: 'abc'"),
    (["-p", "0", "--grace=-1", "file"], "argument --grace: must be 0 or more seconds, not -1.0"),
    (["-p", "0", "--grace", "nan", "file"], "argument --grace: must be 0 or more seconds, not nan"),
    (["-p", "0", "--grace", "inf", "file"], "argument --grace: must be 0 or more seconds, not inf"),
    (
        ["-p", "0", "--header-timeout", "abc", "file"],
        "argument --header-timeout: not a number of seconds: 'abc'",
    ),
    (
        ["-p", "0", "--header-timeout=-1", "file"],
        "argument --header-timeout: must be 0 or more seconds, not -1.0",
    ),
    (
        ["-p", "0", "-v", "-q", "file"],
        "argument -q/--quiet: not allowed with argument -v/--verbose",
    ),
    (["-p", "0", "--bind"], "argument --bind: expected one argument"),
]


@pytest.mark.sample(3)
@pytest.mark.parametrize(("arguments", "reason"), USAGE_ERRORS)
def test_usage_errors(arguments: list[str], reason: str) -> None:
    """An invalid command line causes status 2, the usage, and one line with the reason."""
    ended = run_tailsrv(*arguments)
    assert (ended.returncode, ended.stdout) == (2, "")
    *usage, line = ended.stderr.splitlines()
    assert usage[0].startswith("usage: tailsrv [-h] ")
    assert line.startswith(f"tailsrv: error: {reason}")


def test_version() -> None:
    """--version prints the program's name and version, and nothing else."""
    ended = run_tailsrv("--version")
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, f"tailsrv {__version__}\n", "")


def test_help() -> None:
    """--help describes every option, the signals and each exit status."""
    ended = run_tailsrv("--help")
    assert (ended.returncode, ended.stderr) == (0, "")
    words = " ".join(ended.stdout.split())
    options = [
        "-p",
        "--port",
        "-w",
        "--workers",
        "--bind",
        "--grace",
        "--header-timeout",
        "--linger-after-file-is-gone",
        "-v",
        "-q",
        "--version",
    ]
    for option in options:
        assert f"{option} " in words or f"{option}," in words
    assert "default: 5" in words
    assert (
        "0 ended as asked or the file is gone, 1 cannot serve, 2 usage, 3 workers cannot start"
        in words
    )
    assert "TERM, INT or PWR drain and end, QUIT ends at once" in words


# Addresses


def test_bind(serve: Serve, path: Path) -> None:
    """With --bind, which may be repeated, the server listens on those addresses with one port."""
    path.write_bytes(DATA)
    server = serve(
        path, "--bind", "127.0.0.1", "--bind", "::1", "--bind", "127.0.0.1", "--bind", "[::1]"
    )
    assert f" endpoints=127.0.0.1:{server.port},[::1]:{server.port}" in server.logged("listening")
    expect(server.connect(b"0\n", "127.0.0.1"), DATA)
    expect(server.connect(b"0\n", "::1"), DATA)
    with pytest.raises(ConnectionRefusedError):
        connect(server.port, host="127.0.0.2")


@pytest.mark.parametrize(("more", "served"), [((), False), (("--bind", "0.0.0.0"), True)])
def test_two_colons_are_ipv6_only(
    serve: Serve, path: Path, more: tuple[str, ...], served: bool
) -> None:
    """--bind :: excludes IPv4, as --help says, unless an IPv4 address is given as well."""
    path.write_bytes(DATA)
    server = serve(path, "--bind", "::", *more)
    expect(server.connect(b"0\n", "::1"), DATA)
    if served:
        expect(server.connect(b"0\n", "127.0.0.1"), DATA)
    else:
        with pytest.raises(ConnectionRefusedError):
            connect(server.port, host="127.0.0.1")
    assert ":: is IPv6 only" in " ".join(run_tailsrv("--help").stdout.split())


def test_default_is_every_address(serve: Serve, path: Path) -> None:
    """Without --bind, the server listens on all addresses of IPv4 and IPv6."""
    path.write_bytes(DATA)
    server = serve(path)
    for host in ("127.0.0.1", "127.0.0.2", "::1"):
        expect(server.connect(b"0\n", host), DATA)


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("192.0.2.1", "cannot listen on 192.0.2.1:0: Cannot assign requested address"),
        ("2001:db8::1", "cannot listen on [2001:db8::1]:0: Cannot assign requested address"),
        ("no..name", "no such address: no..name"),
        ("", "no such address: "),
    ],
)
def test_bad_address(path: Path, address: str, reason: str) -> None:
    """An invalid address, or one of another host, causes status 1 and one line."""
    path.write_bytes(DATA)
    ended = run_tailsrv("-p", "0", "--bind", address, path)
    (line,) = ended.stderr.splitlines()
    assert f"critical: cannot serve: path={path} reason=" in line
    assert reason in line
    assert ended.returncode == 1


def test_privileged_port(path: Path) -> None:
    """A privileged port without the privilege causes status 1 and one line with a hint."""
    # A user namespace keeps the host's network, in which its root has no privileges.
    no_right = ("unshare", "--user")
    if not runs(*no_right, "true"):
        pytest.skip("cannot create a user namespace")
    if int(Path("/proc/sys/net/ipv4/ip_unprivileged_port_start").read_text()) <= 1:
        pytest.skip("no port is privileged here")
    path.write_bytes(DATA)
    path.chmod(0o644)
    ended = run_tailsrv("-p", "1", "--bind", "127.0.0.1", path, wrapper=no_right)
    (line,) = ended.stderr.splitlines()
    assert (
        "reason='cannot listen on 127.0.0.1:1: Permission denied; choose a port above 1023" in line
    )
    assert ended.returncode == 1


# Workers


def test_workers_default(serve: Serve, path: Path) -> None:
    """Without -w there is one worker."""
    path.touch()
    server = serve(path)
    assert " workers=1 " in server.logged("listening")
    assert len(server.workers(1)) == 1


def test_workers_auto(serve: Serve, path: Path) -> None:
    """-w auto starts one worker for each processor that the process may use."""
    path.touch()
    server = serve(path, "-w", "auto")
    assert len(server.workers(count_processors())) == count_processors()


def test_workers_auto_on_one_processor(serve: Serve, path: Path) -> None:
    """-w auto counts the processors that the process may use, not all that exist."""
    path.touch()
    server = serve(
        path, "-w", "auto", wrapper=("taskset", "--cpu-list", str(min(os.sched_getaffinity(0))))
    )
    assert " workers=1 " in server.logged("listening")
    assert len(server.workers(1)) == 1


# The log


def test_default_log(serve: Serve, path: Path) -> None:
    """By default the log has the events of the server and not those of clients."""
    path.write_bytes(DATA)
    server = serve(path)
    client = server.connect(b"0\n")
    expect(client, DATA)
    server.process.terminate()
    expect_eof(client)
    server.wait()
    events = [
        line.split(": ")[0].split()[-1] + " " + line.split(": ")[1]
        for line in server.log.splitlines()
    ]
    assert events == [
        "info listening",
        "info serving",
        "info worker ready",
        "info draining",
        "info ended",
    ]


def test_verbose_log(serve: Serve, path: Path) -> None:
    """With -v, each client's start and end are logged as well."""
    path.write_bytes(DATA)
    server = serve(path, "-v")
    with connect(server.port, b"5\n") as client:
        peer = f"peer=127.0.0.1:{client.getsockname()[1]}"
        expect(client, DATA[5:])
        assert len(server.lines("debug: client streams: slot=0", peer, "offset=5")) == 1
    append(path, DATA)
    append(path, DATA)
    server.logged("debug: client left: slot=0", peer)


def test_quiet_log(serve: Serve, path: Path) -> None:
    """With -q, only warnings and errors are logged."""
    path.write_bytes(DATA)
    server = serve(path, "-q")

    def listening() -> list[int]:
        found = [
            entry.laddr.port
            for entry in psutil.Process(server.pid).net_connections("tcp")
            if entry.status == psutil.CONN_LISTEN
        ]
        return [int(port) for port in found]

    port = eventually(listening)[0]
    with connect(port, b"0\n") as client, connect(port, b"rubbish\n") as bad:
        expect(client, DATA)
        expect_eof(bad)
        server.process.terminate()
        expect_eof(client)
    server.wait()
    (line,) = server.log.splitlines()
    assert "warning: client refused: slot=0" in line


# Names


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "name",
    [
        b"with space",
        b"with\nnewline",
        b"not\xffutf-8",
        "größe".encode(),
        b"esc\x1b[31m",
        b"'quoted\" = %s%d {}",
        b"-dash",
    ],
)
def test_odd_names(serve: Serve, tmp_path: Path, name: bytes) -> None:
    """A file of any name is served, and each log line and title is one printable line."""
    path = os.fsencode(tmp_path) + b"/" + name
    Path(os.fsdecode(path)).write_bytes(DATA)
    server = serve(path)
    client = server.connect(b"0\n")
    expect(client, DATA)
    shown = server.title()
    assert shown.startswith(f"tailsrv: supervisor *:{server.port} ")
    assert shown.endswith("]")
    assert shown.isprintable()
    Path(os.fsdecode(path)).unlink()
    expect_eof(client)
    server.wait()
    assert server.lines("file is gone")
    plain = [line.replace("größe", "groesse") for line in server.log.splitlines()]
    assert [line for line in plain if not LINE.fullmatch(line)] == []


def test_relative_name_and_two_dashes(serve: Serve, path: Path) -> None:
    """A relative path starts at the working directory, and `--` may precede it."""
    path.write_bytes(DATA)
    server = serve(os.path.relpath(path), "--")
    expect(server.connect(b"0\n"), DATA)
    path.unlink()
    server.wait()
