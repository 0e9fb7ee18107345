"""Libraries of a few lines of C that stand before the C library's functions, in what a test starts: another machine's behaviour."""

import shutil
import subprocess
from pathlib import Path

import pytest

from support.waiting import DEADLINE


def build_shim(folder: Path, source: str) -> Path:
    """Return a library made of `source`, for LD_PRELOAD; it takes gcc."""
    if not shutil.which("gcc"):
        pytest.skip("takes gcc")
    (folder / "shim.c").write_text(source)
    subprocess.run(
        ["gcc", "-shared", "-fPIC", "-o", "shim.so", "shim.c", "-ldl"],
        cwd=folder,
        check=True,
        timeout=DEADLINE,
    )
    return folder / "shim.so"
