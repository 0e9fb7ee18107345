"""Entry point of `tailsrv` and `python -m tailsrv`: blocks signals, then imports the program."""

import signal
import sys


def main() -> int:
    """Run `tailsrv` with the arguments of this process; return the exit status.

    The imports take a tenth of a second. As PID 1 of a container, the process has no signal
    handlers during that time, and the kernel discards a signal that PID 1 does not handle
    (pid_namespaces(7)): SIGTERM would be lost. A blocked signal stays pending until the handler is
    installed.
    """
    # The same as linux.signals.block_all(), which would have to be imported first.
    signal.pthread_sigmask(signal.SIG_SETMASK, signal.valid_signals())
    from tailsrv.main import main as run

    return run()


if __name__ == "__main__":  # pragma: no branch: the installed command imports it
    sys.exit(main())
