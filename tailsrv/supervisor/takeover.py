"""Takes over from the orphaned workers of a supervisor that has died.

The workers are found by the names of their sockets. They are asked one after another for all that
they have: listeners, clients and the log. From these, the state of a supervisor is composed, as an
upgrade passes it on, but without workers. Until the new workers serve (see handover.py), the
orphans can serve on, so this process may die at any moment.
"""

import fcntl
import os
import select
import signal
import socket
import stat
import struct
import time
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise

from tailsrv import __version__
from tailsrv.config import Config
from tailsrv.control_socket import (
    connect_to_worker,
    credentials,
    find_supervisor,
    list_worker_sockets,
    overflow_uid,
    socket_name,
)
from tailsrv.error_hints import absolute
from tailsrv.handover import (
    FORMAT,
    MAX_FILES,
    MAX_PACKET,
    Greeting,
    HandedSegment,
    Handover,
    HandoverError,
    Request,
)
from tailsrv.linux.files import close_file
from tailsrv.log import fields, logger
from tailsrv.segments import NO_FILE
from tailsrv.served_file import size_of
from tailsrv.shared_counts import SharedCounts
from tailsrv.supervisor.next_files import identity_of
from tailsrv.supervisor.segment_finder import OPEN_FLAGS
from tailsrv.supervisor.slot import Slot
from tailsrv.supervisor.upgrade_state import LogState, RollState, UpgradeState

# Seconds between attempts to find all workers.
RETRY = 0.02
# Seconds that a worker has after its fork until it listens.
LISTEN_PATIENCE = 1.0
# Seconds that a killed worker has to end. In an uninterruptible sleep, it does not.
KILL_PATIENCE = 1.0


class TakeoverError(Exception):
    """Orphaned workers cannot be taken over. The message is one line that says why."""


@dataclass(slots=True, eq=False)
class Orphan:
    """An orphaned worker, and the connection to it."""

    sock: socket.socket
    pid: int
    uid: int
    # Whether it may be taken over. If not, it is not asked.
    trusted: bool
    # Whether it has closed the connection without a greeting.
    ended: bool = False
    greeting: Greeting | None = None
    handover: Handover = field(default_factory=Handover)

    @property
    def is_known(self) -> bool:
        """Whether the worker has answered, or is not asked."""
        return self.greeting is not None or not self.trusted

    def close(self) -> None:
        """Close the connection. The worker serves on."""
        self.sock.close()


@dataclass(frozen=True, slots=True)
class Found:
    """The workers of one endpoint whose supervisor has died.

    Attributes:
        orphans: Those that have answered.
        foreign: Those of other users.

    """

    orphans: list[Orphan]
    foreign: list[Orphan]


def find(endpoints: Sequence[str], patience: float, trust_all: bool) -> Found:
    """Connect to the workers of `endpoints`, which must have no supervisor, and await a greeting.

    A worker that does not answer is killed: it has the port, and would keep its clients waiting.

    Args:
        endpoints: Addresses and ports, such as `*:4321`.
        patience: Seconds that a worker has for its greeting.
        trust_all: Whether root takes over from workers of other users. Every user can take the name
            of a worker's socket, so this requires that the port is in use.

    Raises:
        TakeoverError: A worker can neither be asked nor ended, or has not answered and serves on.

    """
    deadline = time.monotonic() + patience
    orphans: dict[str, Orphan] = {}
    while True:
        names = _names(endpoints)
        _connect_to(names, orphans, trust_all)
        _await_greetings(orphans.values())
        if all(name in orphans and orphans[name].is_known for name in names):
            break
        # A worker that has just been forked listens soon.
        missing = names - orphans.keys()
        asked = all(orphan.is_known for orphan in orphans.values())
        now = time.monotonic()
        if now >= deadline or (asked and now >= deadline - patience + LISTEN_PATIENCE):
            for name in missing:
                logger.warning("cannot connect to an orphaned worker: %s", fields(name=name))
            break
        time.sleep(RETRY)
    return _sort_out(orphans.values())


def _names(endpoints: Iterable[str]) -> set[str]:
    """Return the names of the sockets of the workers of `endpoints`."""
    wanted = {socket_name(endpoint) for endpoint in endpoints}
    try:
        return {name for name, endpoint in list_worker_sockets().items() if endpoint in wanted}
    except OSError:
        # Without /proc, orphans cannot be found. Then the port is in use.
        return set()


