"""Runs tailsrv, which leaves out one byte in fifty sends."""

import os
import sys
from itertools import count

# as `python -m tailsrv` has it: the checkout comes before what is installed
sys.path.insert(0, os.getcwd())

from tailsrv.main import main

send, calls = os.sendfile, count(1)


def lie(out: int, file: int, offset: int, size: int) -> int:
    """Send what is asked for, or what begins one byte later."""
    return send(out, file, offset + (next(calls) % 50 == 0), size)


os.sendfile = lie  # type: ignore[assignment]
sys.exit(main())
