"""The count of clients that all workers share."""

import os
from collections.abc import Iterator

import pytest

from support.interpreter import run_program
from tailsrv.client_limit import Quota


@pytest.fixture
def quota() -> Iterator[Quota]:
    """Give a quota of 5 for three slots."""
    quota = Quota(5, 3)
    yield quota
    os.close(quota.fd)


def test_claim(quota: Quota) -> None:
    """Room is given until all slots together have as many as there may be, and again when one has fewer."""
    assert [quota.claim(0, count) for count in (1, 2, 3)] == [True, True, True]
    assert [quota.claim(1, count) for count in (1, 2)] == [True, True]
    assert not quota.claim(2, 1)
    assert not quota.claim(0, 4)
    quota.note(0, 2)
    assert quota.claim(2, 1)
    assert not quota.claim(2, 2)


def test_a_refused_claim_leaves_no_trace(quota: Quota) -> None:
    """Who is refused takes nothing from the others."""
    quota.note(0, 4)
    assert not any(quota.claim(1, 2) for _ in range(3))
    assert quota.claim(2, 1)


def test_handed_on(quota: Quota) -> None:
    """Another object of the same memory has the same counts: those of the version before us, after an upgrade."""
    quota.note(1, 5)
    heir = Quota(5, 3, quota.fd)
    assert not heir.claim(0, 1)
    heir.note(1, 0)
    assert quota.claim(0, 5)


def test_shared_by_processes() -> None:
    """However many claim at the same time, they never get more than the limit, and nothing is lost of it."""
    done = run_program("claims_at_once")
    assert (done.returncode, done.stdout, done.stderr) == (0, "exact\n", "")
