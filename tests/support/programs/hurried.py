"""Runs tailsrv with shorter waits, for tests that would otherwise have to sit through them.

A test can still act within each of them on a busy machine, or no test has to. A test that needs
others passes them, as a JSON object, in $TAILSRV_TEST_TIMING: see `hurried` in support/server.py.
"""

import json
import os
import sys
from dataclasses import replace

# As with `python -m tailsrv`: the checkout comes before an installed package.
sys.path.insert(0, os.getcwd())

from tailsrv import main as cli
from tailsrv.config import Timing

TIMING = Timing(
    open_retry=0.05,
    poll_interval=0.1,
    settle=0.4,
    seal_limit=2.0,
    late_interval=0.05,
    fork_retry=0.05,
    max_delay=0.5,
    kill_margin=0.2,
    status_interval=0.2,
    deletion_poll=0.2,
)

if __name__ == "__main__":
    others = json.loads(os.environ.get("TAILSRV_TEST_TIMING", "{}"))
    sys.exit(cli.main(timing=replace(TIMING, **others)))
