"""Libraries of a few lines of C that stand before the C library's functions, in what a test starts: another machine's behaviour."""

import shutil
import subprocess
from pathlib import Path

import pytest

from support.checkout import PROGRAMS
from support.waiting import DEADLINE


def build_shim(folder: Path, name: str) -> Path:
    """Return the library that `name`.c in tests/support/programs makes, for LD_PRELOAD; it takes gcc."""
    if not shutil.which("gcc"):
        pytest.skip("takes gcc")
    shim = folder / f"{name}.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", shim, PROGRAMS / f"{name}.c", "-ldl"],
        check=True,
        timeout=DEADLINE,
    )
    return shim
