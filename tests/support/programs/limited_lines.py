"""Logs five times a line that is limited to one in ten seconds, with a clock of its own."""

import logging
from types import SimpleNamespace

from tailsrv import log

times = (0.0, 1.0, 2.0, 10.0, 20.0)
now = iter(times)
log.set_up(0)
log.time = SimpleNamespace(monotonic=lambda: next(now))  # type: ignore[attr-defined,assignment]
say = log.RateLimited(logging.WARNING, burst=1, interval=10.0)
for _ in times:
    say("refused", peer="x")
