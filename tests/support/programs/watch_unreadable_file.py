"""Monitors the file argv[1] as a user who loses the permission to read it.

The change of the permission is requested and confirmed at the descriptor argv[2].
"""

import ctypes
import os
import sys

from tailsrv.linux.inotify import Watch

file = os.open(sys.argv[1], os.O_RDONLY)
os.setgroups([])
os.setuid(65534)
# PR_SET_DUMPABLE: without it, /proc/self/fd is inaccessible after the change of user.
ctypes.CDLL(None).prctl(4, 1)
watch = Watch(file, "log")
assert watch.polling is None, watch.polling
os.write(int(sys.argv[2]), b"ready")
sys.stdin.read()
watch.follow(True)
print(watch.polling, watch.size())
watch.close()
