"""Sends a signal that must wake a forked child, but not its parent."""

import os
import signal

from tailsrv.linux.signals import Wakeup, blocked

parent = Wakeup([signal.SIGUSR1])
with blocked():
    pid = os.fork()
    if pid == 0:
        parent.close()
        own = Wakeup([signal.SIGUSR1])
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        signal.raise_signal(signal.SIGUSR1)
        os._exit(0 if own.read() == [signal.SIGUSR1] else 1)
assert os.waitpid(pid, 0)[1] == 0
assert parent.read() == []
signal.raise_signal(signal.SIGUSR1)
assert parent.read() == [signal.SIGUSR1]
