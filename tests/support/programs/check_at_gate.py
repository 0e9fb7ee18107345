"""Runs tailsrv; the check of an upgrade waits at the named pipe $TAILSRV_TEST_GATE."""

import os
import sys

if os.environ.get("TAILSRV_UPGRADE") == "check":
    with open(os.environ["TAILSRV_TEST_GATE"]) as pipe:
        pipe.read()

# as `python -m tailsrv` has it: the checkout comes before what is installed
sys.path.insert(0, os.getcwd())

from tailsrv.__main__ import main

sys.exit(main())
