"""Makes a worker serve `log` in the folder argv[1] where no inotify instance is available."""

import encodings.idna  # noqa: F401
import os
import sys
from contextlib import ExitStack
from pathlib import Path

from inotify_simple import INotify

from support.files import append
from support.worker_bench import working

os.chdir(sys.argv[1])
os.setgroups([])
os.setuid(3_000_000_000 + os.getpid())
with ExitStack() as held:
    try:
        while True:
            held.enter_context(INotify())
    except OSError:
        pass
    bench = held.enter_context(working(Path("log")))
    assert "max_user_instances" in (bench.watch.polling or ""), bench.watch.polling
    bench.worker.file_monitor.poll_file()
    far, client = bench.connect(b"-0\n")
    for number in range(1, 4):
        append(Path("log"), b"more")
        bench.skew = 10.0 * number
        assert bench.receive(far, 4) == b"more"
    os.rename("log", "log.1")
    bench.skew = 50.0
    bench.until(lambda: bench.worker.file_monitor.gone)
