"""A short run of contrib/soak passes with a correct server and finds a faulty one."""

import json
import random
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from clients import KINDS, Reader
from content import BLOCK, LOCATE, Content
from growing import KEEP, ROTATIONS, GrowingFile
from samples import Sample
from summary import Summary
from tally import Tally

from support.checkout import ROOT
from support.interpreter import program
from support.sockets import tcp_pair, wait_readable
from support.waiting import DEADLINE
from tailsrv.protocol import offsets_line

SOAK = ROOT / "contrib" / "soak" / "soak.py"


def soak(folder: Path, *options: str) -> tuple[int, dict[str, Any]]:
    """Run a soak of a few seconds, and return its exit status and its summary."""
    command = [
        sys.executable,
        str(SOAK),
        "--minutes",
        "0.05",
        "--seed",
        "7",
        "--folder",
        str(folder),
        "--json",
        str(folder / "summary"),
    ]
    done = subprocess.run(
        [*command, *options], capture_output=True, text=True, timeout=5 * DEADLINE
    )
    assert "Traceback" not in done.stderr, done.stderr
    summary: dict[str, Any] = json.loads((folder / "summary").read_text())
    assert done.stdout.startswith("OK: " if summary["ok"] else "WRONG: "), done.stdout
    return done.returncode, summary


@pytest.mark.thorough
@pytest.mark.slow
def test_soak(tmp_path: Path) -> None:
    """A correct server passes all faults: every byte is right, and no descriptor is left open."""
    status, summary = soak(tmp_path, "--faults", "kill,supervisor,upgrade,reset")
    assert (status, summary["reasons"]) == (0, [])
    assert summary["tally"]["checked"] > 1 << 20
    assert sum(summary["tally"]["faults"].values()) >= 3
    assert (
        summary["start"]["descriptors"]
        == summary["end"]["descriptors"]
        < summary["peak"]["descriptors"]
    )


@pytest.mark.thorough
@pytest.mark.slow
def test_soak_with_rotations(tmp_path: Path) -> None:
    """A correct server passes rotations and truncations, and has no deleted file open."""
    status, summary = soak(
        tmp_path, "--truncate", "--minutes", "0.2", "--faults", "kill,supervisor,upgrade"
    )
    assert (status, summary["reasons"]) == (0, [])
    assert summary["tally"]["checked"] > 1 << 20
    assert sum(summary["tally"]["rotations"].values()) >= 4


@pytest.mark.thorough
@pytest.mark.slow
def test_server_that_drops_bytes_is_found(tmp_path: Path) -> None:
    """A server that drops one byte in fifty sends is found, with the offset of the difference."""
    status, summary = soak(
        tmp_path,
        "--faults",
        "stall",
        "--tailsrv",
        f"{sys.executable} {program('forgetful_server')}",
    )
    assert (status, summary["ok"]) == (1, False)
    assert any(" differs: " in reason for reason in summary["reasons"]), summary["reasons"]


@pytest.mark.slow
def test_server_that_does_not_start(tmp_path: Path) -> None:
    """A server that does not start is reported in one line, without a traceback."""
    status, summary = soak(tmp_path, "--tailsrv", f"{sys.executable} -c 'raise SystemExit(1)'")
    assert status == 1
    assert "the server does not start" in summary["reasons"][0]


BEFORE = Sample(processes=3, pss=20 << 20, descriptors=33, threads=3, sockets=0)


@pytest.mark.parametrize(
    ("end", "tally", "status", "reason"),
    [
        (BEFORE, Tally(checked=1), 0, None),
        (replace(BEFORE, pss=25 << 20, sockets=1 << 30), Tally(checked=1), 0, None),
        (
            replace(BEFORE, pss=30 << 20),
            Tally(checked=1),
            0,
            "memory has grown from 20.0 to 30.0 MiB",
        ),
        (
            replace(BEFORE, descriptors=34),
            Tally(checked=1),
            0,
            "descriptors: 33 at the start, 34 at the end",
        ),
        (replace(BEFORE, threads=4), Tally(checked=1), 0, "threads: 3 at the start, 4 at the end"),
        (
            None,
            Tally(checked=1),
            0,
            "the server's memory and descriptors are not known at the start and at the end",
        ),
        (BEFORE, Tally(checked=1), 3, "the server exited with status 3"),
        (BEFORE, Tally(), 0, "no byte was checked"),
        (BEFORE, Tally(checked=1, wrong=["this"]), 0, "this"),
    ],
)
def test_reasons(end: Sample | None, tally: Tally, status: int, reason: str | None) -> None:
    """Growth, a failed server, wrong bytes and an idle run are each a reason for failure."""
    summary = Summary(
        "tailsrv", 1, 60.0, 1000, status, tally, BEFORE, end, peak=BEFORE, log_lines=9, bad_lines=[]
    )
    assert summary.reasons() == ([reason] if reason else [])
    assert json.loads(summary.json())["ok"] is not bool(reason)
    assert (reason or "OK: ") in summary.text()


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "options",
    [
        ["--minutes", "0"],
        ["-w", "0"],
        ["--faults", "fire"],
        ["--rate", "nan"],
        ["more"],
        ["--tailsrv", "/no/such"],
        ["--folder", "/no/such"],
        ["--json", "/no/such"],
    ],
)
def test_usage(options: list[str]) -> None:
    """A wrong command line has status 2 and prints the usage."""
    done = subprocess.run(
        [sys.executable, str(SOAK), *options], capture_output=True, text=True, timeout=DEADLINE
    )
    assert done.returncode == 2
    assert done.stderr.startswith("usage: ")


