"""Tests of the state that a supervisor composes from what orphaned workers hand over."""

import os
import struct
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tailsrv.handover import HandedClient, HandedNext, HandedSegment, Handover
from tailsrv.linux.files import memory_file_with
from tailsrv.segments import NO_FILE
from tailsrv.shared_counts import SharedCounts
from tailsrv.supervisor.takeover import compose, end_of, find_homes, merge_logs, reopen

# The homes of two orphans that may come to any slot.
ANY: list[int | None] = [None, None]


class Files:
    """Files with some bytes, and descriptors of them."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack

    def open(self, name: str, size: int = 0) -> int:
        """Return a descriptor of the file `name`, which is created with `size` bytes."""
        path = self._folder / name
        if not path.exists():
            path.write_bytes(bytes(size))
        file = os.open(path, os.O_RDONLY)
        self._stack.callback(close, file)
        return file

    def name(self, file: object) -> str:
        """Return the name of the open `file`."""
        assert isinstance(file, int)
        return os.path.basename(os.readlink(f"/proc/self/fd/{file}"))


def close(file: int) -> None:
    """Close `file` if it is open."""
    with suppress(OSError):
        os.close(file)


def is_open(file: int) -> bool:
    """Tell whether `file` is open."""
    try:
        os.fstat(file)
    except OSError:
        return False
    return True


@pytest.fixture
def files(tmp_path: Path) -> Iterator[Files]:
    """Return files that are closed after the test."""
    with ExitStack() as stack:
        yield Files(tmp_path, stack)


def test_no_log() -> None:
    """While the server waits for the file, there is no log."""
    assert merge_logs([Handover(), Handover()]) is None


def test_one_has_rolled(files: Files) -> None:
    """A worker that has rolled knows the size of the sealed segment, and the next file."""
    behind = Handover(segments=[HandedSegment(0, None, files.open("1", 50))], end=40)
    ahead = Handover(
        segments=[HandedSegment(0, 40, files.open("1")), HandedSegment(40, None, files.open("2"))],
        end=45,
    )
    for order in ([behind, ahead], [ahead, behind]):
        copies = [
            Handover(
                segments=[
                    HandedSegment(each.base, each.size, os.dup(each.file))
                    for each in handover.segments
                    if each.file is not None
                ]
            )
            for handover in order
        ]
        log = merge_logs(copies)
        assert log is not None
        assert [(base, files.name(file), size) for base, file, size in log.segments] == [
            (0, "1", 40),
            (40, "2", None),
        ]
        for file in log.files():
            os.close(file)


def test_empty_segment(files: Files) -> None:
    """Of two files with one base offset, the first was empty when it was sealed."""
    first = HandedSegment(7, None, files.open("first"))
    second = HandedSegment(7, None, files.open("second", 3))
    log = merge_logs([Handover(segments=[second]), Handover(segments=[first])])
    assert log is not None
    assert [files.name(file) for file in log.files()] == ["second"]
    for file in log.files():
        os.close(file)


def test_closed_segments(files: Files) -> None:
    """Segments that one worker has closed come from another. The log begins at the latest start."""
    short = Handover(segments=[HandedSegment(9, None, files.open("3"))], start=9)
    long = Handover(
        segments=[
            HandedSegment(0, 4, None),
            HandedSegment(4, 5, files.open("2")),
            HandedSegment(9, None, files.open("3")),
        ],
        start=4,
    )
    log = merge_logs([short, long])
    assert log is not None
    assert log.start == 9
    assert [(base, file == NO_FILE) for base, file, _ in log.segments] == [
        (0, True),
        (4, False),
        (9, False),
    ]
    for file in log.files():
        os.close(file)


def test_sealed_segment_that_is_closed(files: Files) -> None:
    """A segment that only workers have that have not rolled ends where the next one begins."""
    behind = Handover(segments=[HandedSegment(0, None, files.open("1", 50))])
    ahead = Handover(segments=[HandedSegment(40, None, files.open("2"))], start=40)
    log = merge_logs([behind, ahead])
    assert log is not None
    assert [(base, files.name(file), size) for base, file, size in log.segments] == [
        (0, "1", 40),
        (40, "2", None),
    ]
    for file in log.files():
        os.close(file)
    truncated = Handover(segments=[HandedSegment(0, None, files.open("1"))])
    ahead = Handover(segments=[HandedSegment(50, None, files.open("1"))], start=50)
    log = merge_logs([truncated, ahead])
    assert log is not None
    assert [segment[1] == NO_FILE for segment in log.segments] == [True, False]
    assert log.load().start == 50
    for file in log.files():
        os.close(file)


def test_end() -> None:
    """The largest end counts, also that of a worker that has died."""
    numbers = memory_file_with(struct.pack("3q", 5, 90, 7))
    assert end_of([Handover(end=40), Handover(end=30, ends=numbers)]) == 90
    assert not is_open(numbers)
    assert end_of([Handover(end=40)]) == 40


@pytest.mark.parametrize(
    ("owned", "rows", "homes"),
    [
        # Each orphan has a listener of its own, here for two addresses.
        ([[1, 2], [3, 4]], [[1, 2], [3, 4]], [0, 1]),
        ([[3, 4], [1, 2]], [[1, 2], [3, 4]], [1, 0]),
        # More slots than orphans, and an orphan at another address.
        ([[1]], [[5], [1], [6]], [1]),
        ([[1], [9]], [[1], [5]], [0, None]),
        # One orphan has the listeners of several slots.
        ([[1, 2, 3]], [[1], [2], [3]], None),
        ([[1, 2], [2]], [[1], [2]], None),
        # Two orphans have the same listener.
        ([[1], [1]], [[1], [2]], None),
        # The listeners of one orphan for two addresses have come to different slots.
        ([[2], [3, 4]], [[3, 2], [5, 4]], None),
    ],
)
def test_find_homes(
    owned: list[list[int]], rows: list[list[int]], homes: list[int | None] | None
) -> None:
    """The slot of an orphan's clients has all listeners of the orphan, or all slots share them."""
    assert find_homes(owned, rows) == homes


