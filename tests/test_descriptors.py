"""This process's own descriptors."""

import resource

import pytest
from unit import run_python

from tailsrv.linux.process import raise_limit


def test_raise_limit() -> None:
    """The soft limit becomes the hard one, which is returned."""
    done = run_python("""
import resource
from tailsrv.linux.process import raise_limit
resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))
assert raise_limit() == 200
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (200, 200)
assert raise_limit() == 200
""")
    assert (done.returncode, done.stderr) == (0, "")


def test_raise_limit_here() -> None:
    """Where both limits are the same nothing is changed."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[0] != before[1]:
        pytest.skip("the limits of this process differ, and are not ours to change")
    assert raise_limit() == before[1]


def test_occupy_standard() -> None:
    """Of the standard descriptors those that are closed are taken, and no others."""
    done = run_python("""
import os
from tailsrv.linux.process import occupy_standard
free = os.dup(2)
os.close(free)
os.close(0)
occupy_standard()
assert os.readlink("/proc/self/fd/0") == os.devnull
assert os.dup(2) == free
""")
    assert (done.returncode, done.stderr) == (0, "")
