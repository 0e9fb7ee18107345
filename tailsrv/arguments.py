"""The command lines of all commands: their parsers, and nothing that runs them, so that a build can make manual pages of them."""

import argparse
import re
from contextlib import suppress
from enum import IntEnum
from ipaddress import IPv6Network, ip_network
from math import isfinite
from typing import Any

from tailsrv import __version__
from tailsrv.config import DEFAULT_GRACE, Network
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
A client sends one line, where to start: N (from byte N), -N (the last N bytes), -0 (only what is new).
It gets the file from there, and then every byte appended:  echo 0 | nc HOST PORT

signals: TERM, INT or PWR drain and end, QUIT ends at once, HUP upgrades to the installed version in place
(where the terminal has been closed, HUP drains and ends; under nohup it does not)
exit status: 0 ended as asked or the file is gone, 1 cannot serve, 2 usage, 3 workers cannot start
"""


class Parser(argparse.ArgumentParser):
    """A parser that ignores errors while it prints its help, as argparse does in later Pythons."""

    def _print_message(self, message: str, file: Any = None) -> None:
        # Python 3.11.2, which is Debian 12's, lets the error through.
        with suppress(OSError):
            super()._print_message(message, file)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command `tailsrv`."""
    parser = Parser(
        prog="tailsrv",
        description="Serve one append-only file to any number of TCP clients: like tail -f, as a server.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument(
        "path", metavar="FILE", help="the file to serve; it may come into being later"
    )
    parser.add_argument(
        "-p", "--port", type=port,
        help="TCP port to listen on; 0: the kernel chooses one; left out or empty: the service manager passes the sockets",
    )  # fmt: skip
    parser.add_argument(
        "-w", "--workers", type=workers, default=1, metavar="N|auto",
        help="worker processes (default: 1); auto: one for each processor that this process may use",
    )  # fmt: skip
    parser.add_argument(
        "--bind", action="append", default=[], metavar="ADDR",
        help="address or name to listen on, may be repeated (default: all addresses, IPv4 and IPv6);"
        " :: is IPv6 only",
    )  # fmt: skip
    parser.add_argument(
        "--grace", type=seconds, default=DEFAULT_GRACE, metavar="SECONDS",
        help="how long clients have to take what is in the file when the server ends or the file is rotated"
        " (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--header-timeout", type=seconds, default=0.0, metavar="SECONDS",
        help="end connections that have not sent their line by then (default: 0, never)",
    )  # fmt: skip
    _add_endings(parser)
    _add_limits(parser)
    volume = parser.add_mutually_exclusive_group()
    volume.add_argument("-v", "--verbose", action="store_true", help="log each connection, too")
    volume.add_argument("-q", "--quiet", action="store_true", help="log warnings and errors only")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


def _add_endings(parser: argparse.ArgumentParser) -> None:
    """Add what becomes of the server when the file is gone."""
    parser.add_argument(
        "--linger-after-file-is-gone", action="store_true",
        help="go on serving the file when it is deleted, moved away or replaced, instead of ending",
    )  # fmt: skip
    parser.add_argument(
        "--follow-name", action="store_true",
        help="when the file is deleted, moved away or replaced, serve the next file of that name,"
        " as tail -F does; but streams of the old file end, and clients must reconnect",
    )  # fmt: skip


def _add_limits(parser: argparse.ArgumentParser) -> None:
    """Add how many clients there may be, and whose."""
    parser.add_argument(
        "--max-clients", type=whole, default=0, metavar="N",
        help="connections to serve at a time; more wait until one ends (default: 0, no limit)",
    )  # fmt: skip
    parser.add_argument(
        "--allow", action="append", default=[], type=network, metavar="CIDR",
        help="network that clients may come from, may be repeated; all others are closed at once (default: everybody may)",
    )  # fmt: skip


def whole(text: str) -> int:
    """Return the whole number `text`; int() alone would also take `1_000` and other people's digits."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"not a whole number of 0 or more: {text!r}")
    # enough to be too much
    return int(text.lstrip("0")[:20] or "0")


def port(text: str) -> int | None:
    """Return the port `text`, None if it is empty: a service file can hand on a setting that is not there."""
    return whole(text) if text else None


def network(text: str) -> Network:
    """Return the network `text`, as RFC 4632 and RFC 4291 write it: `10.0.0.0/8`, `2001:db8::/32`, or one address."""
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
    """Return the number of workers that `-w` asks for."""
    return count_processors() if text == "auto" else whole(text)


def seconds(text: str) -> float:
    """Return the seconds that `text` says."""
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
        "--pid", type=whole, help="check the server whose supervisor has this process ID"
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