def test_compose(files: Files) -> None:
    """Each slot gets an orphan. Later ones have a home, or go to the slot with fewest clients."""
    handovers = [
        Handover(clients=[HandedClient(files.open("socket"), 1, None)] * count, end=3)
        for count in (1, 5, 2, 1)
    ]
    state, places = compose(
        handovers, [[], []], False, [None, None, 1, None], ["*:1"], follow_name=True
    )
    assert places == [0, 1, 1, 0]
    assert [len(slot.clients) for slot in state.slots] == [2, 7]
    for slot in state.slots:
        numbers = [client[0] for client in slot.clients]
        assert len(set(numbers)) == len(numbers)
        assert slot.worker is None
    assert list(SharedCounts(2, *state.ends)) == [3, 3]
    os.close(*state.ends)


def test_next_file(files: Files) -> None:
    """The next file is kept once, unless a worker has rolled to it."""
    waiting = Handover(segments=[HandedSegment(0, None, files.open("1"))])
    waiting.next = HandedNext(files.open("2"), agreed=7)
    also_waiting = Handover(next=HandedNext(files.open("2"), agreed=7))
    state, _ = compose([waiting, also_waiting], [[]], False, ANY, [], follow_name=True)
    assert state.roll is not None
    assert [files.name(file) for file in state.roll.next_files] == ["2"]
    os.close(*state.ends)
    assert (state.roll.mode, state.roll.agreed) == ("AGREED", 7)
    rolled = Handover(segments=[HandedSegment(0, 1, None), HandedSegment(1, None, files.open("2"))])
    also_waiting.next = HandedNext(files.open("2"), agreed=1)
    state, _ = compose([rolled, also_waiting], [[]], False, ANY, [], follow_name=True)
    assert state.roll is not None
    assert state.roll.next_files == []
    os.close(*state.ends)
    # Without --follow-name, the log does not roll.
    also_waiting.next = HandedNext(files.open("2"), 0)
    state, _ = compose([also_waiting], [[]], False, [None], [], follow_name=False)
    assert state.roll is not None
    assert state.roll.next_files == []
    assert (state.roll.mode, state.roll.agreed) == ("IDLE", None)


def test_truncation() -> None:
    """If any worker has found the active segment truncated, the log rolls."""
    state, _ = compose(
        [Handover(), Handover(truncated=True)], [[]], False, ANY, [], follow_name=False
    )
    assert state.roll is not None
    assert (state.roll.mode, state.roll.truncated) == ("ROLLING", True)


def test_reopen(files: Files, tmp_path: Path) -> None:
    """The same file is opened again by its path, if it has one."""
    file = files.open("log", 3)
    again = reopen(file)
    assert os.lseek(again, 0, os.SEEK_END) == 3
    (tmp_path / "log").rename(tmp_path / "log.1")
    again = reopen(again)
    assert files.name(again) == "log.1"
    (tmp_path / "log.1").unlink()
    assert reopen(again) == again
    (tmp_path / "log.1 (deleted)").write_bytes(b"another")
    assert reopen(again) == again
    os.close(again)
