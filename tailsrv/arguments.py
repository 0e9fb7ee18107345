"""The command-line parsers of all four commands."""

import argparse
from contextlib import suppress
from enum import IntEnum
from ipaddress import IPv6Network, ip_network
from math import isfinite
from typing import Any

from tailsrv import __version__
from tailsrv.config import DEFAULT_GRACE, DEFAULT_ORPHAN_TIMEOUT, MAX_WORKERS, Network
from tailsrv.formatting import parse_digits
from tailsrv.linux.process import count_processors

TSCAT_EPILOG = """\
tscat runs until it is stopped. After a lost connection it reconnects and resumes at the exact byte.
OFFSET is N (start at byte N), -N (start N bytes before the end) or -0 (only new data).
Several HOST:PORT are replicas of the same file. All addresses of all names are tried in turn.
An IPv6 address needs brackets: [::1]:4321.
If the server is older than tailsrv 2.0, tscat cannot resume with -N or -0, and says so.

examples: the whole file, then everything appended:  tscat logserver:4321
the last 1000 bytes, starting with a whole line:  tscat --lines logserver:4321 -1000
only new data, from whichever relay can be reached:  tscat relay1:4321 relay2:4321 -0
the present content, then stop:  tscat --no-follow [::1]:4321 > copy

exit status: 0 interrupted, standard output was closed, or stopped by an option
1 no connection, standard output cannot be written, or the server is too old for what is asked
2 wrong command line
3 the server has a different file now, or the next bytes no longer exist
"""

TSSYNC_EPILOG = """\
FILE always holds the beginning of the remote file. tssync can be killed and restarted at any time.
At the start and after each lost connection it compares the last 4 KiB of FILE with the remote file.
If the disk is full, it waits for free space.
Several HOST:PORT are replicas of the same file. All addresses of all names are tried in turn.
An IPv6 address needs brackets: [::1]:4321.

examples: keep a copy:  tssync logserver:4321 app.log
lose at most the last second in a power cut:  tssync --fsync 1 logserver:4321 app.log
start a new copy after a rotation:  tssync --on-mismatch=restart logserver:4321 app.log

exit status: 0 interrupted, or stopped by an option
1 no connection, or FILE cannot be written
2 wrong command line
3 FILE is not the beginning of the remote file, or the bytes that follow it no longer exist
"""

TAILSRV_EPILOG = """\
A client sends one line that says where to start: N (byte N), -N (the last N bytes), -0 (the end).
It receives the log from there on, and then every byte that is appended:  echo 0 | nc HOST PORT
The log is FILE; with --follow-name, all files that had its name, one after another. Rotate by
renaming, not with copytruncate, and do not compress: deleted files cannot be served.

signals: TERM, INT or PWR drain and end, QUIT ends at once, HUP upgrades to the installed version
(HUP drains and ends instead if the terminal has been closed, unless tailsrv runs under nohup)
exit status: 0 ended as asked or the file is gone, 1 cannot serve, 2 usage, 3 workers cannot start
"""


