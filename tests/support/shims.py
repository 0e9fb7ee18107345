"""Small C libraries that override functions of the C library, to imitate another machine."""

import shutil
import subprocess
from pathlib import Path

import pytest

from support.checkout import PROGRAMS
from support.waiting import DEADLINE


def build_shim(folder: Path, name: str) -> Path:
    """Compile `name`.c of tests/support/programs to a library for LD_PRELOAD; this requires gcc."""
    if not shutil.which("gcc"):
        pytest.skip("requires gcc")
    shim = folder / f"{name}.so"
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", shim, PROGRAMS / f"{name}.c", "-ldl"],
        check=True,
        timeout=DEADLINE,
    )
    return shim
