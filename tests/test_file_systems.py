"""File systems that fail, die, make up inode numbers, or are mounted over the file or out of sight."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from fusefs import Fuse
from helpers import Serve, Server, expect, expect_eof, random_bytes, runs

pytestmark = pytest.mark.slow

HELD = Path(__file__).with_name("held.py")
OLD, NEW, MORE = random_bytes(5000, 1), random_bytes(9000, 2), random_bytes(3000, 3)


@pytest.fixture
def hurried(tmp_path: Path) -> Iterator[tuple[str, ...]]:
    """Give a program to serve with that looks at the file twenty times as often."""
    (hold := tmp_path / "hold").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TAILSRV_TEST_HOLD", str(hold))
        yield (sys.executable, str(HELD))


@pytest.fixture
def fuse(tmp_path: Path) -> Fuse:
    """Give a file system of one file, which holds OLD, that behaves as ordered."""
    fuse = Fuse(tmp_path / "fuse")
    fuse.write(OLD)
    if not runs(*fuse.wrapper, "true"):
        pytest.skip("a FUSE file system cannot be mounted in a namespace of its own")
    return fuse


def rotate(fuse: Fuse, server: Server, data: bytes, **orders: object) -> None:
    """Have the name lead to another file; the streams of the old one end, and this one is served."""
    old = server.connect(b"-0\n")
    server.streaming(old)
    node = int(fuse.orders["node"]) + 1
    fuse.write(data, node)
    fuse.order(node=node, **orders)
    server.logged("serving: ", count=node - 1)
    expect_eof(old)
    fuse.order(fail={})
    expect(server.connect(b"0\n"), data)


# Calls that fail

CALLS = [
    ("FLUSH", 0, 100),  # of close(2)
    ("OPEN", 0, 1),
    ("GETATTR AFTER OPEN", 0, 1),
    ("READ", 0, 1),
    *(("LOOKUP", skip, 2) for skip in range(3)),
    *(("GETATTR", skip, 3) for skip in range(0, 9, 3)),
]


def test_calls_that_fail(serve: Serve, fuse: Fuse, hurried: tuple[str, ...]) -> None:
    """Whichever call on the file fails during a rotation, the server goes on with the next file."""
    server = serve(fuse.path, "--follow-name", "-v", wrapper=fuse.wrapper, program=hurried)
    server.workers(1)
    for operation, skip, times in CALLS:
        rotate(fuse, server, NEW, fail={operation: ["EIO", skip, times]})
    assert "cannot go on" not in server.log