class Parser(argparse.ArgumentParser):
    """A parser that ignores errors while it prints its help, as later versions of argparse do."""

    def _print_message(self, message: str, file: Any = None) -> None:
        # argparse of Python 3.11.2, the version in Debian 12, does not catch the error.
        with suppress(OSError):
            super()._print_message(message, file)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command `tailsrv`."""
    parser = Parser(
        prog="tailsrv",
        description="Serve one append-only file to any number of TCP clients: tail -f as a server.",
        epilog=TAILSRV_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("path", metavar="FILE", help="the file to serve; it may be created later")
    parser.add_argument(
        "-p", "--port", type=port,
        help="TCP port to listen on; 0: the kernel chooses one."
        " Required, unless the service manager passes the listening sockets",
    )  # fmt: skip
    parser.add_argument(
        "-w", "--workers", type=workers, default=1, metavar="N|auto",
        help="number of worker processes (default: 1);"
        " auto: one for each processor that tailsrv may use",
    )  # fmt: skip
    parser.add_argument(
        "--bind", action="append", default=[], metavar="ADDR",
        help="address or name to listen on; may be repeated"
        " (default: all addresses, IPv4 and IPv6); :: is IPv6 only",
    )  # fmt: skip
    parser.add_argument(
        "--grace", type=seconds, default=DEFAULT_GRACE, metavar="SECONDS",
        help="how long clients have to read the rest of the log when the server ends"
        " (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--orphan-timeout", type=seconds, default=DEFAULT_ORPHAN_TIMEOUT, metavar="SECONDS",
        help="how long workers serve on when the supervisor has been killed, until another tailsrv"
        " for the same file and port takes over from them; 0: they end at once"
        " (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--header-timeout", type=seconds, default=0.0, metavar="SECONDS",
        help="close connections that have not sent their line within this time"
        " (default: 0, never)",
    )  # fmt: skip
    _add_endings(parser)
    _add_limits(parser)
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("-v", "--verbose", action="store_true", help="also log each connection")
    volume.add_argument("-q", "--quiet", action="store_true", help="log only warnings and errors")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


def _add_endings(parser: argparse.ArgumentParser) -> None:
    """Add the options for a file that is deleted, moved away or replaced."""
    parser.add_argument(
        "--linger-after-file-is-gone", action="store_true",
        help="when the file is deleted, moved away or replaced, keep serving it instead of ending",
    )  # fmt: skip
    parser.add_argument(
        "--follow-name", action="store_true",
        help="when the file is moved away, replaced or truncated, continue every stream with the"
        " next file of that name, as tail -F does; offsets count across all files",
    )  # fmt: skip
    parser.add_argument(
        "--state-file", metavar="STATE",
        help="with --follow-name: keep in this file where each file of the log begins, so that"
        " offsets stay the same when the server is started again (default: a file in"
        " $STATE_DIRECTORY, which systemd sets; otherwise none; empty: none)",
    )  # fmt: skip


def _add_limits(parser: argparse.ArgumentParser) -> None:
    """Add the options that limit how many clients may connect, and from where."""
    parser.add_argument(
        "--max-clients", type=whole, default=0, metavar="N",
        help="most connections to serve at a time; further ones wait until one ends"
        " (default: 0, no limit)",
    )  # fmt: skip
    parser.add_argument(
        "--allow", action="append", default=[], type=network, metavar="CIDR",
        help="network that clients may connect from; may be repeated;"
        " connections from elsewhere are closed at once (default: all networks)",
    )  # fmt: skip


def whole(text: str) -> int:
    """Parse a whole number of 0 or more. Raises ArgumentTypeError."""
    if (number := parse_digits(text)) is None:
        raise argparse.ArgumentTypeError(f"not a whole number of 0 or more: {text!r}")
    return number


def port(text: str) -> int | None:
    """Parse a port; return None if `text` is empty.

    A service file passes `--port=` where its setting PORT is empty. Raises ArgumentTypeError.
    """
    return whole(text) if text else None


def network(text: str) -> Network:
    """Parse a network or a single address, such as `10.0.0.0/8` or `2001:db8::/32`.

    The notation is that of RFC 4632 and RFC 4291. Raises ArgumentTypeError.
    """
    try:
        found = ip_network(text)
        if isinstance(found, IPv6Network) and (
            found.network_address.scope_id or found.network_address.ipv4_mapped
        ):
            raise argparse.ArgumentTypeError(
                f"not a network: {text!r}; leave out %scope, and ::ffff: before an IPv4 address"
            )
        return found
    except ValueError as error:
        try:
            meant = f"; did you mean {ip_network(text, strict=False)}?"
        except ValueError:
            meant = ""
        raise argparse.ArgumentTypeError(f"not a network: {error}{meant}") from None


def workers(text: str) -> int:
    """Parse the value of `-w`: a number, or `auto` for the number of processors.

    Raises ArgumentTypeError if it is neither. Config checks the range.
    """
    if text == "auto":
        return count_processors()
    try:
        return whole(text)
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(
            f'expected a number from 1 to {MAX_WORKERS}, or "auto": {text!r}'
        ) from None


def seconds(text: str) -> float:
    """Parse a number of seconds. Raises ArgumentTypeError. Config checks the range."""
    try:
        return float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"not a number of seconds: {text!r}") from None


HEALTH_EPILOG = """\
exit status, as for monitoring plugins: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN
WARNING: a worker is not ready, or a worker died and was replaced in the last minute.
WARNING: more than 90 % of the descriptors of a process, or of an accept queue, are in use.
WARNING: the server has as many clients as it may have, and connections are waiting.
CRITICAL: there is no supervisor or no worker, or one of them is stopped or does not answer.
CRITICAL: the file is gone while it is still served, or it cannot be read.
CRITICAL: the next file with this path cannot be opened.
UNKNOWN: the server belongs to another user, or its answer is not valid in this version.
UNKNOWN: the command line is wrong.

