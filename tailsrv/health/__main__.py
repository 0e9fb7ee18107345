"""`python -m tailsrv.health` is the command `tailsrv-health`."""

import sys

from tailsrv.health.main import main

if __name__ == "__main__":  # pragma: no branch: nobody imports it
    sys.exit(main())
