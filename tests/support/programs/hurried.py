"""Runs tailsrv with shorter waits than it has otherwise: the program for tests that would have to sit through them.

Each is long enough that a test can still act within it on a busy machine, or a pause that no test has to act within.
"""

import os
import sys

# as `python -m tailsrv` has it: the checkout comes before what is installed
sys.path.insert(0, os.getcwd())

from tailsrv import main as cli
from tailsrv.config import Timing

TIMING = Timing(
    open_retry=0.05,
    poll_interval=0.1,
    settle=0.4,
    late_interval=0.05,
    fork_retry=0.05,
    max_delay=0.5,
    kill_margin=0.2,
    status_interval=0.2,
)

if __name__ == "__main__":
    sys.exit(cli.main(timing=TIMING))
