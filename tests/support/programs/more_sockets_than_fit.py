"""Receives ten descriptors where only four can be opened.

Prints the protected and the unprotected clients of the table, and whether the kernel reports that
descriptors are missing.
"""

import os
import resource
import socket

from tailsrv.supervisor.client_table import ClientTable

ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sent = [os.dup(0) for _ in range(10)]
socket.send_fds(theirs, [b"ten"], sent)
for fd in sent:
    os.close(fd)
resource.setrlimit(resource.RLIMIT_NOFILE, (sent[0] + 4, sent[0] + 4))
_, sockets, flags, _ = socket.recv_fds(ours, 10, 253)
client_table = ClientTable()
print(
    client_table.add(range(10), sockets, 1000),
    sorted(client_table.clients),
    sorted(client_table.unprotected),
    bool(flags & socket.MSG_CTRUNC),
)
ours.close()
theirs.close()
