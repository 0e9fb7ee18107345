"""Closes a forked child's copy of the lock of the names in argv."""

import os
import sys

from tailsrv.control_socket import Control, find_supervisor

control = Control.lock(sys.argv[1:])
if (pid := os.fork()) == 0:
    control.close()
    os._exit(0)
assert os.waitpid(pid, 0)[1] == 0
assert find_supervisor(sys.argv[1]) == os.getpid()
control.close()
