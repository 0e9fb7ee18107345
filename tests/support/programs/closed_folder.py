"""Prints the hint about the file argv[1] for a user who may not search one of its folders."""

import errno
import os
import sys

from tailsrv.error_hints import cannot_open

os.setgroups([])
os.setgid(65534)
os.setuid(65534)
print(cannot_open(sys.argv[1], OSError(errno.EACCES, "")))