def _connect_to(names: set[str], orphans: dict[str, Orphan], trust_all: bool) -> None:
    """Connect to the workers at `names` that are not in `orphans`, and forget those that ended."""
    for name in [name for name, orphan in orphans.items() if name not in names or orphan.ended]:
        orphans.pop(name).close()
    for name in names - orphans.keys():
        try:
            sock = connect_to_worker(name)
        except OSError:
            # It does not listen yet after its fork, or its queue is full, or it has ended.
            continue
        pid, uid, _ = credentials(sock)
        orphans[name] = Orphan(sock, pid, uid, _is_trusted(uid, trust_all))


def _sort_out(orphans: Iterable[Orphan]) -> Found:
    """Kill the orphans that have not answered, and return the others, each once.

    A worker that listens at several endpoints has a socket for each.
    """
    greeted: dict[tuple[int, int], Orphan] = {}
    foreign: list[Orphan] = []
    for orphan in orphans:
        if orphan.greeting is not None:
            if greeted.setdefault((orphan.pid, orphan.greeting.pid), orphan) is orphan:
                continue
        elif not orphan.trusted:
            foreign.append(orphan)
        elif orphan.ended:
            raise TakeoverError(f"worker {orphan.pid} does not answer: start again")
        else:
            _kill(orphan)
        orphan.close()
    return Found(list(greeted.values()), foreign)


def _is_trusted(uid: int, trust_all: bool) -> bool:
    own = os.geteuid()
    return uid != overflow_uid() and (uid == own or (own == 0 and trust_all))


def why_in_use(endpoints: Sequence[str], foreign: Sequence[Orphan]) -> str | None:
    """Return which orphaned workers have the port of `endpoints`, None if there are none.

    Args:
        endpoints: Addresses and ports.
        foreign: The orphans of other users at these endpoints.

    """
    if foreign:
        return (
            f"workers of user {foreign[0].uid}, whose supervisor has died, still serve it: start"
            " tailsrv as that user or as root to take over from them, or wait until they end"
        )
    port = endpoints[0].rpartition(":")[2]
    with suppress(OSError):
        for endpoint in list_worker_sockets().values():
            if endpoint.rpartition(":")[2] == port and find_supervisor(endpoint) is None:
                return (
                    f"workers whose supervisor has died still serve {endpoint}: start tailsrv with"
                    " the same --bind to take over from them, or wait until they end"
                )
    return None


def _await_greetings(orphans: Iterable[Orphan]) -> None:
    """Read the greetings of `orphans` that arrive within RETRY seconds."""
    waiting = {orphan.sock.fileno(): orphan for orphan in orphans if not orphan.is_known}
    poll = select.poll()
    for fd in waiting:
        poll.register(fd, select.POLLIN)
    while waiting and (ready := poll.poll(RETRY * 1000)):
        for fd, _ in ready:
            orphan = waiting.pop(fd)
            poll.unregister(fd)
            try:
                orphan.greeting = Greeting.decode(orphan.sock.recv(MAX_PACKET))
            except (OSError, HandoverError):
                # It has ended, or does not answer this user.
                orphan.ended = True


def _kill(orphan: Orphan) -> None:
    """Kill `orphan`, and wait until it has ended and its sockets are closed.

    Raises TakeoverError if it may not be killed. A process of another user may claim any pid.
    """
    if not orphan.pid or orphan.uid != os.geteuid():
        raise TakeoverError(
            f"worker {orphan.pid or 'of another pid namespace'} of user {orphan.uid} does not"
            " answer: end it, then start again"
        )
    logger.error(
        "orphaned worker does not answer, killing it, its clients are lost: %s",
        fields(pid=orphan.pid),
    )
    poll = select.poll()
    poll.register(orphan.sock, 0)
    # As long as the connection is open, the pid belongs to no other process.
    if not poll.poll(0):
        os.kill(orphan.pid, signal.SIGKILL)
        poll.poll(KILL_PATIENCE * 1000)


def why_not(orphan: Orphan, config: Config, counts_streams: bool) -> str | None:
    """Return why the clients of `orphan` cannot be taken over, None if they can."""
    greeting = orphan.greeting
    assert greeting is not None
    if greeting.format != FORMAT:
        return f"version {greeting.version} hands over in another format"
    if greeting.path != absolute(config.path):
        return f"they get another file: {greeting.path}"
    if not counts_streams:
        return "this system does not tell how much of a stream has been sent"
    return None


