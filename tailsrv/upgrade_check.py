"""Answers the check before an upgrade, in which the installed program shows that it can take over.

The running server starts the program with its own command line, and with its state at standard
input: see upgrade.py. The program reads that state, and boots a worker until this is ready to
serve. It has no listeners and no clients, so nobody notices. A version whose workers do not start is
found before anything is replaced.
"""

import json
import os
import signal
import socket
import sys
import tempfile
import traceback
from dataclasses import replace
from typing import BinaryIO

from tailsrv import __version__
from tailsrv.config import Config
from tailsrv.segments import Log, Segment
from tailsrv.served_file import CannotServeError, open_file
from tailsrv.shared_counts import SharedCounts
from tailsrv.supervisor import upgrade_state
from tailsrv.supervisor.restart_policy import describe_exit
from tailsrv.worker import worker
from tailsrv.worker_channel import MAX_PACKET, WorkerReport, decode
from tailsrv.worker_context import WorkerContext


def answer_check(config: Config) -> int:
    """Write this version to standard output and return 0, if this program can take over.

    Otherwise, write the reason to standard error and return 1.
    """
    try:
        upgrade_state.decode(sys.stdin.buffer.read())
    except upgrade_state.StateError as error:
        reason = str(error)
    else:
        reason = boot_worker(config)
    if reason:
        sys.stderr.write(f"{reason}\n")
        return 1
    sys.stdout.write(json.dumps({"version": __version__, "format": upgrade_state.FORMAT}) + "\n")
    return 0


def boot_worker(config: Config) -> str:
    """Boot a worker, and return why it does not get ready, an empty text if it does.

    It ends when it finds that it has no supervisor.
    """
    ours, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with tempfile.TemporaryFile() as errors, ours:
        if (pid := os.fork()) == 0:
            ours.close()
            _run_worker(config, its_end, errors)
        its_end.close()
        packet = ours.recv(MAX_PACKET)
        report = decode(packet) if packet else None
        if isinstance(report, WorkerReport) and report.notices.ready:
            # Its end does not matter. It is killed if it does not end by itself.
            ours.close()
            os.waitpid(pid, 0)
            return ""
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines()
        return ": ".join(["its workers do not start", *(lines[-1:] or [describe_exit(status)])])


def _run_worker(config: Config, channel: socket.socket, errors: BinaryIO) -> None:
    """In the forked child, do the work of a worker, and exit."""
    status = os.EX_SOFTWARE
    try:
        os.dup2(errors.fileno(), 2)
        channel.setblocking(False)
        status = worker.work(_context(config, channel), replace(config, orphan_timeout=0.0))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _context(config: Config, channel: socket.socket) -> WorkerContext:
    try:
        file = open_file(config.path)
    except CannotServeError:
        # The workers of the server inherit the file, which it could open once.
        file = None
    return WorkerContext(
        slot=0,
        log=None if file is None else Log([Segment(0, file)]),
        ends=SharedCounts(1) if config.follow_name else None,
        opened_at=SharedCounts(1) if config.follow_name else None,
        frozen_end=None,
        truncated=False,
        listeners=[],
        shared=False,
        channel=channel,
        endpoints=["upgrade check"],
        client_limit=None,
        clients={},
        sockets=[],
        predecessors=[],
    )
