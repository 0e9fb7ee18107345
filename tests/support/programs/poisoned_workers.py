"""Runs tailsrv with workers that die of any client whose header is 666."""

import os
import signal
import sys
from collections.abc import Mapping

# As with `python -m tailsrv`: the checkout comes before an installed package.
sys.path.insert(0, os.getcwd())

from tailsrv import main as cli
from tailsrv.control_socket import Control
from tailsrv.listeners import endpoints, open_listeners
from tailsrv.log import logger, set_up
from tailsrv.segments import Log, Segment
from tailsrv.served_file import open_file
from tailsrv.supervisor.log_store import Restored
from tailsrv.supervisor.slot import Slot
from tailsrv.supervisor.supervisor import Supervisor
from tailsrv.worker import worker
from tailsrv.worker.client import Client
from tailsrv.worker_context import Entry, WorkerContext


def die() -> None:
    """End the process in the way that argv[1] names."""
    match how:
        case "raise":
            raise RuntimeError("poison")
        case "exit":
            os._exit(1)
        case _:
            os.kill(os.getpid(), getattr(signal, how))


class Poisoned(worker.Worker):
    """A worker that dies of a client that starts at byte 666."""

    def adopt(self, entries: Mapping[int, Entry]) -> None:
        if any(entry.start == 666 for entry in entries.values()):
            die()
        super().adopt(entries)

    def start_stream(self, client: Client, offset: int, end: int | None) -> None:
        super().start_stream(client, offset, end)
        if offset == 666:
            die()


def work(context: WorkerContext) -> int:
    """Do the work of a worker with a `Poisoned` loop."""
    # In this child only.
    worker.Worker = Poisoned  # type: ignore[misc]
    return worker.work(context, config)


how = sys.argv.pop(1)
config, verbosity = cli.parse(None)
set_up(verbosity)
file = open_file(config.path)
listeners = open_listeners(config.bind, config.port or 0, config.workers)
port = listeners[0][0].getsockname()[1]
names = endpoints(config.bind, port)
logger.info("listening: port=%d", port)
slots = [Slot(index, sockets) for index, sockets in enumerate(listeners)]
supervisor = Supervisor(config, slots, names, Control.lock(names), work)
assert file is not None
supervisor.begin(Restored(Log([Segment(0, file)]), [], 0))
sys.exit(supervisor.run())
