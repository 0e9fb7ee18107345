"""Opens `log` in the folder argv[1] as a user without read permission, and prints the hint."""

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
