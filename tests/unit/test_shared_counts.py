"""Tests of the numbers in shared memory."""

import os
from collections.abc import Iterator

import pytest

from support.interpreter import run_python
from tailsrv.shared_counts import SharedCounts


@pytest.fixture
def counts() -> Iterator[SharedCounts]:
    """Give the numbers of three slots."""
    counts = SharedCounts(3)
    yield counts
    os.close(counts.fd)


def test_numbers(counts: SharedCounts) -> None:
    """Each slot has its own number, 0 at first, of up to 63 bits."""
    assert [*counts] == [0, 0, 0]
    counts[0], counts[2] = 2**63 - 1, 5
    assert [*counts] == [2**63 - 1, 0, 5]
    assert [counts[slot] for slot in range(3)] == [2**63 - 1, 0, 5]
    with pytest.raises(IndexError):
        counts[3] = 1


def test_survive_an_upgrade(counts: SharedCounts) -> None:
    """A second object for the same memory has the same numbers, then and later."""
    counts[1] = 7
    successor = SharedCounts(3, counts.fd)
    assert [*successor] == [0, 7, 0]
    successor[2] = 8
    counts[0] = 9
    assert [*successor] == [*counts] == [9, 7, 8]


def test_survive_the_process_that_wrote_them(counts: SharedCounts) -> None:
    """What another process has written is still there when it has ended."""
    counts[0] = 3
    path = f"/proc/{os.getpid()}/fd/{counts.fd}"
    done = run_python(
        "import os, sys; from tailsrv.shared_counts import SharedCounts; "
        "counts = SharedCounts(3, os.open(sys.argv[1], os.O_RDWR)); counts[1] = counts[0] + 1; "
        "os._exit(counts[1])",
        path,
    )
    assert done.returncode == 4, done.stderr
    assert [*counts] == [3, 4, 0]
