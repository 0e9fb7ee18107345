"""Answers at the name argv[1] as user argv[2] to user argv[3], and prints what that user gets."""

import os
import select
import socket
import sys

from tailsrv.control_socket import Control

server, asker = int(sys.argv[2]), int(sys.argv[3])
ready, told = os.pipe()
if (pid := os.fork()) == 0:
    os.read(ready, 1)
    os.setgroups([])
    os.setuid(asker)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect("\0tailsrv:" + sys.argv[1])
        print(sock.recv(1000).decode(), flush=True)
    os._exit(0)
os.setgroups([])
os.setuid(server)
control = Control.lock([sys.argv[1]])
os.write(told, b"!")
assert select.select(control.status, [], [], 20)[0]
for peer in control.accept_authorized(control.status[0])[0]:
    with peer:
        peer.send(b"status")
control.close()
os.waitpid(pid, 0)
