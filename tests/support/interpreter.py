"""Programs of a few lines in an interpreter of their own."""

import os
import subprocess
import sys
from collections.abc import Mapping

from support.checkout import ROOT
from support.waiting import DEADLINE


def run_python(
    code: str, *args: str, env: Mapping[str, str] | None = None, stderr: int = subprocess.PIPE
) -> subprocess.CompletedProcess[str]:
    """Run `code` in an interpreter of its own, in which warnings are errors, with our packages and `support` to import.

    A fork of the test process would not do: it is the child of a process with threads (faulthandler's).
    """
    path = os.pathsep.join(
        filter(None, [str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")])
    )
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code, *args],
        env={**os.environ, "PYTHONPATH": path, **(env or {})},
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=DEADLINE,
    )  # fmt: skip