def collect(
    orphans: Sequence[Orphan], config: Config, counts: bool, patience: float
) -> list[Orphan]:
    """Ask the orphans for what they have.

    From now on they send nothing to their clients, until their connections are closed.

    Args:
        orphans: The orphans.
        config: The settings of this server.
        counts: The result of `counts_streams`.
        patience: Seconds that an orphan has for each packet.

    Returns:
        The orphans that have handed everything over.

    Raises:
        TakeoverError: An orphan has ended, there are too few descriptors, or no orphan is left. The
            other orphans serve on when this process ends.

    """
    complete = []
    for orphan in orphans:
        if (reason := why_not(orphan, config, counts)) is not None:
            logger.warning(
                "clients of an orphaned worker cannot be taken over, it drains them: %s",
                fields(
                    pid=orphan.pid,
                    clients=orphan.greeting and orphan.greeting.clients,
                    reason=reason,
                ),
            )
        try:
            orphan.sock.send(Request(clients=reason is None).encode())
            _receive(orphan, patience)
        except TimeoutError:
            _kill(orphan)
            discard(orphan)
        except (HandoverError, OSError) as error:
            # If it lives, it serves on, but no other supervisor would come.
            raise TakeoverError(
                f"worker {orphan.pid} cannot be taken over: {error}: start again"
            ) from error
        else:
            complete.append(orphan)
    if not complete:
        raise TakeoverError("no orphaned worker is left: start again")
    return complete


