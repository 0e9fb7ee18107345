"""Prints the answer of the control socket of the server argv[1]; asks as user argv[2] if given."""

import os
import socket
import sys

if len(sys.argv) > 2:
    os.setgroups([])
    os.setuid(int(sys.argv[2]))
with socket.socket(socket.AF_UNIX) as sock:
    sock.settimeout(20)
    sock.connect("\0tailsrv:" + sys.argv[1])
    sys.stdout.buffer.write(sock.recv(65536))
