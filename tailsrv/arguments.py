"""The command-line parsers of all four commands.

Nothing here runs a command, so that the build (setup.py) can import the parsers to generate the
manual pages and the shell completions from them.
"""

import argparse
import re
from contextlib import suppress
from enum import IntEnum
from ipaddress import IPv6Network, ip_network
from math import isfinite
from typing import Any

from tailsrv import __version__
from tailsrv.config import DEFAULT_GRACE, MAX_WORKERS, Network
from tailsrv.linux.process import count_processors

TSCAT_EPILOG = """\
It follows for ever: after a lost connection it comes back at the exact byte.
OFFSET is N (from byte N), -N (the last N bytes) or -0 (only what is new).
Several HOST:PORT serve the same file, and so do all addresses of a name: they are tried in turn. IPv6: [::1]:4321.
From -N and -0 on, it comes back by the last 4 KiB that it had: they must be there exactly once.

examples: the file from its start, and what is appended:  tscat logserver:4321
the last 1000 bytes, from a whole line on:  tscat --lines logserver:4321 -1000
only what is new, from whichever relay is there:  tscat relay1:4321 relay2:4321 -0
all there is, then end:  tscat --until-idle 2 [::1]:4321 > copy

exit status: 0 interrupted, standard output closed, or ended as --once and --until-idle say, 1 no connection or place lost, \
2 usage, 3 the file is another one
"""

TSSYNC_EPILOG = """\
FILE is always a beginning of the remote file: it can be stopped and killed at any time, and started again.
It first compares FILE's last 4 KiB with the remote file, after each lost connection, too. A full disk is waited for.
Several HOST:PORT serve the same file, and so do all addresses of a name: they are tried in turn. IPv6: [::1]:4321.

examples: keep a copy:  tssync logserver:4321 app.log
one that survives a power cut, but for the last second:  tssync --fsync 1 logserver:4321 app.log
begin again after a rotation:  tssync --on-mismatch=restart logserver:4321 app.log

exit status: 0 interrupted, or ended as --once and --until-idle say, 1 no connection, or FILE cannot be written, 2 usage, \
3 FILE is no beginning of the remote file
"""


EPILOG = """\
A client sends one line that says where to start: N (byte N), -N (the last N bytes), -0 (the end).
It receives the file from there on, and then every byte that is appended:  echo 0 | nc HOST PORT

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
        epilog=EPILOG,
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
        help="how long clients have to read the rest of the file when the server ends"
        " or the file is rotated (default: %(default)g)",
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
        help="when the file is deleted, moved away or replaced, serve the next file of that name,"
        " as tail -F does; the streams of the old file end, and its clients must reconnect",
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
    """Parse a whole number of 0 or more.

    int() alone would also accept `1_000` and digits that are not ASCII. Numbers of more than 20
    digits are cut to 20, which is still beyond any limit: int() refuses strings of thousands of
    digits. Raises ArgumentTypeError.
    """
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"not a whole number of 0 or more: {text!r}")
    return int(text.lstrip("0")[:20] or "0")


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
exit status, as monitoring plugins have it: 0 OK, 1 WARNING, 2 CRITICAL, 3 UNKNOWN (also for a wrong command line)
WARNING: fewer workers than configured, descriptors or an accept queue over 90 %, a worker restarted in the last minute
CRITICAL: no supervisor, no worker, a worker that is stopped or hangs, the file is gone while it is served on,
or cannot be read, or the next file of that name cannot be opened
"""


def make_health_parser() -> argparse.ArgumentParser:
    """Return the parser of the command `tailsrv-health`."""
    parser = Parser(
        prog="tailsrv-health",
        description="Say whether tailsrv is well: processes, listeners, file and clients. Without -p and --pid: all servers of this user.",
        epilog=HEALTH_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "-p", "--port", type=whole, help="the server on this TCP port, at whatever address"
    )
    which.add_argument("--pid", type=whole, help="the server whose supervisor has this pid")
    parser.add_argument(
        "--format",
        choices=("text", "json", "prometheus"),
        default="text",
        help="what to print (default: text)",
    )
    parser.add_argument(
        "--clients",
        action="store_true",
        help="also each client: peer, slot, start, position and lag in bytes",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


class ClientExitStatus(IntEnum):
    """How `tscat` and `tssync` end; part of the interface."""

    # interrupted, nobody reads any more, or ended as asked
    DONE = 0
    # no connection, no room for the output, ...
    FAILED = 1
    # the command line is wrong
    USAGE = 2
    # the remote file is not the one that we have the beginning of
    OTHER_FILE = 3


def make_tscat_parser() -> argparse.ArgumentParser:
    """Return the parser of the command `tscat`."""
    parser = _make_parser(
        "tscat",
        "Copy a file that tailsrv serves to standard output, and what is appended to it.",
        TSCAT_EPILOG,
    )
    parser.add_argument(
        "offset", metavar="OFFSET", nargs="?", help="where to start: N, -N or -0 (default: 0)"
    )
    parser.add_argument(
        "--follow", action="store_true", help="come back after a lost connection; the default"
    )
    parser.add_argument(
        "--lines", action="store_true", help="begin an offset from the end at the next whole line"
    )
    _add_client_endings(parser)
    return parser


def make_tssync_parser() -> argparse.ArgumentParser:
    """Return the parser of the command `tssync`."""
    parser = _make_parser("tssync", "Keep FILE equal to a file that tailsrv serves.", TSSYNC_EPILOG)
    parser.add_argument("path", metavar="FILE", help="the copy; it is made if it is not there")
    parser.add_argument(
        "--on-mismatch", choices=("stop", "restart"), default="stop",
        help="if FILE is no beginning of the remote file: end with status 3 (default), or move it to FILE.1, FILE.2, ... and begin again",
    )  # fmt: skip
    parser.add_argument(
        "--fsync",
        type=duration,
        metavar="SECONDS",
        help="have the disk keep what came, this often (default: as the kernel does)",
    )
    _add_client_endings(parser)
    return parser


def _make_parser(prog: str, description: str, epilog: str) -> argparse.ArgumentParser:
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
        help="where the file is served; several: replicas of the same file",
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


def _add_client_endings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--once", action="store_true", help="end with the first connection")
    parser.add_argument(
        "--until-idle",
        type=duration,
        metavar="SECONDS",
        help="end after so long without a byte; status 1 if no server is there",
    )


def duration(text: str) -> float:
    """Return the seconds that `text` says."""
    try:
        found = float(text)
    except ValueError:
        found = -1.0
    if not (isfinite(found) and found >= 0):
        raise argparse.ArgumentTypeError(f"not a number of seconds, 0 or more: {text!r}")
    return found


def split_offset(servers: list[str]) -> tuple[list[str], str]:
    """Return what of tscat's arguments names servers, and the offset, "0" if there is none: it is the last, and has no port."""
    if re.fullmatch(r"[+-]?[0-9]+", servers[-1]):
        return servers[:-1], servers[-1]
    return servers, "0"