def _receive(orphan: Orphan, patience: float) -> None:
    """Receive the handover of `orphan`. Raises HandoverError, TimeoutError or OSError."""
    poll = select.poll()
    poll.register(orphan.sock, select.POLLIN)
    while True:
        if not poll.poll(patience * 1000):
            raise TimeoutError
        try:
            packet, files, _, _ = socket.recv_fds(
                orphan.sock, MAX_PACKET, MAX_FILES, socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            continue
        if not packet:
            raise HandoverError("it has ended")
        last = orphan.handover.add(packet, files)
        _check_files(orphan)
        if last:
            return


def _check_files(orphan: Orphan) -> None:
    """Raise HandoverError if a process of another user has handed over files that it cannot read.

    This process opens them again, see reopen().
    """
    if orphan.uid == os.geteuid():
        return
    handover = orphan.handover
    files = [segment.file for segment in handover.segments if segment.file is not None]
    for file in [*files, *([handover.next.file] if handover.next else [])]:
        flags = fcntl.fcntl(file, fcntl.F_GETFL)
        if flags & (os.O_PATH | os.O_WRONLY) or not stat.S_ISREG(os.fstat(file).st_mode):
            raise HandoverError("it cannot read the files that it serves")


def discard(orphan: Orphan) -> None:
    """Close what `orphan` has handed over, and the connection."""
    for file in orphan.handover.files():
        close_file(file)
    orphan.close()


# The state


Homes = list[int | None]


def find_homes(owned: Sequence[Collection[int]], rows: Sequence[Collection[int]]) -> Homes | None:
    """Return the slot in which the listeners of each orphan are, if there is one for each of them.

    An orphan ends as soon as the new worker of its clients serves. If that worker lacked one of the
    orphan's listeners, only the supervisor might have it, and would take the connections in its
    queue with it if it died now.

    Args:
        owned: The listeners of each orphan, as inode numbers.
        rows: The listeners of each slot, as inode numbers.

    Returns:
        The slots, with None for an orphan of whose listeners no slot has any. Or None if an orphan
        has listeners in two slots, or in the same slot as another orphan: then all slots must share
        all listeners.

    """
    homes: Homes = []
    for own in owned:
        slots = [slot for slot, row in enumerate(rows) if not set(row).isdisjoint(own)]
        if len(slots) > 1 or (slots and slots[0] in homes):
            return None
        homes.append(slots[0] if slots else None)
    return homes


def compose(
    handovers: Sequence[Handover],
    listeners: Sequence[Sequence[socket.socket]],
    shared: bool,
    homes: Homes,
    endpoints: Sequence[str],
    follow_name: bool,
) -> tuple[UpgradeState, list[int]]:
    """Compose the state of a server with the clients of all `handovers`.

    Args:
        handovers: What the orphans have handed over.
        listeners: The listeners of each slot.
        shared: Whether all slots share the same listeners.
        homes: For each handover the slot that its clients must be in, None if it can be any.
        endpoints: The addresses that the server listens on.
        follow_name: Whether the log has shared ends, and may roll.

    Returns:
        The state, and for each handover the slot that its clients are in. The state has the
        descriptors of the listeners and those of the handovers, but for the handovers' listeners.

    """
    end = end_of(handovers)
    ends = SharedCounts(len(listeners), number=end) if follow_name else None
    slots = [Slot(index, list(row), shared).save() for index, row in enumerate(listeners)]
    for sock in (sock for row in listeners for sock in row):
        # The state has the descriptors now.
        sock.detach()
    places = []
    for handover, home in zip(handovers, homes, strict=True):
        # The slot with the fewest clients, so that an orphan for each slot gets one for itself.
        fewest = min(range(len(slots)), key=lambda slot: (len(slots[slot].clients), slot in places))
        index = fewest if home is None else home
        places.append(index)
        clients = slots[index].clients
        for client in handover.clients:
            clients.append([len(clients), client.file, client.start, client.end])
    log = merge_logs(handovers)
    roll = _roll(handovers, log, follow_name)
    return (
        UpgradeState(
            version=__version__,
            endpoints=list(endpoints),
            started=time.time(),
            log=log,
            base=0,
            roll=roll,
            ends=[ends.fd] if ends else [],
            state_lock=[],
            file_gone=False,
            polling=None,
            control=[],
            quota=[],
            slots=slots,
        ),
        places,
    )


def end_of(handovers: Iterable[Handover]) -> int:
    """Return the largest end of the log that any worker has acted on, also one that has died.

    Closes the memory files.
    """
    ends = [0]
    for handover in handovers:
        ends.append(handover.end)
        if handover.ends is not None:
            data = os.pread(handover.ends, os.fstat(handover.ends).st_size, 0)
            ends += [number for (number,) in struct.iter_unpack("q", data)]
            os.close(handover.ends)
            handover.ends = None
    return max(ends)


def _roll(handovers: Iterable[Handover], log: LogState | None, follow_name: bool) -> RollState:
    """Return the state of the roll: the next file, and whether the log must roll at once.

    It must if the active segment was truncated, or if a worker that has died had rolled by itself.
    Closes the next files that are not needed.
    """
    truncated = any(handover.truncated for handover in handovers)
    # Another orphan may have rolled to a next file.
    known = set() if log is None else {identity_of(file) for file in log.files()}
    next_files: list[int] = []
    agreed: int | None = None
    for each in (handover.next for handover in handovers if handover.next is not None):
        if (identity := identity_of(each.file)) in known or not follow_name:
            close_file(each.file)
        else:
            known.add(identity)
            next_files.append(reopen(each.file))
            agreed = each.agreed
    mode = "ROLLING" if truncated else "IDLE" if agreed is None else "AGREED"
    opened_at = max((handover.opened_at for handover in handovers), default=0)
    return RollState(0, mode, truncated, agreed, next_files, opened_at, [])


def merge_logs(handovers: Iterable[Handover]) -> LogState | None:
    """Return the log of all handovers, None if they have none.

    An orphan may have closed segments that its clients do not read, and may have rolled before the
    others. Closes the files that are not in the result.
    """
    segments: dict[int, HandedSegment] = {}
    start = 0
    for handover in handovers:
        start = max(start, handover.start)
        for segment in handover.segments:
            known = segments.get(segment.base)
            kept = segment if known is None else max(known, segment, key=_preference)
            other = known if kept is segment else segment
            segments[segment.base] = kept
            if other is not None and other.file is not None:
                close_file(other.file)
    if not segments:
        return None
    ordered = [segments[base] for base in sorted(segments)]
    for index, (segment, following) in enumerate(pairwise(ordered)):
        if segment.size is None:
            ordered[index] = _seal(segment, following)
    return LogState(
        [
            [each.base, NO_FILE if each.file is None else reopen(each.file), each.size]
            for each in ordered
        ],
        start,
    )


def _seal(segment: HandedSegment, following: HandedSegment) -> HandedSegment:
    """Return `segment` as a worker sealed it that has closed it since.

    If the next segment has the same file, that was truncated, and the bytes are lost.
    """
    file, size = segment.file, following.base - segment.base
    if file is not None and following.file is not None and _are_same(file, following.file):
        close_file(file)
        file = None
    return HandedSegment(segment.base, size, file)


def reopen(file: int) -> int:
    """Return a descriptor that this process has opened for the open `file`, and close that.

    A service manager may give each start of a service a mount namespace of its own. When the last
    process of the old one has ended, a file that was opened there has no path any more [measured:
    readlink(2) of its name in /proc returns one without the folder of its mount]. If the file
    cannot be opened by its path, return `file` itself.
    """
    try:
        other = os.open(os.readlink(f"/proc/self/fd/{file}"), OPEN_FLAGS)
    except OSError:
        return file
    if _are_same(file, other):
        close_file(file)
        return other
    close_file(other)
    return file


def _are_same(file: int, other: int) -> bool:
    """Return whether two descriptors certainly lead to the same file."""
    try:
        return os.path.sameopenfile(file, other)
    except OSError:
        # The file has been deleted on a file server, for example.
        return False


def _preference(segment: HandedSegment) -> tuple[bool, bool, int]:
    """Return a key that is largest for what is known best of the segment with one base offset.

    Two files can have the same base offset if the first was empty when it was sealed.
    """
    size = 0 if segment.file is None else size_of(segment.file) or 0
    return segment.size is not None, segment.file is not None, size
