"""Monitors the file argv[1] twice where only one inotify instance is available.

Prints what the second monitor reports about that, and the error that Hints raises.
"""

import errno
import os
import resource
import sys

from tailsrv.linux.inotify import Hints, Watch

file = os.open(sys.argv[1], os.O_RDONLY)
Watch(file, sys.argv[1]).close()
spare = os.open("/", os.O_RDONLY)
first = os.open("/", os.O_RDONLY)
soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (first + 1, hard))
os.close(first)
held = Watch(file, sys.argv[1])
assert held.polling is None, held.polling
watch = Watch(file, sys.argv[1])
print(watch.polling, watch.fileno(), watch.size())
try:
    Hints()
except OSError as error:
    print("no hints:", errno.errorcode[error.errno or 0])
held.close()
watch.close()
# The measurement of coverage needs descriptors at exit.
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
