"""Connects with TCP Fast Open to a plain listener, to one of tailsrv, and to a passed one.

After each connection it prints how many the kernel has accepted before the end of a handshake.
"""

import socket

from tailsrv.listeners import open_listeners, take_listeners


def count() -> int:
    with open("/proc/net/netstat") as file:
        names, values = [line.split() for line in file if line.startswith("TcpExt:")]
    return int(values[names.index("TCPFastOpenPassive")])


def visit(listener: socket.socket) -> None:
    with socket.socket() as far:
        far.sendto(b"0", socket.MSG_FASTOPEN, listener.getsockname())
        listener.settimeout(20)
        listener.accept()[0].close()
        print(count())


def plain() -> socket.socket:
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    return listener


visit(plain())
for [listener] in open_listeners(["127.0.0.1"], 0, 1):
    visit(listener)
visit(take_listeners([plain().detach()])[0])
