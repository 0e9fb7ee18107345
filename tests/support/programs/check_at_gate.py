"""Runs tailsrv; the check of an upgrade waits for the named pipe $TAILSRV_TEST_GATE."""

import os
import sys

if os.environ.get("TAILSRV_UPGRADE") == "check":
    with open(os.environ["TAILSRV_TEST_GATE"]) as pipe:
        pipe.read()

# As with `python -m tailsrv`: the checkout comes before an installed package.
sys.path.insert(0, os.getcwd())

from tailsrv.__main__ import main

sys.exit(main())
