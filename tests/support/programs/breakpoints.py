"""Runs tailsrv, in more of a hurry, with places at which a test can hold it: a process stops itself there, for strace to be attached.

A process stops at a place if a file of its name is in the folder $TAILSRV_TEST_HOLD: `main` (the program begins, also
by an upgrade), `proof` (it is to say whether it starts), `worker` and `status` (such a child begins its work).
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

# as `python -m tailsrv` has it: the checkout comes before what is installed
sys.path.insert(0, os.getcwd())

from tailsrv import main as cli
from tailsrv.config import Timing
from tailsrv.supervisor import upgrade
from tailsrv.supervisor.supervisor import Supervisor

# Faults follow one another too fast for a backoff, and soon after a rotation there are as many descriptors as before it.
TIMING = Timing(
    open_retry=0.05,
    poll_interval=0.05,
    settle=0.05,
    fork_retry=0.05,
    long_life=0.0,
    late_interval=0.05,
    late_patience=0.05,
)


def hold(place: str) -> None:
    """Stop here, if somebody has asked for that."""
    if os.access(os.path.join(os.environ["TAILSRV_TEST_HOLD"], place), os.F_OK):
        os.kill(os.getpid(), signal.SIGSTOP)


def holding(place: str, go_on: Callable[..., None]) -> Callable[..., None]:
    """Return what holds at `place`, then does what `go_on` does."""

    def held(*arguments: Any) -> None:
        hold(place)
        go_on(*arguments)

    return held


if __name__ == "__main__":
    Supervisor.run_worker = holding("worker", Supervisor.run_worker)  # type: ignore[method-assign]
    Supervisor.enter_status_child = holding("status", Supervisor.enter_status_child)  # type: ignore[method-assign]
    hold("proof" if upgrade.is_check() else "main")
    sys.exit(cli.main(timing=TIMING))
