"""Answers the check before an upgrade, in which the installed program shows that it can take over.

The running server starts the program with its own command line, and with its state at standard
input: see upgrade.py. The program reads that state, starts a worker, and waits until it is ready.
The worker has no listeners, and adopts one client, which is the program itself. So a version whose
workers do not start, or cannot adopt clients, is found before anything is replaced.
"""

import json
import os
import signal
import socket
import sys
import traceback
from contextlib import ExitStack
from dataclasses import replace
from typing import BinaryIO

from tailsrv import __version__
from tailsrv.config import Config
from tailsrv.linux.files import memory_file_with
from tailsrv.segments import Log, Segment
from tailsrv.served_file import CannotServeError, open_file
from tailsrv.shared_counts import SharedCounts
from tailsrv.supervisor import upgrade_state
from tailsrv.supervisor.restart_policy import describe_exit
from tailsrv.worker import worker
from tailsrv.worker_channel import MAX_PACKET, MessageError, WorkerReport, decode
from tailsrv.worker_context import Entry, WorkerContext

# Seconds that a worker may need until it is ready. The running server waits 30 seconds.
BOOT_TIMEOUT = 20.0
# Seconds to wait for a connection of this process to itself.
CONNECT_TIMEOUT = 1.0


def answer_check(config: Config) -> int:
    """Write this version to standard output and return 0, if this program can take over.

    Otherwise, write the reason to standard error and return 1.
    """
    try:
        upgrade_state.decode(sys.stdin.buffer.read())
        reason = boot_worker(config)
    except (upgrade_state.StateError, OSError) as error:
        reason = str(error)
    if reason:
        sys.stderr.write(f"{reason}\n")
        return 1
    sys.stdout.write(json.dumps({"version": __version__, "format": upgrade_state.FORMAT}) + "\n")
    return 0


def boot_worker(config: Config) -> str:
    """Start a worker, and return why it does not get ready, an empty text if it does.

    The worker ends when it finds that it has no supervisor. Raises OSError.
    """
    with ExitStack() as stack:
        errors = stack.enter_context(open(memory_file_with(b""), "rb"))
        ours, its_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        stack.enter_context(ours)
        client = _connect(stack)
        if (pid := os.fork()) == 0:
            ours.close()
            _run_worker(config, its_end, client, errors)
        its_end.close()
        if _reports_ready(ours):
            # The worker ends now. How it does so is of no interest.
            ours.close()
            os.waitpid(pid, 0)
            return ""
        os.kill(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        errors.seek(0)
        lines = errors.read().decode(errors="replace").strip().splitlines()
        return ": ".join(["its workers do not start", *(lines[-1:] or [describe_exit(status)])])


def _connect(stack: ExitStack) -> socket.socket | None:
    """Return the server's end of a connection to this process. `stack` closes both ends.

    Returns None if there is no IPv4 loopback address.
    """
    try:
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        # A firewall may discard the packets.
        listener.settimeout(CONNECT_TIMEOUT)
        ours = stack.enter_context(socket.socket())
        ours.settimeout(CONNECT_TIMEOUT)
        ours.connect(listener.getsockname())
        client = stack.enter_context(listener.accept()[0])
    except OSError:
        return None
    client.setblocking(False)
    return client


def _reports_ready(channel: socket.socket) -> bool:
    """Wait for the worker's first report, and return whether it is ready."""
    channel.settimeout(BOOT_TIMEOUT)
    try:
        report = decode(channel.recv(MAX_PACKET))
    except (OSError, MessageError):
        return False
    return isinstance(report, WorkerReport) and report.notices.ready


def _run_worker(
    config: Config, channel: socket.socket, client: socket.socket | None, errors: BinaryIO
) -> None:
    """In the forked child, do the work of a worker, and exit."""
    status = os.EX_SOFTWARE
    try:
        os.dup2(errors.fileno(), 2)
        channel.setblocking(False)
        status = worker.work(_context(config, channel, client), replace(config, orphan_timeout=0.0))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def _context(config: Config, channel: socket.socket, client: socket.socket | None) -> WorkerContext:
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
        # Its stream has begun at byte 0, if there is a file.
        clients={0: Entry(client.detach(), None if file is None else 0)} if client else {},
        sockets=[],
        predecessors=[],
    )
