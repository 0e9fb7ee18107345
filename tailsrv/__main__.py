"""The command `tailsrv` and `python -m tailsrv`: block all signals, then import the program."""

import signal
import sys


def main() -> int:
    """Run `tailsrv` with the arguments of this process; return the exit status.

    The imports take a tenth of a second. The kernel discards signals for PID 1 of a container that
    has no handler for them, pid_namespaces(7), and SIGTERM would be lost. A blocked signal stays
    pending until the handler is there.
    """
    # What signals.hold() does, before anything else is imported.
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    from tailsrv.main import main as run

    return run()


if __name__ == "__main__":  # pragma: no branch: the installed command imports it
    sys.exit(main())
