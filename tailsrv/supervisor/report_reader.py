"""Reads the workers' reports from their channels, and updates the client tables of their slots."""

import logging
import os
import resource
import socket
import time
from collections.abc import Sequence

from tailsrv.linux.event_loop import MEMORY_RETRY, EventLoop
from tailsrv.log import RateLimited, fields, logger
from tailsrv.supervisor.slot import Slot, WorkerProcess
from tailsrv.worker_channel import (
    MAX_PACKET,
    MAX_REPORTED_SOCKETS,
    NO_NOTICES,
    MessageError,
    Notices,
    WorkerReport,
    decode,
)

# Number of descriptors that are not used to protect clients. The supervisor needs some itself: for
# the channel of a new worker, the files of an upgrade's check, and health checks.
RESERVED_DESCRIPTORS = 32

# Largest number of reports, plus joined and departed clients in them, that the supervisor reads
# from one worker in a turn. Without this limit, a flood of reports would delay signals, the other
# workers and, on a shared CPU, the reporting worker itself. The last report may exceed the limit.
CLIENTS_PER_TURN = 32

# Number of attempts to read the last reports of a worker that has exited. The kernel may lack
# memory for one attempt, and the reports cannot be requested again.
FINAL_READS = 3

# Seconds to sleep after a turn with reports. Meanwhile the workers have the CPUs, and further
# reports wait in the channels.
REPORT_PAUSE = 0.002


class ReportReader:
    """Reads the channels of all `slots`.

    What reports say about clients goes into the slots' client tables.
    """

    def __init__(self, slots: Sequence[Slot], loop: EventLoop) -> None:
        self._slots, self._loop = slots, loop
        # Whether any reports were read in this turn.
        self._busy = False
        # Whether a channel may hold more reports than were read in this turn.
        self._more_pending = False
        self._protects = True
        # The highest descriptor number that a client's duplicate may have.
        self._highest = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - RESERVED_DESCRIPTORS
        self._out_of_descriptors = RateLimited(logging.WARNING, burst=1)

    def unprotected(self) -> int:
        """Return the number of clients that would lose their connection if their worker died."""
        return sum(len(slot.client_table.unprotected) for slot in self._slots)

    @property
    def protects_clients(self) -> bool:
        """Whether clients keep their connections when their worker dies.

        Even then, a client is protected only if there was a free descriptor for its duplicate.
        """
        return self._protects

    def stop_protecting(self) -> None:
        """Close all duplicates of clients' sockets, and keep none from now on.

        Call this if the kernel does not count the bytes sent: without that number, no other worker
        could continue a stream.
        """
        logger.warning(
            "this system does not tell how much of a stream has been sent: "
            "clients will be disconnected if their worker dies: %s",
            fields(hint="use Linux 4.1 or later, not a sandbox that resembles it"),
        )
        self._protects, self._highest = False, -1
        for slot in self._slots:
            clients = list(slot.client_table.clients)
            slot.client_table.remove(clients)
            slot.client_table.unprotected.update(clients)

    def read_reports(self, slot: Slot, worker: WorkerProcess) -> list[Notices]:
        """Read reports of the `worker` of `slot`, up to the limit of one turn.

        Returns what they say about the worker or the file.
        """
        notices: list[Notices] = []
        left = CLIENTS_PER_TURN
        while left > 0:
            if not (cost := self._read_packet(slot, worker, notices)):
                return notices
            left -= cost
            self._busy = True
        self._more_pending = True
        return notices

    def yield_to_workers(self) -> None:
        """At the end of a turn with reports, let the workers run before the supervisor continues.

        Usually that is a short sleep. If reports are still pending, the supervisor only yields the
        CPU to the tasks that are ready to run.
        """
        if self._more_pending:
            os.sched_yield()
        elif self._busy:
            time.sleep(REPORT_PAUSE)
        self._busy = self._more_pending = False

    def read_remaining(self, slot: Slot, worker: WorkerProcess) -> list[Notices]:
        """Read all remaining reports of the `worker` of `slot`, which has exited.

        Returns what they say about the worker or the file.
        """
        notices: list[Notices] = []
        for _ in range(FINAL_READS):
            while self._read_packet(slot, worker, notices):
                pass
        return notices

    def _read_packet(self, slot: Slot, worker: WorkerProcess, notices: list[Notices]) -> int:
        """Read one packet from the channel of `worker`, and add what it says to `notices`.

        Returns what it counts against `CLIENTS_PER_TURN`, at least 1, or 0 if there was no packet.
        """
        channel = worker.channel
        try:
            packet, sockets, _, _ = socket.recv_fds(
                channel, MAX_PACKET, MAX_REPORTED_SOCKETS, socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionResetError:
            # The worker has exited without reading the supervisor's last message. The kernel
            # reports that once, before the data that the worker had sent.
            return 1
        except BlockingIOError:
            return 0
        except OSError:
            # The kernel lacks memory for the packet. Retry soon. If the worker has been reaped,
            # read_remaining() retries instead, and then the channel is closed.
            if slot.worker is worker:
                self._loop.stall(channel.fileno(), MEMORY_RETRY)
            return 0
        # End of file: the worker is exiting. It is reaped on SIGCHLD. Should it live on, it would
        # take this process for dead, and keep its clients for another supervisor.
        if not packet:
            self._loop.unregister(channel.fileno())
            # A process that is exiting has its exit status already.
            worker.kill()
            return 0
        try:
            report = decode(packet)
            if not isinstance(report, WorkerReport):
                raise MessageError(f"not a report: {report!r}")
        except MessageError as error:
            logger.error(
                "ignored a malformed report: clients in it may be lost if their worker dies: %s",
                fields(slot=slot.index, reason=error, hint="please report this bug"),
            )
            for fd in sockets:
                os.close(fd)
            return 1
        self._apply_report(slot, report, sockets)
        if report.notices != NO_NOTICES:
            notices.append(report.notices)
        return 1 + len(report.joined) + len(report.left)

    def _apply_report(self, slot: Slot, report: WorkerReport, sockets: Sequence[int]) -> None:
        unprotected = slot.client_table.add(
            report.joined, [self._below_reserve(fd) for fd in sockets], self._highest
        )
        if unprotected and self._protects:
            self._out_of_descriptors(
                "out of file descriptors: new clients will be disconnected if their worker dies",
                unprotected=self.unprotected(),
                hint="raise LimitNOFILE= or ulimit -Hn",
            )
        for client, start, end in report.started:
            slot.client_table.set_start(client, start, end)
        slot.client_table.remove(report.left)

    def _below_reserve(self, fd: int) -> int:
        """Return `fd`, or a lower descriptor in its place if `fd` is above the highest for clients.

        The lower descriptor is taken from the oldest client that has not started a stream. That
        client becomes unprotected. Untrusted clients can connect without sending a header, and must
        not use up the descriptors that protect streams.
        """
        if fd <= self._highest or not any(
            slot.client_table.unprotect_oldest_headerless() for slot in self._slots
        ):
            return fd
        lower = os.dup(fd)
        os.close(fd)
        return lower
