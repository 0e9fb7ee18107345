"""Runs tailsrv with workers that do what argv[1] says instead of their work."""

import errno
import os
import resource
import signal
import sys
from collections.abc import Callable

# as `python -m tailsrv` has it: the checkout comes before what is installed
sys.path.insert(0, os.getcwd())

from tailsrv import main as cli
from tailsrv.channel import Notices, WorkerReport, encode
from tailsrv.config import Config, Timing
from tailsrv.inheritance import Inheritance
from tailsrv.worker import worker


def one_is_ready(inheritance: Inheritance, config: Config) -> int:  # noqa: ARG001
    """Be ready in slot 0, and nothing in the others."""
    if inheritance.slot == 0:
        say_ready(inheritance)
    signal.pause()
    return 0


def no_descriptors(inheritance: Inheritance, config: Config) -> int:
    """Work with two descriptors left."""
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
    status = worker.work(inheritance, config)
    # who measures coverage needs some at the end
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return status


def six_find(error: Exception) -> Callable[[Inheritance, Config], int]:
    """Return the work of workers of which the second to the seventh meet `error`."""

    def work(inheritance: Inheritance, config: Config) -> int:
        with open(config.path + ".lives", "ab", buffering=0) as lives:
            lives.write(b".")
            if 1 < lives.tell() <= 7:
                raise error
        signal.set_wakeup_fd(-1)
        return worker.work(inheritance, config)

    return work


def one_cannot_boot(inheritance: Inheritance, config: Config) -> int:  # noqa: ARG001
    """End in slot 1 as a worker does that cannot boot."""
    if inheritance.slot != 1:
        signal.pause()
    return 3


def fails(inheritance: Inheritance, config: Config) -> int:  # noqa: ARG001
    """End before being ready."""
    return 1


def crashes(inheritance: Inheritance, config: Config) -> int:  # noqa: ARG001
    """Die before being ready."""
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGSEGV])
    os.kill(os.getpid(), signal.SIGSEGV)
    return 0


def ready_and_fails(inheritance: Inheritance, config: Config) -> int:  # noqa: ARG001
    """Be ready, and end."""
    say_ready(inheritance)
    return 1


def ready_and_raises(inheritance: Inheritance, config: Config) -> int:  # noqa: ARG001
    """Be ready, and end by an exception."""
    say_ready(inheritance)
    return list[int]()[0]


def say_ready(inheritance: Inheritance) -> None:
    """Tell the supervisor that this worker is ready."""
    inheritance.channel.send(encode(WorkerReport(notices=Notices(ready=True))))


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
