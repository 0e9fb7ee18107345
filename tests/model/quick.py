"""Runs tailsrv with shorter waits, so that an example of the model needs a few seconds."""

import os
import sys

# As with `python -m tailsrv`: the checkout comes before an installed package.
sys.path.insert(0, os.getcwd())

from tailsrv import main as cli
from tailsrv.config import Timing

# Some waits stay long enough for a busy machine: a worker that is only slow must not be killed, and
# late bytes must be counted.
TIMING = Timing(
    open_retry=0.05,
    poll_interval=0.1,
    settle=0.15,
    seal_limit=0.3,
    late_interval=0.05,
    late_patience=10.0,
    deletion_poll=0.2,
    fork_retry=0.05,
    max_delay=0.5,
    kill_margin=0.2,
)

if __name__ == "__main__":
    sys.exit(cli.main(timing=TIMING))
