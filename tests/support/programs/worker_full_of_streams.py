"""Makes a worker that runs out of descriptors wait, because all of its clients are streaming.

It serves the file argv[1].
"""

import os
import resource
import socket
import sys
from pathlib import Path

from support.sockets import readable
from support.worker_bench import working

with working(Path(sys.argv[1])) as bench:
    streaming, client = bench.connect(b"8\n")
    bench.receive(streaming, 2)
    waiting = bench.stack.enter_context(socket.create_connection(bench.address))
    spare = os.open("/", os.O_RDONLY)
    os.close(spare)
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    listener = bench.listeners[0][0].fileno()
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare, hard))
    bench.until(lambda: listener not in bench.worker.loop.handlers)
    while readable(bench.worker.loop.epoll.fileno()):
        bench.worker.step(0)
    assert bench.worker.acceptor.start in bench.worker.loop.timers
    assert list(bench.worker.clients.values()) == [client]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    bench.skew = 60.0
    bench.until(lambda: len(bench.worker.clients) == 2)
    waiting.sendall(b"0\n")
    assert bench.receive(waiting, 10) == b"0123456789"
