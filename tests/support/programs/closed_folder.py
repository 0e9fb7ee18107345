"""Prints what is said of the file argv[1] to a user who may not enter one of its folders."""

import errno
import os
import sys

from tailsrv.error_hints import cannot_open

os.setgroups([])
os.setgid(65534)
os.setuid(65534)
print(cannot_open(sys.argv[1], OSError(errno.EACCES, "")))
