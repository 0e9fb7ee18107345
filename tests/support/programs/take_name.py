"""Listens at the name of the server argv[1] until it reads a line."""

import socket
import sys

listener = socket.socket(socket.AF_UNIX)
listener.bind("\0tailsrv:" + sys.argv[1])
listener.listen()
print("listening", flush=True)
input()