def test_content_is_found_by_its_bytes() -> None:
    """The first bytes of any piece identify its log offset; foreign bytes are detected."""
    content, rng = Content(1), random.Random(1)
    for offset in (0, 1, BLOCK - 1, *(rng.randrange(1 << 45) for _ in range(200))):
        assert content.locate(content.read(offset, LOCATE)) == offset
    assert content.locate(rng.randbytes(LOCATE)) is None
    assert content.locate(Content(2).read(0, LOCATE)) is None


def test_content_is_the_same_in_pieces() -> None:
    """Content is the same in one read or in many, and no two blocks of it are equal."""
    content = Content(1)
    whole = content.read(0, 10 * BLOCK)
    pieces = [content.read(start, 777) for start in range(0, len(whole), 777)]
    assert b"".join(pieces)[: len(whole)] == whole
    for offset, step in product((0, 500, BLOCK), (1, 8, BLOCK)):
        assert content.read(offset, BLOCK) != content.read(offset + step, BLOCK)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[GrowingFile]:
    """A file with some bytes."""
    with closing(GrowingFile(tmp_path / "file", Content(1))) as file:
        file.append(2 * LOCATE)
        yield file


@pytest.mark.parametrize("kind", ROTATIONS)
def test_rotations_keep_the_content(file: GrowingFile, kind: str) -> None:
    """Whatever the kind of a rotation, the files in their order are the log."""
    dice = random.Random(3)
    with ExitStack() as stack:
        # As the server does: it has the current file open, which may be deleted.
        files = [stack.enter_context(file.path.open("rb"))]
        file.delivered = file.size
        file.rotate(kind, dice)
        file.append(100)
        older = sorted(file.path.parent.glob("file.*"), key=lambda path: int(path.suffix[1:]))
        files += [stack.enter_context(path.open("rb")) for path in [*older[1:], file.path]]
        log = b"".join(each.read() for each in files)
    assert len(files) > 1
    assert len(log) == file.size
    assert log == file.content.read(0, file.size)
    assert file.oldest == (file.base if kind == "delete" else 0)
    assert file.path.stat().st_size == file.size - file.base


def test_old_files_are_deleted(file: GrowingFile) -> None:
    """Old files are deleted, but not before a client has received bytes of the next one."""
    dice = random.Random(1)
    for _ in range(2 * KEEP):
        file.rotate("late", dice)
        file.append(1)
    assert file.oldest == 0
    file.delivered = file.size
    file.rotate("late", dice)
    assert len(list(file.path.parent.glob("file.*"))) == KEEP
    assert file.noticed == 0 < file.oldest
    assert file.is_base(0)
    assert file.is_base(file.oldest)
    assert not file.is_base(1)


# A client that wants the last 100 bytes knows that the end was from LOCATE to 2 * LOCATE.
SEEN = LOCATE


@pytest.mark.parametrize(
    ("request_", "start", "end", "error"),
    [
        (b"0", 0, None, ""),
        (b"0", 1, None, "started at byte 1"),
        (b"7", 7, None, ""),
        (b"7", 8, None, "started at byte 8"),
        (b"-100", SEEN - 100, None, ""),
        (b"-100", SEEN - 101, None, "started at byte"),
        (b"?0", 0, 2 * LOCATE, ""),
        (b"?0", 1, 2 * LOCATE, "started at byte 1"),
        (b"?7", 7, SEEN, ""),
        (b"?7", 7, SEEN - 1, "end is said to be"),
        (b"?7", 7, 2 * LOCATE + 1, "end is said to be"),
        (b"?7", 6, 2 * LOCATE, "started at byte 6"),
        (b"?-100", SEEN, SEEN + 100, ""),
        (b"?-100", SEEN, SEEN + 101, "said to start at"),
        (b"?-100", 0, SEEN + 101, "said to start at"),
        (b"?-99999", 0, SEEN, ""),
    ],
)
def test_start_of_a_stream(
    file: GrowingFile, request_: bytes, start: int, end: int | None, error: str
) -> None:
    """A stream begins where it was requested, and so says the line of a client that asks."""
    tally = Tally()
    with tcp_pair() as (near, far):
        line = b"" if end is None else offsets_line(start, end)
        near.sendall(line + file.content.read(start, LOCATE))
        reader = Reader(KINDS[0], far, request_, file, tally, SEEN)
        while reader.read() and reader.position != start + LOCATE:
            wait_readable(far)
    assert (tally.checked == LOCATE) is not bool(error)
    assert [wrong for wrong in tally.wrong if error not in wrong] == []
    assert len(tally.wrong) == bool(error)


@pytest.mark.parametrize(
    ("request_", "oldest", "truncated", "gone"),
    [
        (b"7", 0, range(0), 0),
        (b"7", 8, range(0), 1),
        (b"8", 8, range(0), 0),
        (b"0", 8, range(0), 0),
        (b"-5", 8, range(0), 0),
        (b"-5", 8, range(8), 1),
        (b"7", 8, range(8), 1),
        (b"8", 8, range(8), 0),
    ],
)
def test_closed_connection(
    file: GrowingFile, request_: bytes, oldest: int, truncated: range, gone: int
) -> None:
    """A connection may be closed only if the bytes that it requested have been deleted."""
    tally = Tally()
    with tcp_pair() as (near, far):
        reader = Reader(KINDS[0], far, request_, file, tally)
        file.base, file.truncated = oldest, truncated
        near.close()
        while reader.read():
            wait_readable(far)
    assert (tally.gone, len(tally.wrong)) == (gone, 1 - gone)
