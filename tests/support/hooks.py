"""Code that each interpreter runs at its start, in what a test starts: another machine's behaviour."""

import shutil
from pathlib import Path

from support.checkout import PROGRAMS


def install_hook(folder: Path, name: str) -> None:
    """Have each interpreter that has `folder` in its PYTHONPATH run that file of tests/support/programs/hooks at its start."""
    shutil.copy(PROGRAMS / "hooks" / f"{name}.py", folder / "sitecustomize.py")
