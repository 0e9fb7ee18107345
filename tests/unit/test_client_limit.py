"""Tests of the client limit, which all workers share."""

import os
from collections.abc import Iterator

import pytest

from support.interpreter import run_program
from tailsrv.client_limit import ClientLimit
from tailsrv.shared_counts import SharedCounts


@pytest.fixture
def client_limit() -> Iterator[ClientLimit]:
    """Give a client limit of 5 for three slots."""
    client_limit = ClientLimit(5, SharedCounts(3))
    yield client_limit
    os.close(client_limit.counts.fd)


def test_claim(client_limit: ClientLimit) -> None:
    """Claims succeed until all slots together reach the limit, and again after clients leave."""
    assert [client_limit.claim(0, count) for count in (1, 2, 3)] == [True, True, True]
    assert [client_limit.claim(1, count) for count in (1, 2)] == [True, True]
    assert not client_limit.claim(2, 1)
    assert not client_limit.claim(0, 4)
    client_limit.record(0, 2)
    assert client_limit.claim(2, 1)
    assert not client_limit.claim(2, 2)


def test_a_refused_claim_leaves_no_trace(client_limit: ClientLimit) -> None:
    """A refused claim does not reduce what other slots may claim."""
    client_limit.record(0, 4)
    assert not any(client_limit.claim(1, 2) for _ in range(3))
    assert client_limit.claim(2, 1)


def test_counts_survive_an_upgrade(client_limit: ClientLimit) -> None:
    """After an upgrade, a second object on the same memory sees the same counts."""
    client_limit.record(1, 5)
    successor = ClientLimit(5, SharedCounts(3, client_limit.counts.fd))
    assert not successor.claim(0, 1)
    successor.record(1, 0)
    assert client_limit.claim(0, 5)


def test_shared_by_processes() -> None:
    """Concurrent claims never exceed the limit, and the limit can be used up completely."""
    done = run_program("claims_at_once")
    assert (done.returncode, done.stdout, done.stderr) == (0, "exact\n", "")
