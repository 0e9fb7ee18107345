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
from dataclasses import replace
from itertools import count

from setproctitle import setproctitle

from tailsrv import policy
from tailsrv.acceptor import Acceptor
from tailsrv.config import Config, ExitStatus
from tailsrv.connection import Client, State
from tailsrv.log import Limited, fields, logger
from tailsrv.loop import Loop
from tailsrv.messages import MAX_MESSAGE, MAX_NEWS, MAX_SOCKETS, NO_NOTICES, Drain, Message, Ping, Report, decode, encode
from tailsrv.protocol import HeaderError, parse_header
from tailsrv.roster import Entry
from tailsrv.signals import Wakeup, release
from tailsrv.slot import Inheritance
from tailsrv.streams import Streams
from tailsrv.syscalls import Outcome, discard, finish_sending, peek_header, streamed, take_socket, unsent
from tailsrv.title import Title, worker_title
from tailsrv.watch import POLL_INTERVAL, Watch, is_gone

# Registered once, edge-triggered: no epoll_ctl per event, and a socket that stays readable is told of once. EPOLLOUT is
# asked for when a client blocks: asked for earlier, each new client's socket would be told of once more.
CLIENT_EVENTS = select.EPOLLIN | select.EPOLLRDHUP | select.EPOLLET
HUNG_UP = select.EPOLLHUP | select.EPOLLERR
INPUT = select.EPOLLIN | select.EPOLLRDHUP

LINGER_CHECK = 0.01  # seconds between looks whether a finished client has acknowledged everything
LINGER_SHARE = 20e-6  # seconds more for each: a look costs some microseconds, which the others' bytes need
LEFT_DELAY = 0.05  # seconds; who left is reported with other news, or after this
FAREWELL = 0.5  # seconds that the last report may wait for a supervisor that is too busy to take it
RETRY_REPORT = 0.005  # seconds; the supervisor was too busy to take a report


def work(inheritance: Inheritance, config: Config) -> int:
    """Serve one slot until the supervisor says `drain` or is gone; return the exit status."""
    setproctitle(worker_title(inheritance.slot, inheritance.endpoints, "starting", 0))
    gc.freeze()  # what the supervisor made stays shared memory
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole foreground group
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)  # sendfile(2) has no MSG_NOSIGNAL
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    try:
        wakeup = Wakeup([signal.SIGTERM])
        release()
        worker = Worker(inheritance, config, wakeup)
    except OSError as error:
        logger.critical("worker cannot boot: %s", fields(slot=inheritance.slot, reason=error))
        return ExitStatus.CANNOT_BOOT
    return worker.run()


class Worker:
    """The clients of one slot, and the loop that serves them."""

    def __init__(self, inheritance: Inheritance, config: Config, wakeup: Wakeup, clock: Callable[[], float] = time.monotonic) -> None:
        self.slot = inheritance.slot
        self.config = config
        self.loop = Loop(clock)
        self.clients: dict[int, Client] = {}
        self.headerless: dict[Client, float] = {}  # and when each was accepted; the oldest first
        self.finished: dict[int, Client] = {}  # drained; waiting for the peer to acknowledge
        self.dropped: list[Client] = []  # to be closed at the end of the turn
        self.draining = False
        self.settling = False  # a drain that waits for the last appends to a file that was moved away
        self.aside: list[Client] = []  # for the next file, at the end of such a drain
        self.ended = False
        self.gone = False
        self.joined: list[Client] = []  # news for the supervisor, as are the next three
        self.starting: list[tuple[Client, int]] = []  # with the offset to start from
        self.left: list[int] = []
        self.notices = NO_NOTICES
        self.numbers = count(max(inheritance.clients, default=-1) + 1)
        self.title = Title(self.loop.timers, self.render_title)
        self.refused = Limited(logging.WARNING)
        self.short_of_room = Limited(logging.WARNING, burst=1)
        self.failed = Limited(logging.ERROR)

        self.channel = inheritance.channel
        self.endpoints = inheritance.endpoints
        self.wakeup = wakeup
        self.watch = Watch(inheritance.file, config.path)
        self.streams = Streams(inheritance.file, self.watch.size(), self.drop, self.await_room)
        self.loop.register(self.channel.fileno(), self.handle_channel)
        self.loop.register(wakeup.fileno(), self.handle_signal)
        if (watch := self.watch.fileno()) is not None:
            self.loop.register(watch, self.handle_watch)
        self.adopt(inheritance.clients)
        self.acceptor = Acceptor(inheritance, self.loop, config.allow, self.welcome, lambda: len(self.clients), self.make_room)
        self.acceptor.start()

    # The loop

    def run(self) -> int:
        """Serve until the end and return the exit status."""
        self.notices = replace(self.notices, ready=True)
        self.title.changed(self.loop.now)
        self.poll_if_needed()
        self.check_path()  # it may have gone since the supervisor opened it
        self.send_news()
        while not self.ended:
            self.step(0 if self.streams.behind else self.loop.timeout())
        self.send_news()  # of the last turn
        if self.joined:  # not passed up, they would be lost with us: wait for a supervisor that is busy
            poll = select.poll()
            poll.register(self.channel, select.POLLOUT)
            poll.poll(FAREWELL * 1000)
            self.send_news()
        return ExitStatus.DONE

    def step(self, timeout: float | None) -> None:
        """Run one turn: wait, then serve whatever is ready."""
        for fd, mask in self.loop.wait(timeout):
            if (client := self.clients.get(fd)) is not None:
                self.handle_client(client, mask)
            elif (handler := self.loop.handlers.get(fd)) is not None:  # else: it went earlier in this turn
                handler()
        self.loop.timers.run(self.loop.now)
        self.start_streams()
        if self.streams.behind:
            self.pump()
        self.plan_another_try()
        if self.draining:
            self.finish_drained()
        if self.dropped:
            self.close_dropped()
        self.report()

    def start_streams(self) -> None:
        """Start the streams whose headers are there; before anything is sent in this turn, so that their first bytes are, too."""
        for client in tuple(self.joined):
            if client in self.headerless:  # most have sent their header by now: one report for both
                self.handle_client(client, select.EPOLLIN)
        if self.joined or self.starting:
            self.send_news()

    def pump(self) -> None:
        """Send to those who are behind, as much as one turn may."""
        self.streams.pump()
        if self.streams.shrunk:
            self.look()
        # Whoever else wants this processor comes first, another worker or a client: else they wait until our time slice is over
        # [measured: beside 50 who replay, two workers on two processors, p99 of the caught-up 4.7 ms without it, 1.5 ms with it].
        if len(self.streams.behind) > 1:  # one alone is kept from its bytes by it, a tenth of the time
            os.sched_yield()

    def plan_another_try(self) -> None:
        """Come back in a moment to those for whom the disk, or the kernel's memory, was not ready."""
        if self.streams.read_ahead and self.streams.look_again not in self.loop.timers:
            self.loop.timers.set(self.streams.look_again, self.loop.now + self.streams.read_ahead.pause())
        if self.streams.starved and self.streams.try_again not in self.loop.timers:
            self.loop.timers.set(self.streams.try_again, self.loop.now + policy.MEMORY_PAUSE)

    def report(self) -> None:
        """Tell the supervisor what there is to tell, now or soon."""
        if self.notices is not NO_NOTICES:
            self.send_news()
        elif self.left and self.send_news not in self.loop.timers:
            self.loop.timers.set(self.send_news, self.loop.now + LEFT_DELAY)  # nothing is urgent about those who left

    # The file

    def handle_watch(self) -> None:
        self.look()  # before anything else: somebody waits for the bytes, nobody for the event
        if self.watch.read():
            self.check_path()
        self.look()  # an append before the read has no event of its own any more

    def look(self) -> None:
        """Learn the file's size: the one place that does, and whoever is caught up is served at once."""
        size, before = self.watch.size(), self.streams.size
        shrunk, self.streams.shrunk = self.streams.shrunk, False
        if shrunk and size == before:  # it was shorter for a moment; whom that kept waiting gets another try
            self.loop.timers.set(self.resume_after_shrinking, self.loop.now + policy.MEMORY_PAUSE)
        if size != before:
            self.streams.resize(size)
            if self.settling:
                self.settle()
            if size < before:
                self.notices = replace(self.notices, truncated=size)

    def resume_after_shrinking(self) -> None:
        self.streams.resize(self.streams.size)

    def check_path(self) -> None:
        before, gone = self.gone, is_gone(self.watch.file, self.watch.path)
        if gone is None:  # no event will tell when it can be seen
            self.loop.timers.set(self.check_path, self.loop.now + POLL_INTERVAL)
        self.gone = bool(gone)
        if self.gone and not before:  # it may come back, and go again
            self.notices = replace(self.notices, gone=True)

    def poll_if_needed(self) -> None:
        if self.watch.polling and self.poll_file not in self.loop.timers:
            self.notices = replace(self.notices, polling=self.watch.polling)
            self.poll_file()

    def poll_file(self) -> None:
        """Do by the clock what handle_watch does where inotify cannot help."""
        self.loop.timers.set(self.poll_file, self.loop.now + POLL_INTERVAL)
        self.check_path()
        if self.clients:
            self.look()

    # Connections

    def welcome(self, sock: socket.socket, peer: tuple[str, int]) -> None:
        """Take in a connection that has just been accepted."""
        self.look()  # in a burst of connections the caught-up wait for one of them at most, not for all
        client = Client(next(self.numbers), sock, peer)
        if self.add_client(client):
            self.joined.append(client)

    def adopt(self, entries: Mapping[int, Entry]) -> None:
        """Take over the clients of the worker before us, each where the kernel says that its stream is."""
        for number, entry in entries.items():
            try:
                sock, peer = take_socket(entry.fd)
            except OSError:
                self.left.append(number)
                continue
            client = Client(number, sock, peer)
            if not self.add_client(client):
                self.left.append(number)
            elif (sent := streamed(sock)) is None:
                self.drop(client)
            elif entry.start is not None:
                del self.headerless[client]
                self.streams.add(client, entry.start + sent)

    def add_client(self, client: Client) -> bool:
        """Take `client` in and tell whether that was possible."""
        try:
            self.loop.epoll.register(client.fd, CLIENT_EVENTS)
        except OSError as error:  # fs.epoll.max_user_watches
            self.failed("client failed", slot=self.slot, peer=client, reason=error)
            client.sock.close()
            return False
        if not self.clients:
            self.watch.follow(True)
            self.poll_if_needed()
            self.look()  # nobody kept the size up to date while there was no client
        self.clients[client.fd] = client
        self.headerless[client] = self.loop.now
        if self.config.header_timeout and len(self.headerless) == 1:
            self.loop.timers.set(self.expire_headerless, self.loop.now + self.config.header_timeout)
        self.title.changed(self.loop.now)
        return True

    def await_room(self, client: Client) -> None:
        """Ask to be told when the full socket of `client` has room; should it have some already, that is told at once."""
        self.loop.epoll.modify(client.fd, CLIENT_EVENTS | select.EPOLLOUT)

    def make_room(self) -> bool:
        """Out of descriptors: the oldest connection without a header goes. Tell whether there is room at the end of this turn."""
        while not self.dropped and (oldest := next(iter(self.headerless), None)) is not None:
            self.handle_client(oldest, select.EPOLLIN)  # its header may have come in this very turn
            if oldest in self.headerless:
                self.short_of_room("short of descriptors, dropped the oldest connection without a header", slot=self.slot, peer=oldest)
                self.drop(oldest)
        return bool(self.dropped)

    def expire_headerless(self) -> None:
        """End the connections whose header has not come in time."""
        for client, accepted in list(self.headerless.items()):
            if (due := accepted + self.config.header_timeout) > self.loop.now:
                self.loop.timers.set(self.expire_headerless, due)
                return
            self.refuse(client, f"no header in {self.config.header_timeout:g} s")

    def handle_client(self, client: Client, mask: int) -> None:
        try:
            if mask & ~select.EPOLLOUT:
                self.look()  # in a burst of those who speak or leave, too, nobody waits for more than one of them
            if mask & HUNG_UP:
                self.drop(client)
                return
            if mask & INPUT:
                if client in self.headerless:
                    self.read_header(client, ended=bool(mask & select.EPOLLRDHUP))
                elif client.state is not State.AWAITING_HEADER:  # its header may still be in the socket
                    discard(client.sock)  # also after its FIN, which is not a hang-up
            if mask & select.EPOLLOUT:
                self.streams.writable(client)
        except Exception as error:  # whatever it is, it must not reach the other clients
            self.drop(client, error)

    def read_header(self, client: Client, ended: bool) -> None:
        """Start streaming if the header is whole; it stays in the socket until its offset is known."""
        received = peek_header(client.sock)
        if received is Outcome.HUNG_UP:
            self.drop(client)
            return
        try:
            start = parse_header(b"" if isinstance(received, Outcome) else received, ended)
        except HeaderError as error:
            self.refuse(client, str(error))
            return
        if start is None:
            return
        if start.from_end:
            self.look()  # the end is where it is now
        del self.headerless[client]
        self.starting.append((client, start.offset(self.streams.size)))

    def start_stream(self, client: Client, offset: int) -> None:
        """Start streaming to `client`, now that the supervisor knows where from."""
        discard(client.sock)  # the header, and all behind it
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("client streams: %s", fields(slot=self.slot, peer=client, offset=offset))
        else:
            client.forget_peer()
        self.streams.add(client, offset)

    def refuse(self, client: Client, reason: str) -> None:
        self.refused("client refused", slot=self.slot, peer=client, reason=reason)
        self.drop(client)

    def drop(self, client: Client, error: Exception | None = None) -> None:
        """Stop serving `client`. Its socket is closed at the end of the turn, so that no other gets its number in it."""
        if client.state is State.CLOSED:
            return
        if error is not None:
            self.failed("client failed", slot=self.slot, peer=client, offset=self.streams.offset_of(client), reason=repr(error))
        elif logger.isEnabledFor(logging.DEBUG):
            logger.debug("client left: %s", fields(slot=self.slot, peer=client, offset=self.streams.offset_of(client)))
        client.state = State.CLOSED
        self.streams.remove(client)
        self.headerless.pop(client, None)
        self.finished.pop(client.fd, None)
        del self.clients[client.fd]
        self.loop.epoll.unregister(client.fd)  # closing alone does not end the events while somebody holds a duplicate
        self.dropped.append(client)
        if client in self.joined:
            self.joined.remove(client)
        else:
            self.left.append(client.number)
        self.title.changed(self.loop.now)

    def close_dropped(self) -> None:
        for client in self.dropped:
            self.look()  # a burst of closes takes as long as all that came before it
            discard(client.sock)  # unread input would turn the close into a reset, and that destroys what is queued
            finish_sending(client.sock)
            client.sock.close()
        self.dropped.clear()
        self.acceptor.note_count()
        if not self.clients:
            self.watch.follow(False)

    # The end

    def handle_signal(self) -> None:
        """SIGTERM: drain if the supervisor has said so on the channel, else end as in a crash."""
        if self.wakeup.read():
            self.handle_channel()
            self.ended = self.ended or not self.draining

    def handle_channel(self) -> None:
        """Do all that the supervisor has asked for by now."""
        while not self.ended:
            try:
                packet = self.channel.recv(MAX_MESSAGE)
            except ConnectionResetError:
                packet = b""
            except OSError:  # nothing more; or no memory for it, then it is told of again
                return
            if packet:
                self.obey(decode(packet))
            else:
                self.ended = True  # the supervisor is gone, and nobody is left to serve for

    def obey(self, order: Message) -> None:
        match order:
            case Drain(grace, rotating) if not self.draining:
                self.drain(grace, rotating)
            case Ping():
                self.notices = replace(self.notices, alive=True)

    def drain(self, grace: float, rotating: bool) -> None:
        """Stop accepting, and bring every stream to what is in the file now.

        Where a next file follows this one (`rotating`), whoever has not started a stream waits for it, and this one's
        streams end only when the appends have: its writer may need a moment to go over to the next.
        """
        self.draining, self.settling = True, rotating
        self.acceptor.close(empty_queues=not rotating)
        for client in list(self.headerless):
            self.handle_client(client, select.EPOLLIN)
        self.send_news()  # starts the streams of those
        for client in list(self.headerless):
            (self.set_aside if rotating else self.drop)(client)  # it has not asked for anything
        self.look()
        if rotating:
            self.settle()
        else:
            self.stop_watching()
        self.loop.timers.set(self.end_drain, self.loop.now + grace)
        self.title.changed(self.loop.now)

    def set_aside(self, client: Client) -> None:
        """Leave `client` to the worker of the next file, which finds it in the roster as it is."""
        self.loop.epoll.unregister(client.fd)
        del self.headerless[client], self.clients[client.fd]
        self.aside.append(client)

    def settle(self) -> None:
        """Wait for the file to be quiet for a while."""
        pause = policy.SETTLE + (POLL_INTERVAL if self.watch.polling else 0)
        self.loop.timers.set(self.end_settling, self.loop.now + pause)

    def end_settling(self) -> None:
        self.look()  # an append that nobody has told of yet means to wait once more
        if self.end_settling not in self.loop.timers:
            self.settling = False
            self.stop_watching()

    def stop_watching(self) -> None:
        if (watch := self.watch.fileno()) is not None:
            self.loop.unregister(watch)
        self.loop.timers.cancel(self.poll_file)

    def finish_drained(self) -> None:
        """See off the clients that have all there is."""
        for client in self.streams.idle() if not self.settling else ():
            client.state = State.FINISHED
            self.streams.remove(client)
            discard(client.sock)
            finish_sending(client.sock)
            self.finished[client.fd] = client
        if self.finished and self.check_finished not in self.loop.timers:
            self.check_finished()
        self.ended = self.ended or not self.clients

    def check_finished(self) -> None:
        """Close the connections whose peers have acknowledged everything."""
        for client in list(self.finished.values()):
            discard(client.sock)
            if unsent(client.sock) == 0:
                self.drop(client)
        if self.finished:
            self.loop.timers.set(self.check_finished, self.loop.now + LINGER_CHECK + len(self.finished) * LINGER_SHARE)

    def end_drain(self) -> None:
        """End where the grace is over: whoever has not got everything keeps what the kernel has queued for it."""
        logger.warning("grace is over: %s", fields(slot=self.slot, clients=len(self.clients)))
        for client in list(self.clients.values()):
            self.drop(client)
        self.ended = True

    # What others see

    def render_title(self) -> str:
        return worker_title(self.slot, self.endpoints, "draining" if self.draining else "", len(self.clients))

    def send_news(self) -> None:
        """Tell the supervisor what has happened since the last report, in one message if it fits.

        Only then do the new streams start: should we die before, their headers are still in their sockets, and
        should we die after, the supervisor knows where they started.
        """
        self.loop.timers.cancel(self.send_news)
        while self.left or self.joined or self.starting or self.notices is not NO_NOTICES:
            joined, left = self.joined[:MAX_SOCKETS], self.left[:MAX_NEWS]
            starting = self.starting[:MAX_NEWS] if len(joined) == len(self.joined) else []
            report = Report(
                joined=[client.number for client in joined],
                started=[(client.number, offset) for client, offset in starting if client.state is not State.CLOSED],
                left=left,
                notices=self.notices,
            )
            try:
                socket.send_fds(self.channel, [encode(report)], [client.fd for client in joined], socket.MSG_DONTWAIT)
            except (BrokenPipeError, ConnectionResetError):
                self.ended = True  # the supervisor is gone
                return
            except OSError:  # it is too busy, or the kernel short of memory
                self.loop.timers.set(self.send_news, self.loop.now + RETRY_REPORT)
                return
            del self.joined[: len(joined)], self.starting[: len(starting)], self.left[: len(left)]
            self.notices = NO_NOTICES
            for client, offset in starting:
                if client.state is State.AWAITING_HEADER:
                    self.look()  # a burst of those who start, too
                    self.start_stream(client, offset)
