"""Runs tailsrv-health where no thread can be started."""

import os
import resource
import shutil  # noqa: F401
import sys

from tailsrv.health.main import main

resource.setrlimit(resource.RLIMIT_NPROC, (0, 0))
os.setuid(3_000_000_003)
sys.exit(main(sys.argv[1:]))
