"""Runs the command `tailsrv-health` for `python -m tailsrv.health`."""

import sys

from tailsrv.health.main import main

if __name__ == "__main__":  # pragma: no branch: this module is never imported
    sys.exit(main())
