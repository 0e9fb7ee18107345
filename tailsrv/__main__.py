"""`python -m tailsrv` is the command `tailsrv`."""

import sys

from tailsrv.cli import main

if __name__ == "__main__":  # pragma: no branch: nobody imports it
    sys.exit(main())
