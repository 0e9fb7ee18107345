"""Runs tailsrv with limits that declare a peer dead within a second.

They are the default limits, scaled to times that a test can wait for.
"""

import os
import sys

# As with `python -m tailsrv`: the checkout comes before an installed package.
sys.path.insert(0, os.getcwd())

from tailsrv import main as cli
from tailsrv.config import DeadPeerLimits, Timing

LIMITS = DeadPeerLimits(interval=0.1, silence=0.5, attempts=2)
sys.exit(cli.main(timing=Timing(dead_peers=LIMITS)))