examples: check the server on port 4321:  tailsrv-health -p 4321
check all servers, for Prometheus:  tailsrv-health --format prometheus
"""


def make_health_parser() -> argparse.ArgumentParser:
    """Return the parser of the command `tailsrv-health`."""
    parser = Parser(
        prog="tailsrv-health",
        description="Check the health of tailsrv: its processes, listeners, file and clients."
        " Without -p and --pid, check all servers of this user (root: of all users).",
        epilog=HEALTH_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "-p", "--port", type=whole,
        help="check the servers that listen on this TCP port, at any address",
    )  # fmt: skip
    which.add_argument(
        "--pid",
        type=whole,
        help="check the server whose supervisor, or orphaned worker, has this process ID",
    )
    parser.add_argument(
        "--format",
        choices=("text", "json", "prometheus"),
        default="text",
        help="output format (default: text)",
    )
    parser.add_argument(
        "--clients",
        action="store_true",
        help="list each client: address and port, slot, and start, position and lag in bytes",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


class ClientExitStatus(IntEnum):
    """The exit statuses of `tscat` and `tssync`; part of their public interface."""

    # Interrupted, standard output was closed, or stopped by an option.
    DONE = 0
    # No connection, the output cannot be written, or the server is too old for what is asked.
    FAILED = 1
    # The command line is wrong.
    USAGE = 2
    # The remote file does not begin with the bytes that were already received or copied, or the
    # bytes that follow them no longer exist.
    OTHER_FILE = 3


def make_tscat_parser() -> argparse.ArgumentParser:
    """Return the parser of the command `tscat`."""
    parser = _make_client_parser(
        "tscat",
        "Copy a file that tailsrv serves to standard output, and then everything appended to it.",
        TSCAT_EPILOG,
    )
    parser.add_argument(
        "offset", metavar="OFFSET", nargs="?", help="where to start: N, -N or -0 (default: 0)"
    )
    which = parser.add_mutually_exclusive_group()
    # This is the default. It is accepted because users of tail(1) write it.
    which.add_argument("--follow", action="store_true", help=argparse.SUPPRESS)
    _add_no_follow(which)
    parser.add_argument(
        "--lines",
        action="store_true",
        help="with OFFSET -N or -0: start at the next beginning of a line",
    )
    _add_client_endings(parser)
    return parser


def make_tssync_parser() -> argparse.ArgumentParser:
    """Return the parser of the command `tssync`."""
    parser = _make_client_parser(
        "tssync", "Keep FILE equal to a file that tailsrv serves.", TSSYNC_EPILOG
    )
    parser.add_argument("path", metavar="FILE", help="the copy; it is created if it does not exist")
    parser.add_argument(
        "--on-mismatch", choices=("stop", "restart"), default="stop",
        help="if FILE is not the beginning of the remote file: stop with exit status 3 (default),"
        " or rename FILE to FILE.1, FILE.2, ... and start a new copy",
    )  # fmt: skip
    parser.add_argument(
        "--fsync",
        type=duration,
        metavar="SECONDS",
        help="write received data to the disk (fdatasync) within this many seconds, and at the end"
        " (default: when the kernel does it)",
    )
    _add_no_follow(parser)
    _add_client_endings(parser)
    return parser


def _make_client_parser(prog: str, description: str, epilog: str) -> argparse.ArgumentParser:
    """Return a parser with the arguments that `tscat` and `tssync` share and that come first."""
    parser = Parser(
        prog=prog,
        description=description,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "servers",
        metavar="HOST:PORT",
        nargs="+",
        help="server of the file; several: replicas of the same file, tried in turn",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


def _add_no_follow(parser: argparse._ActionsContainer) -> None:
    """Add the option that makes `tscat` or `tssync` stop at the end of the file."""
    parser.add_argument(
        "--no-follow",
        action="store_true",
        help="copy what there is now, then stop; exit status 1 if the server is older than"
        " tailsrv 2.0",
    )


def _add_client_endings(parser: argparse.ArgumentParser) -> None:
    """Add the options that make `tscat` or `tssync` stop by itself."""
    parser.add_argument("--once", action="store_true", help="stop when the first connection ends")
    parser.add_argument(
        "--until-idle",
        type=duration,
        metavar="SECONDS",
        help="stop after this many seconds without new data;"
        " exit status 1 if no server with the data can be reached",
    )


def duration(text: str) -> float:
    """Parse a number of seconds, 0 or more. Raises ArgumentTypeError."""
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not (isfinite(found) and found >= 0):
        raise argparse.ArgumentTypeError(
            f"expected a number of seconds, 0 or more, without a unit, not {text!r}"
        )
    return found


def split_offset(servers: list[str]) -> tuple[list[str], str]:
    """Split tscat's positional arguments into the servers and the offset, "0" if none is given.

    The last argument is the offset if it is an integer. A server always contains `:PORT`.
    """
    if parse_digits(servers[-1].lstrip("+-")) is not None:
        return servers[:-1], servers[-1]
    return servers, "0"
