"""The real logrotate."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from support.tools import NOT_INSTALLED
from support.waiting import DEADLINE

# It is often not in the PATH of a user.
LOGROTATE = shutil.which("logrotate") or "/usr/sbin/logrotate"
needs_logrotate = pytest.mark.skipif(
    not Path(LOGROTATE).exists(), reason=f"{NOT_INSTALLED}logrotate"
)


def logrotate(path: Path, *directives: str) -> None:
    """Rotate `path` now, and keep three old files."""
    config, state = path.with_name("logrotate.conf"), path.with_name("logrotate.state")
    root = "su root root" if os.getuid() == 0 else ""
    config.write_text("\n".join([f"{path} {{", root, "rotate 3", *directives, "}", ""]))
    config.chmod(0o644)
    done = subprocess.run(
        [LOGROTATE, "--force", "--state", state, config],
        capture_output=True,
        text=True,
        timeout=DEADLINE,
    )
    assert done.returncode == 0, done.stderr
