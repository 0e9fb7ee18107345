"""Opens `log` in the folder argv[1] as a user who may not read it; prints why that fails."""

import os
import sys

from tailsrv.served_file import CannotServeError, open_file

os.chdir(sys.argv[1])
os.setgroups([])
os.setuid(65534)
try:
    open_file("log")
except CannotServeError as error:
    print(error)
