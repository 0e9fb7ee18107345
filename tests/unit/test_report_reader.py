"""Tests of the supervisor's report reader."""

import socket
from collections.abc import Callable, Iterator

import pytest

from tailsrv.linux.event_loop import EventLoop
from tailsrv.supervisor.report_reader import CLIENTS_PER_TURN, ReportReader
from tailsrv.supervisor.slot import Slot, WorkerProcess
from tailsrv.worker_channel import Notices, Ping, WorkerReport, encode


@pytest.fixture
def channel() -> Iterator[tuple[socket.socket, socket.socket]]:
    """Give the supervisor's end of a channel, and the worker's end."""
    supervisor_end, worker_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with supervisor_end, worker_end:
        supervisor_end.setblocking(False)
        yield supervisor_end, worker_end


def test_turn_reads_a_bounded_number_of_reports(
    channel: tuple[socket.socket, socket.socket],
) -> None:
    """A turn reads a bounded number of clients, and the reports of a dead worker are all read."""
    received: list[Notices] = []
    loop = EventLoop()
    slot = Slot(0, [], worker=(worker := WorkerProcess(0, 0, channel[0], 0.0)))
    report_reader = ReportReader([slot], loop)
    for size in range(10):
        channel[1].send(
            encode(
                WorkerReport(
                    left=list(range(CLIENTS_PER_TURN // 2)), notices=Notices(truncated=size)
                )
            )
        )
    received += report_reader.read_reports(slot, worker)
    assert [notices.truncated for notices in received] == [0, 1]
    received += report_reader.read_reports(slot, worker)
    assert [notices.truncated for notices in received] == [0, 1, 2, 3]
    received += report_reader.read_remaining(slot, worker)
    assert [notices.truncated for notices in received] == list(range(10))
    loop.epoll.close()


@pytest.mark.parametrize("read", [ReportReader.read_reports, ReportReader.read_remaining])
def test_reports_of_a_worker_that_left_a_message_unread(
    channel: tuple[socket.socket, socket.socket],
    read: Callable[[ReportReader, Slot, WorkerProcess], object],
) -> None:
    """All reports of a worker are read, even if it exited with a message unread.

    The kernel reports that once, as a reset, before the data that the worker had sent.
    """
    loop = EventLoop()
    slot = Slot(0, [], worker=(worker := WorkerProcess(0, 0, channel[0], 0.0, dead=True)))
    report_reader = ReportReader([slot], loop)
    with socket.socket() as client:
        socket.send_fds(channel[1], [encode(WorkerReport(joined=[7]))], [client.fileno()])
    channel[1].send(encode(WorkerReport(started=[(7, 5, 9)])))
    channel[0].send(encode(Ping()))
    channel[1].close()
    read(report_reader, slot, worker)
    assert (slot.client_table.clients[7].start, slot.client_table.clients[7].end) == (5, 9)
    slot.client_table.close_in_child()
    loop.epoll.close()
