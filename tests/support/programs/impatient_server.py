"""Runs tailsrv, which gives dead peers up within a second: `Limits` as they are by default, in seconds that a test can wait."""

import os
import sys
from functools import partial

# as `python -m tailsrv` has it: the checkout comes before what is installed
sys.path.insert(0, os.getcwd())

from tailsrv import main as cli
from tailsrv.worker import dead_peers

dead_peers.Limits = partial(dead_peers.Limits, interval=0.1, silence=0.5, attempts=2)  # type: ignore[assignment,misc]
sys.exit(cli.main())
