"""Runs the epoll loop of one process: accepts, reads headers, streams, and drains when told to.

Nothing here may wait for a client, and nothing is held that the supervisor or the kernel does not know.
"""

import gc
import logging
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Mapping
from itertools import count

from setproctitle import setproctitle

from tailsrv.channel import MAX_PACKET, Drain, Message, Ping, decode
from tailsrv.config import Config, ExitStatus
from tailsrv.inheritance import Entry, Inheritance
from tailsrv.linux.event_loop import MEMORY_RETRY, EventLoop
from tailsrv.linux.inotify import NoFile, Watch
from tailsrv.linux.process_title import ProcessTitle
from tailsrv.linux.signals import STRAY, Wakeup, ignore_io_signals, unblock_all
from tailsrv.linux.sockets import (
    bytes_streamed,
    discard,
    lacks_room,
    shut_down_writing,
    take_socket,
)
from tailsrv.log import RateLimited, fields, logger
from tailsrv.protocol import Start
from tailsrv.stray_signals import StraySignals
from tailsrv.titles import worker_title
from tailsrv.worker.acceptor import Acceptor
from tailsrv.worker.client import Client, ClientState
from tailsrv.worker.dead_peers import DeadPeers
from tailsrv.worker.drain import Drainer
from tailsrv.worker.file_monitor import FileMonitor
from tailsrv.worker.header_reader import HeaderReader
from tailsrv.worker.reporter import Reporter
from tailsrv.worker.streams import Streams

# Registered once, edge-triggered: no epoll_ctl per event, and a socket that stays readable is told of once. EPOLLOUT is
# asked for when a client blocks: asked for earlier, each new client's socket would be told of once more.
CLIENT_EVENTS = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
HUNG_UP = select.EPOLLHUP | select.EPOLLERR
INPUT = select.EPOLLIN | select.EPOLLRDHUP


def work(inheritance: Inheritance, config: Config) -> int:
    """Serve one slot until the supervisor says `drain` or is gone; return the exit status."""
    setproctitle(worker_title(inheritance.slot, inheritance.endpoints, "starting", 0))
    # what the supervisor made stays shared memory
    gc.freeze()
    # Ctrl-C reaches the whole foreground group
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # the supervisor gets one as well, and drains
    signal.signal(signal.SIGPWR, signal.SIG_IGN)
    # sendfile(2) has no MSG_NOSIGNAL
    ignore_io_signals()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    try:
        wakeup = Wakeup({signal.SIGTERM} | STRAY)
        unblock_all()
        worker = Worker(inheritance, config, wakeup)
    except OSError as error:
        logger.critical("worker cannot boot: %s", fields(slot=inheritance.slot, reason=error))
        return os.EX_TEMPFAIL if lacks_room(error) else ExitStatus.CANNOT_BOOT
    return worker.run()


