"""Unblocks SIGINT in a context that keeps ignoring it."""

import signal

from tailsrv.linux.signals import block_all, interruptible

signal.signal(signal.SIGINT, signal.SIG_IGN)
block_all()
with interruptible():
    signal.raise_signal(signal.SIGINT)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])
assert signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])
