"""Becomes the program in argv[2:] with the terminal argv[1], not its own, as standard input."""

import os
import sys

os.dup2(os.open(sys.argv[1], os.O_RDWR | os.O_NOCTTY), 0)
os.execv(sys.argv[2], sys.argv[2:])
