"""Takes what workers report into their slots' rosters."""

import logging
import os
import resource
import socket
import time
from collections.abc import Callable, Sequence

from tailsrv.channel import (
    MAX_PACKET,
    MAX_REPORTED_SOCKETS,
    NO_NOTICES,
    MessageError,
    Notices,
    WorkerReport,
    decode,
)
from tailsrv.linux.event_loop import MEMORY_RETRY, EventLoop
from tailsrv.log import RateLimited, fields, logger
from tailsrv.supervisor.slot import Slot

# descriptors that clients do not get: a successor's channel, a proof's files and a health check need some
RESERVED_DESCRIPTORS = 32

# Clients who come or go that a worker's reports may speak of in one turn. In a flood it reports on and on: that must not keep us from
# signals and the other workers, nor us, where we share its processor, from giving way to it.
CLIENTS_PER_TURN = 32

# for what a worker has said before it ended, should the kernel have no memory for it; it cannot be asked again
FINAL_READS = 3

# seconds after reports; more of them may wait in their channel, while workers need the processors
REPORT_PAUSE = 0.002


class ReportReader:
    """The supervisor's ear at the channels of `slots`: `notice(slot, notices)` is called with what is not about clients."""

    def __init__(
        self, slots: Sequence[Slot], loop: EventLoop, notice: Callable[[Slot, Notices], None]
    ) -> None:
        # reports came in this turn
        self._busy = False
        # and more may have than were taken in
        self._behind = False
        self._slots, self._loop, self._notice = slots, loop, notice
        self._protects = True
        self._highest = resource.getrlimit(resource.RLIMIT_NOFILE)[0] - RESERVED_DESCRIPTORS
        self._short_of_room = RateLimited(logging.WARNING, burst=1)

    def unprotected(self) -> int:
        """Return the number of clients that would die with their worker."""
        return sum(len(slot.client_table.unprotected) for slot in self._slots)

    @property
    def protects_clients(self) -> bool:
        """Whether clients outlive their worker, as long as there is room for their duplicates."""
        return self._protects

    def stop_protecting(self) -> None:
        """Keep no duplicate of a client's socket from now on: its stream could not be continued."""
        logger.warning(
            "this system does not tell how much of a stream has been sent: clients will be disconnected if their worker dies: %s",
            fields(hint="use Linux 4.1 or later, not a sandbox that resembles it"),
        )
        self._protects, self._highest = False, -1
        for slot in self._slots:
            clients = list(slot.client_table.clients)
            slot.client_table.remove(clients)
            slot.client_table.unprotected.update(clients)

    def read_reports(self, slot: Slot) -> None:
        """Take in what the worker of `slot` has reported, so much of it as goes into one turn."""
        left = CLIENTS_PER_TURN
        while left > 0:
            if not (taken := self._read_packet(slot)):
                return
            left -= taken
            self._busy = True
        self._behind = True

    def yield_to_workers(self) -> None:
        """Let the workers go first, at the end of a turn with reports; in a flood of them only for as long as they want the processor."""
        if self._behind:
            os.sched_yield()
        elif self._busy:
            time.sleep(REPORT_PAUSE)
        self._busy = self._behind = False

    def read_remaining(self, slot: Slot) -> None:
        """Take in all that the worker of `slot` has reported before it ended."""
        for _ in range(FINAL_READS):
            while self._read_packet(slot):
                pass

    def _read_packet(self, slot: Slot) -> int:
        """Take in one packet and return how much there was in it, at least 1, or 0 if there was none."""
        assert slot.channel is not None
        try:
            packet, sockets, _, _ = socket.recv_fds(
                slot.channel, MAX_PACKET, MAX_REPORTED_SOCKETS, socket.MSG_CMSG_CLOEXEC
            )
        except ConnectionResetError:
            # it has ended with a message of ours unread: that is told once, before what it still had to say
            return 1
        except BlockingIOError:
            return 0
        except OSError:
            # no memory for it now
            # else this is its last chance
            if slot.pid is not None:
                self._loop.stall(slot.channel.fileno(), MEMORY_RETRY)
            return 0
        # the worker is ending: SIGCHLD comes next, and the worker is buried then
        if not packet:
            self._loop.unregister(slot.channel.fileno())
            return 0
        try:
            report = decode(packet)
            if not isinstance(report, WorkerReport):
                raise MessageError(f"not a report: {report!r}")
        except MessageError as error:
            logger.error("worker speaks nonsense: %s", fields(slot=slot.index, reason=error))
            for fd in sockets:
                os.close(fd)
            return 1
        self._apply_report(slot, report, sockets)
        return 1 + len(report.joined) + len(report.left)

    def _apply_report(self, slot: Slot, report: WorkerReport, sockets: Sequence[int]) -> None:
        exposed = slot.client_table.add(
            report.joined, [self._below_reserve(fd) for fd in sockets], self._highest
        )
        if exposed and self._protects:
            self._short_of_room(
                "no descriptor left to protect clients with, they would not survive their worker",
                unprotected=self.unprotected(),
            )
        for client, offset in report.started:
            slot.client_table.set_start(client, offset)
        slot.client_table.remove(report.left)
        if report.notices != NO_NOTICES:
            self._notice(slot, report.notices)

    def _below_reserve(self, fd: int) -> int:
        """Return `fd`, under a lower number if it is one of those that clients do not get.

        That takes a place from the oldest client that has not sent its header: strangers must not use up what protects others.
        """
        if fd <= self._highest or not any(
            slot.client_table.unprotect_oldest_headerless() for slot in self._slots
        ):
            return fd
        lower = os.dup(fd)
        os.close(fd)
        return lower
