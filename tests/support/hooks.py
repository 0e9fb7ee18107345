"""Code that every interpreter of a tested program runs at its start, to imitate another machine."""

import shutil
from pathlib import Path

from support.checkout import PROGRAMS


def install_hook(folder: Path, name: str) -> None:
    """Make interpreters with `folder` in their PYTHONPATH run a file of programs/hooks at start."""
    shutil.copy(PROGRAMS / "hooks" / f"{name}.py", folder / "sitecustomize.py")
