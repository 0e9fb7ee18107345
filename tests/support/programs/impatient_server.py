"""Runs tailsrv with limits that declare a peer dead within a second.

They are the default `Limits`, scaled to times that a test can wait for.
"""

import os
import sys
from functools import partial

# As with `python -m tailsrv`: the checkout comes before an installed package.
sys.path.insert(0, os.getcwd())

from tailsrv import main as cli
from tailsrv.worker import dead_peers

dead_peers.Limits = partial(dead_peers.Limits, interval=0.1, silence=0.5, attempts=2)  # type: ignore[assignment,misc]
sys.exit(cli.main())
