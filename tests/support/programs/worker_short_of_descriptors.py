"""Makes a worker that runs out of descriptors drop clients without a header.

It serves the file argv[1].
"""

import os
import resource
import socket
import sys
from pathlib import Path

from support.worker_bench import working
from tailsrv.worker.client import ClientState

with working(Path(sys.argv[1])) as bench:
    streaming, client = bench.connect(b"8\n")
    oldest, first = bench.connect()
    older, second = bench.connect()
    waiting = [bench.stack.enter_context(socket.create_connection(bench.address)) for _ in range(3)]
    spare = os.open("/", os.O_RDONLY)
    os.close(spare)
    resource.setrlimit(
        resource.RLIMIT_NOFILE, (spare, resource.getrlimit(resource.RLIMIT_NOFILE)[1])
    )
    bench.until(lambda: second.state is ClientState.CLOSED)
    assert first.state is ClientState.CLOSED
    assert client.state is ClientState.STREAMING
    bench.until(lambda: len(bench.worker.clients) == 3)
    bench.settle()
    for sock in (oldest, older):
        assert sock.recv(1) == b""
    for sock in waiting[1:]:
        sock.settimeout(20)
        sock.sendall(b"9\n")
        assert bench.receive(sock, 1) == b"9"
    assert bench.receive(streaming, 2) == b"89"
