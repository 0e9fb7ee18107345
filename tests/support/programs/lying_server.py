"""Sends the file argv[3] once on each connection to port argv[2], with the error argv[1].

The error is a wrong byte, an additional byte, or the end of the stream.
"""

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
