"""Makes and closes sockets with names in an endless loop."""

import os
import socket

print("ready", flush=True)
for turn in range(1_000_000_000):
    sockets = []
    for number in range(60):
        sockets.append(socket.socket(socket.AF_UNIX))
        sockets[-1].bind(f"\0x{os.getpid()}-{turn * 60 + number}")
    for sock in sockets:
        sock.close()
