"""The command lines: their parsers, and nothing that runs them, so that a build can make manual pages of them."""

import argparse
from contextlib import suppress
from ipaddress import IPv6Network, ip_network
from typing import Any

from tailsrv import __version__
from tailsrv.config import DEFAULT_GRACE, Network
from tailsrv.processors import count_processors

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
    parser.add_argument("path", metavar="FILE", help="the file to serve; it may come into being later")
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
    return int(text.lstrip("0")[:20] or "0")  # enough to be too much


def port(text: str) -> int | None:
    """Return the port `text`, None if it is empty: a service file can hand on a setting that is not there."""
    return whole(text) if text else None


def network(text: str) -> Network:
    """Return the network `text`, as RFC 4632 and RFC 4291 write it: `10.0.0.0/8`, `2001:db8::/32`, or one address."""
    try:
        found = ip_network(text)
        if isinstance(found, IPv6Network) and (found.network_address.scope_id or found.network_address.ipv4_mapped):
            raise argparse.ArgumentTypeError(f"not a network: {text!r}; leave out %scope, and ::ffff: before an IPv4 address")
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
    which.add_argument("-p", "--port", type=whole, help="the server on this TCP port, at whatever address")
    which.add_argument("--pid", type=whole, help="the server whose supervisor has this pid")
    parser.add_argument("--format", choices=("text", "json", "prometheus"), default="text", help="what to print (default: text)")
    parser.add_argument("--clients", action="store_true", help="also each client: peer, slot, start, position and lag in bytes")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser
