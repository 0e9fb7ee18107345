"""Runs one worker process: sets it up, runs its event loop, and serves its clients.

The loop never waits for a single client. If the worker dies, its successor continues all streams:
the worker holds no state that cannot be rebuilt from what the supervisor and the kernel know.
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

from tailsrv import __version__
from tailsrv.config import Config, ExitStatus
from tailsrv.control_socket import credentials
from tailsrv.error_hints import absolute
from tailsrv.handover import (
    FORMAT,
    Greeting,
    HandedClient,
    HandedNext,
    HandedSegment,
    Handover,
    Request,
    commit,
)
from tailsrv.linux.event_loop import MEMORY_RETRY, EventLoop
from tailsrv.linux.files import close_file
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
from tailsrv.protocol import Start, began_at, resume
from tailsrv.segments import NO_FILE, Log, Segment
from tailsrv.stray_signals import StraySignals
from tailsrv.titles import worker_title
from tailsrv.worker.acceptor import Accepted, Acceptor
from tailsrv.worker.client import CLIENT_EVENTS, Client, ClientState, Departures
from tailsrv.worker.dead_peers import DeadPeers
from tailsrv.worker.drain import Drainer
from tailsrv.worker.file_monitor import FileMonitor
from tailsrv.worker.header_reader import HeaderReader
from tailsrv.worker.orphan import Orphan, hand_over
from tailsrv.worker.reporter import Reporter
from tailsrv.worker.streams import BytesGoneError, Streams
from tailsrv.worker_channel import (
    MAX_PACKET,
    Agree,
    Drain,
    Freeze,
    Message,
    Ping,
    Retire,
    Roll,
    Thaw,
    decode,
)
from tailsrv.worker_context import Entry, WorkerContext

# Seconds between checks whether clients still read segments that have been deleted.
NEEDS_INTERVAL = 1.0
HUNG_UP = select.EPOLLHUP | select.EPOLLERR
INPUT = select.EPOLLIN | select.EPOLLRDHUP


def work(context: WorkerContext, config: Config) -> int:
    """Set up this forked process, serve one slot, and return the exit status.

    The worker ends after the supervisor's order to drain or on SIGTERM. If the supervisor has died,
    it ends when another one has taken over, or when the time for that is over.

    Returns:
        ExitStatus.DONE when the worker has ended as it should, EX_TEMPFAIL (75) if it could not
        start for lack of descriptors, memory or epoll watches, ExitStatus.CANNOT_BOOT if it could
        not start for another reason.

    """
    setproctitle(worker_title(context.slot, context.endpoints, "starting", 0))
    # Keep the garbage collector from writing to the objects that the supervisor has made, so that
    # their memory stays shared with it.
    gc.freeze()
    # Ctrl-C sends SIGINT to the whole foreground process group, and a closed terminal SIGHUP. Only
    # the supervisor acts on them.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # The supervisor gets SIGPWR as well, and drains.
    signal.signal(signal.SIGPWR, signal.SIG_IGN)
    # A write to a closed connection must not raise SIGPIPE: sendfile(2) has no MSG_NOSIGNAL.
    ignore_io_signals()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGQUIT, signal.SIG_DFL)
    try:
        wakeup = Wakeup({signal.SIGTERM} | STRAY)
        unblock_all()
        worker = Worker(context, config, wakeup)
    except OSError as error:
        logger.critical("worker cannot boot: %s", fields(slot=context.slot, reason=error))
        return os.EX_TEMPFAIL if lacks_room(error) else ExitStatus.CANNOT_BOOT
    return worker.run()


class Worker:
    """The clients of one slot, and the loop that serves them.

    Args:
        context: What the supervisor has passed to this worker.
        config: The server's configuration.
        wakeup: The pipe that reports signals.
        clock: The loop's clock, in seconds.

    """

    def __init__(
        self,
        context: WorkerContext,
        config: Config,
        wakeup: Wakeup,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.slot = context.slot
        self.config = config
        self.loop = EventLoop(clock)
        self.clients: dict[int, Client] = {}
        self.departures = Departures()
        self.draining = False
        self.ended = False
        # Whether the supervisor has died, and until when this worker serves without one.
        self.orphaned, self.orphaned_until = False, 0.0
        self.context = context
        # Numbers for new clients, above those of the clients that this worker adopts.
        self.numbers = count(max(context.clients, default=-1) + 1)
        self.title = ProcessTitle(self.loop.timers, self.render_title)
        self.stray_signals = StraySignals(slot=self.slot)
        self.short_of_room = RateLimited(logging.WARNING, burst=1)
        self.failed = RateLimited(logging.ERROR)
        self.channel = context.channel
        self.endpoints = context.endpoints
        self.wakeup = wakeup
        self.loop.register(self.channel.fileno(), self.handle_channel)
        self.loop.register(wakeup.fileno(), self.handle_signal)
        # True while the server waits for the file. Clients are accepted, and their headers stay in
        # their sockets for a successor that has the file.
        self.waiting = context.log is None
        log = context.log or Log([Segment(0, NO_FILE)])
        # If the size cannot be read now, the file must not seem to have been truncated.
        known = max(0, context.ends[self.slot] - log.active.base) if context.ends is not None else 0
        watch = NoFile() if self.waiting else Watch(log.active.file, config.path, known)
        frozen = context.frozen_end
        end = log.active.base + watch.size() if frozen is None else frozen
        self.streams = Streams(log, end, self.loop, self.departures)
        self.streams.truncated = context.truncated
        self.reporter = Reporter(self.channel, self.loop)
        self.file_monitor = FileMonitor(
            watch,
            self.streams,
            self.reporter,
            self.loop,
            config.timing,
            self.slot,
            context.ends,
            frozen,
            insist=not config.linger,
        )
        self.header_reader = HeaderReader(
            self.slot,
            config.header_timeout,
            self.loop,
            self.file_monitor,
            self.streams,
            self.reporter,
            self.departures,
        )
        self.drainer = Drainer(self.loop, self.streams, self.file_monitor, self.departures)
        self.dead_peers = DeadPeers(
            self.slot, self.clients, self.loop, self.departures, config.timing.dead_peers
        )
        self.adopt(context.clients)
        self.acceptor = Acceptor(context, self.loop, config.allow, self.clients)
        self.acceptor.start()
        self.orphan = Orphan(self.loop, context.sockets)

    # The loop

    def run(self) -> int:
        """Run the loop until the worker ends, and return the exit status."""
        if not commit(self.context.predecessors):
            logger.critical(
                "an orphaned worker has not waited for this one: %s", fields(slot=self.slot)
            )
            return ExitStatus.CANNOT_BOOT
        self.acceptor.listen()
        self.reporter.add_notice(ready=True)
        self.title.changed(self.loop.now)
        if not self.waiting:
            self.file_monitor.begin()
            self.close_unneeded()
        self.drop_departures()
        self.report()
        while not self.ended:
            self.step(0 if self.streams.behind else self.loop.timeout())
        self.reporter.send_remaining()
        return ExitStatus.DONE

    def step(self, timeout: float | None) -> None:
        """Run one turn of the loop: wait, then serve what is ready.

        `timeout` is how long to wait for events, in seconds; None means without a limit.
        """
        for fd, mask in self.loop.wait(timeout):
            if (client := self.clients.get(fd)) is not None:
                self.handle_client(client, mask)
            elif (handler := self.loop.handlers.get(fd)) is not None:
                # A descriptor without a handler was unregistered earlier in this turn.
                handler()
        self.loop.timers.run(self.loop.now)
        # Those that have left make room for others.
        self.drop_departures()
        for accepted in self.acceptor.accept():
            self.handle_accepted(accepted)
        self.start_streams()
        if self.streams.behind:
            self.pump()
        if self.draining:
            self.drainer.finish_caught_up()
        self.drop_departures()
        self.ended = self.ended or (self.draining and not self.clients)
        # If the file's size has changed in this turn, caught-up clients may have been sent bytes.
        if self.file_monitor.size_changed_at == self.loop.now:
            self.dead_peers.expect_acks()
        # Last: any of the calls above may deliver appends and leave a client waiting for memory.
        self.plan_retries()
        if self.reporter.is_due():
            self.report()
        # All clients of this turn are served: none is between two states.
        while self.orphaned and self.answer_supervisor():
            pass

    def start_streams(self) -> None:
        """Start the streams of the clients whose headers have arrived.

        This comes before pump(), so that their first bytes are sent in the same turn.
        """
        for client in tuple(self.reporter.joined):
            # Most new clients have sent their header by now. Reading it here lets one report cover
            # both the connection and the start.
            if client in self.header_reader:
                self.handle_client(client, select.EPOLLIN)
        # Those that have left already are not reported.
        self.drop_departures()
        if self.reporter.joined or self.reporter.starting:
            self.report()

    def report(self) -> None:
        """Report to the supervisor, and start the streams whose start it knows now."""
        for client, offset, end in self.reporter.flush():
            self.start_stream(client, offset, end)
        if self.reporter.broken:
            self.handle_channel()

    def pump(self) -> None:
        """Send one turn's share of bytes to the clients that are behind."""
        self.streams.pump()
        self.dead_peers.expect_acks()
        if self.streams.shrunk:
            self.file_monitor.deliver_appends()
        # Yield the processor to other runnable tasks, such as other workers or local clients.
        # Otherwise they wait until this worker's time slice is over [measured with two workers on
        # two processors and 50 clients that read the file from its start: the p99 latency of the
        # caught-up clients is 4.7 ms without this, 1.5 ms with it]. Do not yield if only one client
        # is behind: yielding would take a tenth of the time from it.
        if len(self.streams.behind) > 1:
            os.sched_yield()

    def plan_retries(self) -> None:
        """Plan the next attempts for the clients that wait for the disk or for kernel memory."""
        if self.streams.read_ahead and self.streams.retry_disk not in self.loop.timers:
            self.loop.timers.set(
                self.streams.retry_disk, self.loop.now + self.streams.read_ahead.pause()
            )
        if self.streams.awaiting_memory and self.streams.retry_memory not in self.loop.timers:
            self.loop.timers.set(self.streams.retry_memory, self.loop.now + MEMORY_RETRY)

    # Connections

    def handle_accepted(self, accepted: Accepted) -> None:
        """Begin to serve a connection that has just been accepted."""
        if accepted is None:
            if not self.free_descriptor():
                self.acceptor.wait_for_descriptor()
            return
        # Deliver appends before each connection: in a burst, an append waits for one at most.
        self.file_monitor.deliver_appends()
        client = Client(next(self.numbers), *accepted)
        if self.add_client(client):
            self.reporter.joined.append(client)

    def adopt(self, entries: Mapping[int, Entry]) -> None:
        """Take over the clients of this worker's predecessor.

        Each stream continues after the bytes that the kernel has counted as sent.
        """
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
                self.resume_stream(client, entry)
            except Exception as error:
                # If descriptors or memory have run out, this worker ends: the next one may have
                # enough, and no client is lost. Any other error concerns only this client.
                if lacks_room(error):
                    raise
                self.departures.add(client, error)

    def resume_stream(self, client: Client, entry: Entry) -> None:
        """Continue the stream of `client`, which began as `entry` says.

        If it has not begun, the worker waits for the client's header.
        """
        if (sent := bytes_streamed(client.sock)) is None:
            self.departures.add(client)
        elif entry.start is not None:
            self.header_reader.forget(client)
            client.line, offset = resume(entry.start, entry.end, sent)
            client.end = entry.end
            self.streams.add(client, offset)
            # Bytes that the previous worker has sent may still be unacknowledged.
            self.dead_peers.expect_acks()

    def add_client(self, client: Client) -> bool:
        """Register `client`, and return whether that was possible. If not, its socket is closed."""
        try:
            self.loop.epoll.register(client.fd, CLIENT_EVENTS)
        except OSError as error:
            # No memory, or too many watches (fs.epoll.max_user_watches).
            self.failed(
                "client disconnected: epoll cannot watch its socket",
                slot=self.slot,
                peer=client,
                reason=error,
                hint="raise fs.epoll.max_user_watches, or free memory",
            )
            client.sock.close()
            return False
        if not self.clients:
            self.file_monitor.set_following(True)
        self.clients[client.fd] = client
        self.header_reader.add(client)
        self.title.changed(self.loop.now)
        return True

    def free_descriptor(self) -> bool:
        """Drop the client that has waited longest without sending a header.

        Returns whether a descriptor will be free at the end of this turn.
        """
        while not self.departures and (oldest := self.header_reader.oldest()) is not None:
            # Its header may have arrived in this turn: then it stays, and the next client is tried.
            self.handle_client(oldest, select.EPOLLIN)
            if oldest in self.header_reader and not self.departures:
                self.short_of_room(
                    "out of file descriptors: disconnected the oldest client without a header",
                    slot=self.slot,
                    peer=oldest,
                    hint="raise LimitNOFILE= or ulimit -Hn",
                )
                self.departures.add(oldest)
        return bool(self.departures)

    def handle_client(self, client: Client, mask: int) -> None:
        """Serve one client after an event on its socket.

        An error with this client disconnects only this client. An error while the file's size is
        read is not caught and ends the worker, because it could cost other clients bytes.
        """
        if client.state is ClientState.CLOSED:
            return
        if mask & ~select.EPOLLOUT:
            # Deliver appends before each header or disconnect: in a burst of them, an append waits
            # for one of them at most.
            self.file_monitor.deliver_appends()
        try:
            start = self.handle_events(client, mask)
        except Exception as error:
            # Whatever the error is, the other clients must not be affected.
            self.departures.add(client, error)
            return
        if start is not None and self.waiting:
            self.header_reader.forget(client)
        elif start is not None:
            self.header_reader.schedule_start(client, start)

    def handle_events(self, client: Client, mask: int) -> Start | None:
        """Handle the events in `mask` on the socket of `client`.

        Returns the start that the client asks for if its header is now complete, otherwise None.
        """
        if mask & HUNG_UP:
            self.departures.add(client)
            return None
        start = None
        if mask & INPUT:
            if client in self.header_reader:
                start = self.header_reader.read_or_refuse(
                    client, ended=bool(mask & select.EPOLLRDHUP)
                )
            # In the state AWAITING_HEADER, the header must stay in the socket until the start of
            # the stream has been reported. Otherwise discard what the client sends, also when its
            # FIN has arrived: a FIN is not a hang-up.
            elif client.state is not ClientState.AWAITING_HEADER:
                discard(client.sock)
        if mask & select.EPOLLOUT:
            self.streams.writable(client)
        return start

    def start_stream(self, client: Client, offset: int, end: int | None) -> None:
        """Start streaming to `client`, now that this has been reported to the supervisor.

        `end` is the second number of its `?` line, None if the client did not ask for one.
        """
        # Deliver appends before each start: in a burst, an append waits for one at most.
        self.file_monitor.deliver_appends()
        try:
            self.begin_stream(client, offset, end)
        except Exception as error:
            # Whatever the error is, the other clients must not be affected.
            self.departures.add(client, error)

    def begin_stream(self, client: Client, offset: int, end: int | None) -> None:
        """Do the work of `start_stream` that may fail for a single client."""
        # Discard the header and everything after it.
        discard(client.sock)
        if logger.isEnabledFor(logging.DEBUG):
            logger.debug("client streams: %s", fields(slot=self.slot, peer=client, offset=offset))
        else:
            client.forget_peer()
        client.line, _ = resume(offset, end, sent=0)
        client.end = end
        self.streams.add(client, offset)

    def drop_departures(self) -> None:
        """Drop the clients that leave."""
        if not self.departures:
            return
        while departures := self.departures.take():
            for client, error in departures:
                # Closing many sockets takes as long as the rest of the turn: deliver appends in
                # between. This may add departures.
                self.file_monitor.deliver_appends()
                self.log_departure(client, error)
                self.drop(client)
        self.acceptor.update_count()
        self.title.changed(self.loop.now)
        if not self.clients and not self.orphaned:
            self.file_monitor.set_following(False)

    def drop(self, client: Client) -> None:
        """Stop serving `client`, and close its socket. This is the only place that does so."""
        self.streams.remove(client)
        self.header_reader.forget(client)
        self.drainer.forget(client)
        self.reporter.add_departure(client)
        del self.clients[client.fd]
        # close(2) alone would not unregister the socket from epoll, because the supervisor holds a
        # duplicate of it.
        self.loop.epoll.unregister(client.fd)
        # Unread input would turn the close into a reset, which destroys what is queued for the
        # client.
        discard(client.sock)
        shut_down_writing(client.sock)
        client.sock.close()

    def log_departure(self, client: Client, error: Exception | None) -> None:
        if isinstance(error, BytesGoneError):
            self.failed(
                "client disconnected: its next bytes no longer exist",
                slot=self.slot,
                peer=client,
                offset=self.streams.offset_of(client),
                hint="keep rotated files for longer; do not truncate the file",
            )
        elif error is not None:
            self.failed(
                "client disconnected after an error",
                slot=self.slot,
                peer=client,
                offset=self.streams.offset_of(client),
                reason=repr(error),
                hint="check disk and memory, report any other error",
            )
        elif logger.isEnabledFor(logging.DEBUG):
            logger.debug(
                "client left: %s",
                fields(slot=self.slot, peer=client, offset=self.streams.offset_of(client)),
            )

    # Without a supervisor

    def lose_supervisor(self) -> None:
        """Serve on for a while: the supervisor has died, and another one may take over."""
        if self.orphaned or self.ended:
            return
        self.orphaned = True
        # Forget a SIGTERM that has arrived by now: it is the supervisor's, see handle_signal().
        self.read_signals()
        self.loop.unregister(self.channel.fileno())
        self.channel.close()
        self.reporter.supervisor_gone = True
        self.report()
        self.title.changed(self.loop.now)
        if self.draining:
            return
        if not self.config.orphan_timeout:
            self.ended = True
            return
        logger.warning(
            "supervisor is gone, clients are served until another one takes over: %s",
            fields(
                slot=self.slot,
                clients=len(self.clients),
                seconds=f"{self.config.orphan_timeout:g}",
                hint="start tailsrv again with the same options",
            ),
        )
        self.file_monitor.hold_roll()
        # Nothing else tells a worker without clients that the file is truncated, and it may have
        # grown again when the next client connects.
        self.file_monitor.set_following(True)
        self.await_supervisor()
        self.orphan.begin()

    def await_supervisor(self) -> None:
        """Drain if no supervisor has taken over when the time for that is over."""
        # A handover that failed may have taken longer than this.
        self.orphaned_until = self.loop.clock() + self.config.orphan_timeout
        self.loop.timers.set(self.end_orphan, self.orphaned_until)

    def end_orphan(self) -> None:
        self.drain_orphan("no supervisor has taken over")

    def drain_orphan(self, reason: str) -> None:
        logger.warning(
            "draining: %s",
            fields(slot=self.slot, clients=len(self.clients), reason=reason),
        )
        self.drain(self.config.grace)

    def greeting(self) -> Greeting:
        """Return how this worker introduces itself to a supervisor or a health check."""
        return Greeting(
            __version__,
            FORMAT,
            os.getpid(),
            self.slot,
            absolute(self.config.path),
            len(self.clients),
            max(0.0, self.orphaned_until - self.loop.clock()),
        )

    def answer_supervisor(self) -> bool:
        """Hand everything over to a supervisor that has asked for it, and end if it takes over.

        Returns whether a supervisor had asked and has not taken over.
        """
        if self.orphan.has_callers():
            self.orphan.greet(self.greeting())
        if self.draining or self.ended or (asked := self.orphan.take_request()) is None:
            return False
        peer, request = asked
        supervisor = credentials(peer)[0]
        self.report()
        self.drop_departures()
        try:
            handover = self.describe(request)
        except Exception:
            # Whatever the error is, the clients must not be affected.
            logger.exception("cannot hand over, please report this bug: %s", fields(slot=self.slot))
            peer.close()
            return True
        if not hand_over(peer, handover, self.config.timing.commit_patience):
            # A supervisor has been started, so another attempt is likely.
            logger.warning(
                "supervisor has not taken over, clients are served on: %s",
                fields(slot=self.slot, supervisor=supervisor),
            )
            self.await_supervisor()
            return True
        logger.info(
            "supervisor has taken over: %s",
            fields(slot=self.slot, supervisor=supervisor, clients=len(self.clients)),
        )
        if request.clients:
            self.ended = True
        else:
            self.acceptor.hand_over()
            self.drain_orphan("these clients cannot be taken over")
        return False

    def describe(self, request: Request) -> Handover:
        """Return what to hand over. Nothing may be sent to a client after this."""
        handover = Handover([listener.fileno() for listener in self.acceptor.listeners])
        if not request.clients:
            handover.only_listeners = True
            return handover
        clients = (self.describe_client(client) for client in self.clients.values())
        handover.clients = [client for client in clients if client is not None]
        handover.start, handover.end = self.streams.log.start, self.streams.end
        handover.truncated = self.streams.truncated
        if (agreed := self.file_monitor.agreed) is not None:
            handover.next = HandedNext(*agreed)
        if self.context.ends is not None:
            handover.ends = self.context.ends.fd
        if self.context.opened_at is not None:
            handover.opened_at = self.context.opened_at[0]
        if not self.waiting:
            handover.segments = [
                HandedSegment(each.base, each.size, None if each.file == NO_FILE else each.file)
                for each in self.streams.log
            ]
        return handover

    def describe_client(self, client: Client) -> HandedClient | None:
        """Return what to hand over for `client`, None if its connection is not open any more."""
        if (sent := bytes_streamed(client.sock)) is None:
            return None
        if client.state is not ClientState.STREAMING:
            return HandedClient(client.fd, None, None)
        offset = self.streams.offset_of(client)
        return HandedClient(client.fd, began_at(offset, client.end, client.line, sent), client.end)

    # The end

    def handle_signal(self) -> None:
        """Act on SIGTERM, and log stray signals.

        On SIGTERM, the worker drains if the channel holds the supervisor's order to drain.
        Otherwise it ends after this turn and leaves its clients to its successor, as after a crash.
        """
        before = self.orphaned
        if signal.SIGTERM not in self.read_signals():
            return
        self.handle_channel()
        if self.orphaned and not before:
            # The supervisor wanted to replace this worker, and has died before that.
            return
        if self.orphaned and not self.draining:
            # There is no successor.
            self.drain_orphan("SIGTERM")
        self.ended = self.ended or not self.draining

    def read_signals(self) -> list[int]:
        """Return the numbers of the signals that have arrived, and log those that are stray."""
        numbers = self.wakeup.read()
        for number in STRAY.intersection(numbers):
            self.stray_signals.note(number)
        return numbers

    def handle_channel(self) -> None:
        """Handle all messages that the supervisor has sent so far."""
        while not self.ended and not self.orphaned:
            try:
                packet, files, _, _ = socket.recv_fds(
                    self.channel, MAX_PACKET, 1, socket.MSG_CMSG_CLOEXEC
                )
            except ConnectionResetError:
                # The supervisor has died before it read all reports. Its orders can still be read.
                continue
            except BlockingIOError:
                return
            except OSError:
                # The kernel has no memory for the message now.
                self.loop.stall(self.channel.fileno(), MEMORY_RETRY)
                return
            if packet:
                self.handle_message(decode(packet), files)
            else:
                self.lose_supervisor()

    def handle_message(self, message: Message, files: list[int]) -> None:
        """Act on an order of the supervisor. `files` holds the descriptor that came with it."""
        match message:
            case Drain(grace) if not self.draining:
                self.drain(grace)
            case Freeze(roll):
                self.file_monitor.freeze()
                self.reporter.add_notice(frozen=roll)
            case Thaw():
                self.file_monitor.unfreeze()
                self.file_monitor.recheck_path()
            case Agree(size):
                self.file_monitor.agree(size, files[0] if files else None)
            case Roll(base, _, _) if files and base < self.streams.log.active.base:
                # The worker has rolled by itself.
                close_file(files[0])
                self.file_monitor.unfreeze()
            case Roll(_, size, lost) if files:
                self.file_monitor.roll(size, lost, files[0])
                self.close_unneeded()
            case Roll():
                # There was no descriptor left for the file. The successor of this worker inherits
                # it from the supervisor.
                self.ended = True
            case Retire(start):
                self.streams.log.retire(start)
                self.close_unneeded()
            case Ping():
                self.reporter.add_notice(alive=True)

    def close_unneeded(self) -> None:
        """Close deleted segments that no client reads, and report which ones are still needed."""
        log = self.streams.log
        if log.first < log.start:
            starts = [offset for _, offset, _ in self.reporter.starting]
            self.streams.close_unneeded(self.clients.values(), starts)
            self.reporter.add_notice(needs=log.first)
        # The clients that still read them tell nothing when they are done.
        if log.first < log.start:
            self.loop.timers.set(self.close_unneeded, self.loop.now + NEEDS_INTERVAL)

    def drain(self, grace: float) -> None:
        """Stop accepting, and end every stream at the end that the log has now.

        After `grace` seconds, the connections that are still open are closed.
        """
        self.draining = True
        self.loop.timers.cancel(self.end_orphan)
        self.orphan.close()
        for accepted in self.acceptor.close(refuse=self.config.port is not None):
            self.handle_accepted(accepted)
        self.reporter.add_notice(emptied=True)
        for client in self.header_reader:
            self.handle_client(client, select.EPOLLIN)
        # This starts the streams of the clients whose headers have just been read.
        self.report()
        # Clients without a complete header are dropped. While the server waits for the file, no
        # client has a stream, and this applies to all of them.
        for client in self.clients.values() if self.waiting else self.header_reader:
            self.departures.add(client)
        self.drainer.begin()
        self.loop.timers.set(self.end_drain, self.loop.now + grace)
        self.title.changed(self.loop.now)

    def end_drain(self) -> None:
        """Close the remaining connections when the grace period is over, and end the worker.

        The kernel still sends what is queued in their sockets.
        """
        if self.clients:
            logger.warning(
                "grace period over: closed clients that had not received everything: %s",
                fields(
                    slot=self.slot,
                    clients=len(self.clients),
                    hint="raise --grace if clients need longer",
                ),
            )
        for client in self.clients.values():
            self.departures.add(client)
        self.ended = True

    # The process title

    def render_title(self) -> str:
        state = "draining" if self.draining else "orphaned" if self.orphaned else ""
        return worker_title(self.slot, self.endpoints, state, len(self.clients))
