"""Short programs that run in an interpreter of their own."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence

from support.checkout import PROGRAMS, ROOT
from support.waiting import DEADLINE

INTERPRETER = (sys.executable, "-W", "error")


def environment() -> dict[str, str]:
    """Return our environment, with our packages and `support` first in the path of interpreters."""
    path = os.pathsep.join(
        filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    )
    return {**os.environ, "PYTHONPATH": path}


def program(name: str) -> str:
    """Return the path of a program in tests/support/programs."""
    return str(PROGRAMS / f"{name}.py")


def run_program(
    name: str, *args: str, wrapper: Sequence[str] = (), env: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """Run a program of tests/support/programs in the same way as `run_python` runs code."""
    return _run([*wrapper, *INTERPRETER, program(name), *args], env, subprocess.PIPE)


def run_python(
    code: str, *args: str, env: Mapping[str, str] | None = None, stderr: int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    """Run `code` in a new interpreter that can import our packages and `support`.

    Warnings are errors there. Forking the test process instead would fork a process with threads
    (faulthandler's). Code of more than a few lines belongs into a program for `run_program`.
    """
    return _run([*INTERPRETER, "-c", code, *args], env, stderr)


def _run(
    command: Sequence[str], env: Mapping[str, str] | None, stderr: int
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        env={**environment(), **(env or {})},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        timeout=DEADLINE,
    )
