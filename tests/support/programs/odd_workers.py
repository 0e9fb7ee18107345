"""Runs tailsrv with workers that do what argv[1] says instead of their normal work."""

import errno
import os
import resource
import signal
import sys
from collections.abc import Callable

# As with `python -m tailsrv`: the checkout comes before an installed package.
sys.path.insert(0, os.getcwd())

from tailsrv import main as cli
from tailsrv.config import Config, Timing
from tailsrv.worker import worker
from tailsrv.worker_channel import Notices, WorkerReport, encode
from tailsrv.worker_context import WorkerContext


def one_is_ready(context: WorkerContext, config: Config) -> int:  # noqa: ARG001
    """Be ready in slot 0, and never in the other slots."""
    if context.slot == 0:
        say_ready(context)
    signal.pause()
    return 0


def no_descriptors(context: WorkerContext, config: Config) -> int:
    """Work with two free descriptors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, hard))
    taken = []
    try:
        while True:
            taken.append(os.dup(0))
    except OSError:
        pass
    for fd in taken[-2:]:
        os.close(fd)
    status = worker.work(context, config)
    # The measurement of coverage needs descriptors at exit.
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return status


def six_find(error: Exception) -> Callable[[WorkerContext, Config], int]:
    """Return work in which the second to the seventh worker raise `error`."""

    def work(context: WorkerContext, config: Config) -> int:
        with open(config.path + ".lives", "ab", buffering=0) as lives:
            lives.write(b".")
            if 1 < lives.tell() <= 7:
                raise error
        signal.set_wakeup_fd(-1)
        return worker.work(context, config)

    return work


def one_cannot_boot(context: WorkerContext, config: Config) -> int:  # noqa: ARG001
    """Exit in slot 1 with the status of a worker that cannot boot."""
    if context.slot != 1:
        signal.pause()
    return 3


def fails(context: WorkerContext, config: Config) -> int:  # noqa: ARG001
    """Exit before being ready."""
    return 1


def crashes(context: WorkerContext, config: Config) -> int:  # noqa: ARG001
    """Die of a signal before being ready."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGSEGV])
    os.kill(os.getpid(), signal.SIGSEGV)
    return 0


def ready_and_fails(context: WorkerContext, config: Config) -> int:  # noqa: ARG001
    """Be ready, then exit."""
    say_ready(context)
    return 1


def ready_and_raises(context: WorkerContext, config: Config) -> int:  # noqa: ARG001
    """Be ready, then raise an exception."""
    say_ready(context)
    return list[int]()[0]


def say_ready(context: WorkerContext) -> None:
    """Tell the supervisor that this worker is ready."""
    context.channel.send(encode(WorkerReport(notices=Notices(ready=True))))


WORK = {
    "one is ready": one_is_ready,
    "no descriptors": no_descriptors,
    "six find no descriptor": six_find(OSError(errno.ENFILE, os.strerror(errno.ENFILE))),
    "six find no memory": six_find(MemoryError()),
    "one cannot boot": one_cannot_boot,
    "fails": fails,
    "crashes": crashes,
    "ready and fails": ready_and_fails,
    "ready and raises": ready_and_raises,
}
cli.work = WORK[sys.argv[1]]  # type: ignore[attr-defined,assignment]
sys.exit(cli.main(sys.argv[2:], timing=Timing(first_delay=0.01)))
