"""Leaves SIGINT ignored while it is let through."""

import signal

from tailsrv.linux.signals import hold, interruptible

signal.signal(signal.SIGINT, signal.SIG_IGN)
hold()
with interruptible():
    signal.raise_signal(signal.SIGINT)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
