"""Sends the file argv[3] on each connection to port argv[2], once: as argv[1] says, with a wrong byte, one more, or its end."""

import socket
import sys
from pathlib import Path

kind, port, path = sys.argv[1:]
data = bytearray(Path(path).read_bytes())
if kind == "wrong":
    data[1000] ^= 1
if kind == "more":
    data += b"x"
held = []
with socket.create_server(("127.0.0.1", int(port)), backlog=100) as listener:
    while True:
        held.append(listener.accept()[0])
        held[-1].recv(100)
        held[-1].sendall(data)
        if kind == "ends":
            held.pop().close()
