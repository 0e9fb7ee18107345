"""Watches the file argv[1] as a user who may not read it any more once the word at the descriptor argv[2] has been answered."""

import ctypes
import os
import sys

from tailsrv.linux.inotify import Watch

file = os.open(sys.argv[1], os.O_RDONLY)
os.setgroups([])
os.setuid(65534)
# PR_SET_DUMPABLE: or /proc/self/fd would be closed to us, after this change of user
ctypes.CDLL(None).prctl(4, 1)
watch = Watch(file, "log")
assert watch.polling is None, watch.polling
os.write(int(sys.argv[2]), b"ready")
sys.stdin.read()
watch.follow(True)
print(watch.polling, watch.size())
watch.close()
