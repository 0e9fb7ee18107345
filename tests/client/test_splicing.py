"""Urgent bytes, which splice(2) does not move although poll(2) reports them as readable."""

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from support.commands import TSCAT, TSSYNC, answering, run_client
from support.fake_server import offsets_line
from support.sockets import tcp_pair, wait_readable
from tailsrv.client import follow
from tailsrv.client.splicing import move
from tailsrv.client.tssync import pipe


def send_parts(*parts: bytes, end: bool = False) -> Callable[[socket.socket], None]:
    """Return a function that sends `parts`; the last byte of every second part is urgent.

    The line of offsets comes first.
    """

    def answer(sock: socket.socket) -> None:
        sock.send(offsets_line(0, 0))
        for number, part in enumerate(parts):
            if part:
                sock.send(part, socket.MSG_OOB if number % 2 else 0)
        if end:
            sock.shutdown(socket.SHUT_WR)

    return answer


@pytest.mark.parametrize(
    "parts",
    [
        (b"abc", b"d", b"efg"),
        (b"", b"abcd", b"efg"),
        (b"", b"a", b"", b"b", b"", b"c", b"defg"),
        (b"abcdef", b"g"),
        (b"a" * 3_000_000, b"b" * 3_000_000, b"c" * 3_000_000),
    ],
    ids=["between", "first", "several", "last", "much"],
)
@pytest.mark.parametrize("options", [{"idle": 0.1}, {"once": True}], ids=["idle", "once"])
def test_urgent_bytes_are_bytes_like_others(
    parts: tuple[bytes, ...], options: dict[str, Any]
) -> None:
    """An urgent byte is delivered in its position and neither blocks nor ends the stream."""
    received = bytearray()
    with (
        answering(send_parts(*parts, end="once" in options)) as server,
        pipe() as (out, into),
        follow(server, recall=lambda _: b"", **options) as stream,
    ):
        while count := stream.splice(into, 1 << 20):
            received += os.read(out, count)
    assert received == b"".join(parts)


@pytest.mark.slow
@pytest.mark.parametrize("command", [TSCAT, TSSYNC], ids=["tscat", "tssync"])
def test_commands_pass_urgent_bytes(tmp_path: Path, command: tuple[str, ...]) -> None:
    """Both commands pass on an urgent byte and the data after it, and do not loop at it."""
    copy = tmp_path / "copy"
    with answering(send_parts(b"abc", b"d", b"efg")) as server:
        done = run_client(
            *command, server, *([copy] if command == TSSYNC else []), "--until-idle=0.3"
        )
    assert (done.returncode, done.stderr) == (0, "")
    assert (copy.read_bytes() if command == TSSYNC else done.stdout.encode()) == b"abcdefg"


def test_nothing_is_not_the_end() -> None:
    """A socket without data is distinguished from the end of the stream."""
    with tcp_pair() as (near, far), pipe() as (out, into):
        assert move(near, into, 10) is None
        far.send(b"abc")
        wait_readable(near)
        assert (move(near, into, 10), os.read(out, 10)) == (3, b"abc")
        far.shutdown(socket.SHUT_WR)
        wait_readable(near)
        assert move(near, into, 10) == 0
