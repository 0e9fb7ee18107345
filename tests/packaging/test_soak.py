"""A short run of contrib/soak passes with a correct server and finds a faulty one."""

import json
import random
import subprocess
import sys
from contextlib import closing
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from clients import KINDS, Reader
from content import BLOCK, LOCATE, Content
from growing import GrowingFile
from samples import Sample
from summary import Summary
from tally import Tally

from support.checkout import ROOT
from support.interpreter import program
from support.sockets import tcp_pair, wait_readable
from support.waiting import DEADLINE

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
    status, summary = soak(tmp_path, "--faults", "kill,upgrade,reset,flood")
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
    assert summary["reasons"][0].startswith("the server does not start")


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
    """The first bytes of any piece identify its file and offset; foreign bytes are detected."""
    content, rng = Content(1), random.Random(1)
    for generation, offset in [
        (0, 0),
        (0, 1),
        (3, BLOCK - 1),
        *((rng.randrange(9), rng.randrange(1 << 45)) for _ in range(200)),
    ]:
        assert content.locate(content.read(generation, offset, LOCATE)) == (generation, offset)
    assert content.locate(rng.randbytes(LOCATE)) is None
    assert content.locate(Content(2).read(0, 0, LOCATE)) is None


def test_content_is_the_same_in_pieces() -> None:
    """Content is the same in one read or in many, and no two blocks of it are equal."""
    content = Content(1)
    whole = content.read(1, 0, 10 * BLOCK)
    pieces = [content.read(1, start, 777) for start in range(0, len(whole), 777)]
    assert b"".join(pieces)[: len(whole)] == whole
    for offset, step in product((0, 500, BLOCK), (1, 8, BLOCK)):
        assert content.read(1, offset, BLOCK) != content.read(1, offset + step, BLOCK)


@pytest.mark.parametrize(("ago", "right"), [(0.0, True), (10.0, False)])
def test_old_file_is_wrong_after_a_rotation(tmp_path: Path, ago: float, right: bool) -> None:
    """The old file is right for a client that connects during a rotation, and wrong later."""
    file, tally = GrowingFile(tmp_path / "file", Content(1)), Tally()
    with closing(file), tcp_pair() as (near, far):
        file.append(LOCATE)
        file.rotate()
        file.rotated -= ago
        near.sendall(file.content.read(0, 0, LOCATE))
        reader = Reader(KINDS[0], far, b"0", file, tally)
        while reader.read() and reader.generation is None:
            wait_readable(far)
    assert reader.generation == 0
    assert bool(tally.wrong) is not right
