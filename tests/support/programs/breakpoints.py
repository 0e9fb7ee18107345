"""Runs tailsrv with shorter waits and with breakpoints, at which strace can be attached.

A process stops itself at a breakpoint if $TAILSRV_TEST_HOLD contains a file with its name: `main`
(the program starts, also in an upgrade), `proof` (the program checks whether it would start),
`find` (the program looks for orphaned workers) and `worker` (such a child starts its work).
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

# As with `python -m tailsrv`: the checkout comes before an installed package.
sys.path.insert(0, os.getcwd())

from tailsrv import main as cli
from tailsrv.config import Timing
from tailsrv.supervisor import upgrade
from tailsrv.supervisor.supervisor import Supervisor
from tailsrv.worker import worker

# Faults follow each other too fast for a backoff. And soon after a rotation no late bytes are
# counted any more.
TIMING = Timing(
    open_retry=0.05,
    poll_interval=0.05,
    settle=0.05,
    seal_limit=1.0,
    fork_retry=0.05,
    long_life=0.0,
    late_interval=0.05,
    late_patience=0.05,
    deletion_poll=0.05,
    takeover_patience=3.0,
)


def hold(name: str) -> None:
    """Stop at the breakpoint `name` if the test asks for it."""
    if os.access(os.path.join(os.environ["TAILSRV_TEST_HOLD"], name), os.F_OK):
        os.kill(os.getpid(), signal.SIGSTOP)


def holding(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return `function` with the breakpoint `name` before it."""

    def held(*arguments: Any, **named: Any) -> Any:
        hold(name)
        return function(*arguments, **named)

    return held


if __name__ == "__main__":
    worker.NEEDS_INTERVAL = 0.05
    Supervisor.run_worker = holding("worker", Supervisor.run_worker)  # type: ignore[method-assign]
    cli.find = holding("find", cli.find)  # type: ignore[attr-defined]
    hold("proof" if upgrade.is_check() else "main")
    sys.exit(cli.main(timing=TIMING))