class Worker:
    """The clients of one slot, and the loop that serves them."""

    def __init__(
        self,
        inheritance: Inheritance,
        config: Config,
        wakeup: Wakeup,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.slot = inheritance.slot
        self.config = config
        self.loop = EventLoop(clock)
        self.clients: dict[int, Client] = {}
        # to be closed at the end of the turn
        self.dropped: list[Client] = []
        self.draining = False
        # for the next file; they stay open until this worker ends
        self.aside: list[Client] = []
        self.ended = False
        self.numbers = count(max(inheritance.clients, default=-1) + 1)
        self.title = ProcessTitle(self.loop.timers, self.render_title)
        self.stray_signals = StraySignals(slot=self.slot)
        self.short_of_room = RateLimited(logging.WARNING, burst=1)
        self.failed = RateLimited(logging.ERROR)

        self.channel = inheritance.channel
        self.endpoints = inheritance.endpoints
        self.wakeup = wakeup
        self.loop.register(self.channel.fileno(), self.handle_channel)
        self.loop.register(wakeup.fileno(), self.handle_signal)
        # for the file: clients and their headers are left to a successor that has it
        self.waiting = inheritance.file is None
        self.watch = NoFile() if inheritance.file is None else Watch(inheritance.file, config.path)
        self.streams = Streams(self.watch.file, self.watch.size(), self.drop, self.await_writable)
        self.reporter = Reporter(self.channel, self.loop, self.start_stream, self.end)
        self.file_monitor = FileMonitor(
            self.watch,
            self.streams,
            self.reporter,
            self.loop,
            config.timing,
            insist=not config.linger,
        )
        self.header_reader = HeaderReader(
            self.slot,
            config.header_timeout,
            self.loop,
            self.file_monitor,
            self.streams,
            self.reporter,
            self.drop,
        )
        self.drainer = Drainer(self.loop, self.streams, self.file_monitor, self.drop)
        self.dead_peers = DeadPeers(self.slot, self.clients, self.loop, self.drop)
        self.adopt(inheritance.clients)
        self.acceptor = Acceptor(
            inheritance,
            self.loop,
            config.allow,
            self.handle_accepted,
            lambda: len(self.clients),
            self.free_descriptor,
        )
        self.acceptor.start()

    # The loop

    def run(self) -> int:
        """Serve until the end and return the exit status."""
        self.reporter.add_notice(ready=True)
        self.title.changed(self.loop.now)
        if not self.waiting:
            self.file_monitor.begin()
        self.reporter.send_and_start()
        while not self.ended:
            self.step(0 if self.streams.behind else self.loop.timeout())
        self.reporter.send_remaining()
        return ExitStatus.DONE

    def step(self, timeout: float | None) -> None:
        """Run one turn: wait, then serve whatever is ready."""
        for fd, mask in self.loop.wait(timeout):
            if (client := self.clients.get(fd)) is not None:
                self.handle_client(client, mask)
            elif (handler := self.loop.handlers.get(fd)) is not None:
                # else: it went earlier in this turn
                handler()
        self.loop.timers.run(self.loop.now)
        self.start_streams()
        if self.streams.behind:
            self.pump()
        if self.draining:
            self.drainer.finish_caught_up()
            self.ended = self.ended or not self.clients
        if self.dropped:
            self.close_dropped()
        # The file has grown in this turn, so clients that had caught up were sent bytes.
        if self.file_monitor.size_changed_at == self.loop.now:
            self.dead_peers.expect_acks()
        # last, for all of these look at the file, which may leave somebody without memory
        self.plan_retries()
        self.reporter.send_if_due()

    def start_streams(self) -> None:
        """Start the streams whose headers are there; before anything is sent in this turn, so that their first bytes are, too."""
        for client in tuple(self.reporter.joined):
            # most have sent their header by now: one report for both
            if client in self.header_reader:
                self.handle_client(client, select.EPOLLIN)
        if self.reporter.joined or self.reporter.starting:
            self.reporter.send_and_start()

    def pump(self) -> None:
        """Send to those who are behind, as much as one turn may."""
        self.streams.pump()
        self.dead_peers.expect_acks()
        if self.streams.shrunk:
            self.file_monitor.deliver_appends()
        # Whoever else wants this processor comes first, another worker or a client: else they wait until our time slice is over
        # [measured: beside 50 who replay, two workers on two processors, p99 of the caught-up 4.7 ms without it, 1.5 ms with it].
        # one alone is kept from its bytes by it, a tenth of the time
        if len(self.streams.behind) > 1:
            os.sched_yield()

    def plan_retries(self) -> None:
        """Come back in a moment to those for whom the disk, or the kernel's memory, was not ready."""
        if self.streams.read_ahead and self.streams.retry_disk not in self.loop.timers:
            self.loop.timers.set(
                self.streams.retry_disk, self.loop.now + self.streams.read_ahead.pause()
            )
        if self.streams.awaiting_memory and self.streams.retry_memory not in self.loop.timers:
            self.loop.timers.set(self.streams.retry_memory, self.loop.now + MEMORY_RETRY)

    # Connections

    def handle_accepted(self, sock: socket.socket, peer: tuple[str, int]) -> None:
        """Take in a connection that has just been accepted."""
        # in a burst of connections the caught-up wait for one of them at most, not for all
        self.file_monitor.deliver_appends()
        client = Client(next(self.numbers), sock, peer)
        if self.add_client(client):
            self.reporter.joined.append(client)

    def adopt(self, entries: Mapping[int, Entry]) -> None:
        """Take over the clients of the worker before us, each where the kernel says that its stream is."""
        for number, entry in entries.items():
            try:
                sock, peer = take_socket(entry.fd)
            except OSError:
                self.reporter.left.append(number)
                continue
            client = Client(number, sock, peer)
            if not self.add_client(client):
                self.reporter.left.append(number)
                continue
            try:
                self.resume_stream(client, entry.start)
            except Exception as error:
                # In a shortage the next worker may fare better, and costs nobody anything. Any other error is about this client.
                if lacks_room(error):
                    raise
                self.drop(client, error)

    def resume_stream(self, client: Client, start: int | None) -> None:
        """Go on with the stream of `client`, which began at `start`; with None, wait for its header."""
        if (sent := bytes_streamed(client.sock)) is None:
            self.drop(client)
        elif start is not None:
            self.header_reader.forget(client)
            self.streams.add(client, start + sent)
            # of what the worker before us has sent
            self.dead_peers.expect_acks()

    def add_client(self, client: Client) -> bool:
        """Take `client` in and tell whether that was possible."""
        try:
            self.loop.epoll.register(client.fd, CLIENT_EVENTS)
        except OSError as error:
            # fs.epoll.max_user_watches
            self.failed("client failed", slot=self.slot, peer=client, reason=error)
            client.sock.close()
            return False
        if not self.clients:
            self.file_monitor.set_following(True)
        self.clients[client.fd] = client
        self.header_reader.add(client)
        self.title.changed(self.loop.now)
        return True

    def await_writable(self, client: Client) -> None:
        """Ask to be told when the full socket of `client` has room; should it have some already, that is told at once."""
        self.loop.epoll.modify(client.fd, CLIENT_EVENTS | select.EPOLLOUT)

    def free_descriptor(self) -> bool:
        """Out of descriptors: the oldest connection without a header goes. Tell whether there is room at the end of this turn."""
        while not self.dropped and (oldest := self.header_reader.oldest()) is not None:
            # its header may have come in this very turn
            self.handle_client(oldest, select.EPOLLIN)
            if oldest in self.header_reader:
                self.short_of_room(
                    "short of descriptors, dropped the oldest connection without a header",
                    slot=self.slot,
                    peer=oldest,
                )
                self.drop(oldest)
        return bool(self.dropped)

    def handle_client(self, client: Client, mask: int) -> None:
        """Serve one client. What fails with it ends it alone; what fails in a look at the file may cost others bytes: it ends us."""
        if mask & ~select.EPOLLOUT:
            # in a burst of those who speak or leave, too, nobody waits for more than one of them
            self.file_monitor.deliver_appends()
        try:
            start = self.handle_events(client, mask)
        except Exception as error:
            # whatever it is, it must not reach the other clients
            self.drop(client, error)
            return
        if start is not None and self.waiting:
            self.header_reader.forget(client)
        elif start is not None:
            self.header_reader.schedule_start(client, start)

    def handle_events(self, client: Client, mask: int) -> Start | None:
        """Take in what has happened to the socket of `client`, and return where it wants to start if that is what it says."""
        if mask & HUNG_UP:
            self.drop(client)
            return None
        start = None
        if mask & INPUT:
            if client in self.header_reader:
                start = self.header_reader.read_or_refuse(
                    client, ended=bool(mask & select.EPOLLRDHUP)
                )
            elif client.state is not ClientState.AWAITING_HEADER:
                # its header may still be in the socket
                # also after its FIN, which is not a hang-up
                discard(client.sock)
        if mask & select.EPOLLOUT:
            self.streams.writable(client)
        return start

    def start_stream(self, client: Client, offset: int) -> None:
        """Start streaming to `client`, now that the supervisor knows where from."""
        # in a burst of those who start, too
        self.file_monitor.deliver_appends()
        try:
            self.begin_stream(client, offset)
        except Exception as error:
            # as in handle_client
            self.drop(client, error)

    def begin_stream(self, client: Client, offset: int) -> None:
        # the header, and all behind it
        discard(client.sock)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("client streams: %s", fields(slot=self.slot, peer=client, offset=offset))
        else:
            client.forget_peer()
        self.streams.add(client, offset)

    def drop(self, client: Client, error: Exception | None = None) -> None:
        """Stop serving `client`. Its socket is closed at the end of the turn, so that no other gets its number in it."""
        if client.state is ClientState.CLOSED:
            return
        if error is not None:
            self.failed(
                "client failed",
                slot=self.slot,
                peer=client,
                offset=self.streams.offset_of(client),
                reason=repr(error),
            )
        elif logger.isEnabledFor(logging.DEBUG):
            logger.debug(
                "client left: %s",
                fields(slot=self.slot, peer=client, offset=self.streams.offset_of(client)),
            )
        client.state = ClientState.CLOSED
        self.streams.remove(client)
        self.header_reader.forget(client)
        self.drainer.forget(client)
        del self.clients[client.fd]
        # closing alone does not end the events while somebody holds a duplicate
        self.loop.epoll.unregister(client.fd)
        self.dropped.append(client)
        self.reporter.add_departure(client)
        self.title.changed(self.loop.now)

    def close_dropped(self) -> None:
        for client in self.dropped:
            # a burst of closes takes as long as all that came before it
            self.file_monitor.deliver_appends()
            # unread input would turn the close into a reset, and that destroys what is queued
            discard(client.sock)
            shut_down_writing(client.sock)
            client.sock.close()
        self.dropped.clear()
        self.acceptor.update_count()
        if not self.clients:
            self.file_monitor.set_following(False)

    # The end

    def handle_signal(self) -> None:
        """SIGTERM: drain if the supervisor has said so on the channel, else end as in a crash.

        All other signals are only logged.
        """
        numbers = self.wakeup.read()
        for number in STRAY.intersection(numbers):
            self.stray_signals.note(number)
        if signal.SIGTERM in numbers:
            self.handle_channel()
            self.ended = self.ended or not self.draining

    def handle_channel(self) -> None:
        """Do all that the supervisor has asked for by now."""
        while not self.ended:
            try:
                packet = self.channel.recv(MAX_PACKET)
            except ConnectionResetError:
                packet = b""
            except BlockingIOError:
                return
            except OSError:
                # no memory for it now
                self.loop.stall(self.channel.fileno(), MEMORY_RETRY)
                return
            if packet:
                self.handle_message(decode(packet))
            else:
                # the supervisor is gone, and nobody is left to serve for
                self.ended = True

    def handle_message(self, order: Message) -> None:
        match order:
            case Drain(grace, rotating) if not self.draining:
                self.drain(grace, rotating)
            case Ping():
                self.reporter.add_notice(alive=True)

    def drain(self, grace: float, rotating: bool) -> None:
        """Stop accepting, and bring every stream to what is in the file now.

        Where a next file follows this one (`rotating`), whoever has not started a stream waits for it, and this one's
        streams end only when it has settled.
        """
        self.draining = True
        self.acceptor.close(empty_queues=not rotating, refuse=self.config.port is not None)
        if not rotating:
            self.reporter.add_notice(emptied=True)
        for client in self.header_reader:
            self.handle_client(client, select.EPOLLIN)
        # starts the streams of those
        self.reporter.send_and_start()
        # Clients without a complete header are closed or set aside. While there is no file, so are all others.
        for client in list(self.clients.values()) if self.waiting else self.header_reader:
            (self.set_aside if rotating else self.drop)(client)
        self.drainer.begin(settle=rotating)
        self.loop.timers.set(self.end_drain, self.loop.now + grace)
        self.title.changed(self.loop.now)

    def set_aside(self, client: Client) -> None:
        """Leave `client` to the worker of the next file, which finds it in the roster as it is."""
        self.loop.epoll.unregister(client.fd)
        self.header_reader.forget(client)
        del self.clients[client.fd]
        self.aside.append(client)

    def end_drain(self) -> None:
        """End where the grace is over: whoever has not got everything keeps what the kernel has queued for it."""
        if self.clients:
            logger.warning("grace is over: %s", fields(slot=self.slot, clients=len(self.clients)))
        for client in list(self.clients.values()):
            self.drop(client)
        self.end()

    def end(self) -> None:
        """End with this turn."""
        self.ended = True

    # What others see

    def render_title(self) -> str:
        return worker_title(
            self.slot, self.endpoints, "draining" if self.draining else "", len(self.clients)
        )
