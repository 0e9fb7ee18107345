"""The command lines of the clients `tscat` and `tssync`: their parsers, and nothing that runs them."""

import argparse
import re
from enum import IntEnum
from math import isfinite

from tailsrv import __version__
from tailsrv.arguments import Parser


class ExitStatus(IntEnum):
    """How `tscat` and `tssync` end; part of the interface."""

    DONE = 0  # interrupted, nobody reads any more, or ended as asked
    FAILED = 1  # no connection, no room for the output, ...
    USAGE = 2  # the command line is wrong
    OTHER_FILE = 3  # the remote file is not the one that we have the beginning of


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


def make_tscat_parser() -> argparse.ArgumentParser:
    """Return the parser of the command `tscat`."""
    parser = _make_parser("tscat", "Copy a file that tailsrv serves to standard output, and what is appended to it.", TSCAT_EPILOG)
    parser.add_argument("offset", metavar="OFFSET", nargs="?", help="where to start: N, -N or -0 (default: 0)")
    parser.add_argument("--follow", action="store_true", help="come back after a lost connection; the default")
    parser.add_argument("--lines", action="store_true", help="begin an offset from the end at the next whole line")
    _add_endings(parser)
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
        "--fsync", type=seconds, metavar="SECONDS", help="have the disk keep what came, this often (default: as the kernel does)"
    )
    _add_endings(parser)
    return parser


def _make_parser(prog: str, description: str, epilog: str) -> argparse.ArgumentParser:
    parser = Parser(
        prog=prog, description=description, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("servers", metavar="HOST:PORT", nargs="+", help="where the file is served; several: replicas of the same file")
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    return parser


def _add_endings(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--once", action="store_true", help="end with the first connection")
    parser.add_argument(
        "--until-idle", type=seconds, metavar="SECONDS", help="end after so long without a byte; status 1 if no server is there"
    )


def seconds(text: str) -> float:
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
