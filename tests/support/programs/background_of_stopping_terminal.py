"""Runs Python code, with arguments, in the background of its terminal after `stty tostop`.

Fails if the kernel stops that process.
"""

import os
import subprocess
import sys
import termios

attributes = termios.tcgetattr(0)
attributes[3] |= termios.TOSTOP
termios.tcsetattr(0, termios.TCSANOW, attributes)
process = subprocess.Popen([sys.executable, "-c", *sys.argv[1:]], process_group=0)
_, status = os.waitpid(process.pid, os.WUNTRACED)
process.kill()
sys.exit(os.WIFSTOPPED(status) or status != 0)
