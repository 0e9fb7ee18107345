"""strace(1), which makes system calls of a running process fail."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from support.processes import runs
from support.tools import missing
from support.waiting import DEADLINE

no_strace = missing("strace") or (
    "" if runs("strace", "-o", os.devnull, "true") else "strace may not trace a process"
)
needs_strace = pytest.mark.skipif(bool(no_strace), reason=no_strace)


def can_inject() -> str:
    """Return why no fault can be injected here; the empty string if one can."""
    if no_strace:
        return no_strace
    inject = ("-e", "trace=write", "-e", "inject=write:error=EIO")
    return (
        ""
        if not runs("strace", "-o", os.devnull, *inject, "echo")
        else "strace cannot make calls fail"
    )


@contextmanager
def strace(pid: int, *inject: str) -> Iterator[None]:
    """Make strace inject faults into the process `pid`; strace(1) describes `-e inject=`."""
    with attached(pid, os.devnull, *(word for what in inject for word in ("-e", f"inject={what}"))):
        yield


@contextmanager
def attached(pid: int, output: str | Path, *options: str) -> Iterator[None]:
    """Attach strace to the process `pid`; it writes its trace, line by line, to `output`."""
    command = ["strace", "-o", str(output), *options, "-p", str(pid)]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as tracer:
        assert tracer.stderr is not None
        try:
            line = tracer.stderr.readline()
            assert line.endswith("attached\n"), line
            yield
        finally:
            # SIGTERM would not do: strace may wait for a process that is stopped or gone.
            tracer.kill()
            tracer.communicate(timeout=DEADLINE)
