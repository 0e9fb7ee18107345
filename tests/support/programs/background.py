"""Runs the rest of argv in the background of the terminal argv[1] after `stty tostop`.

Fails if the kernel stops that program.
"""

import os
import sys
import termios

terminal = os.open(sys.argv[1], os.O_RDWR)
attributes = termios.tcgetattr(terminal)
attributes[3] |= termios.TOSTOP
termios.tcsetattr(terminal, termios.TCSANOW, attributes)
pid = os.fork()
if pid == 0:
    os.setpgid(0, 0)
    for fd in range(3):
        os.dup2(terminal, fd)
    os.execv(sys.argv[2], sys.argv[2:])
_, status = os.waitpid(pid, os.WUNTRACED)
sys.exit(1 if os.WIFSTOPPED(status) else os.waitstatus_to_exitcode(status))
