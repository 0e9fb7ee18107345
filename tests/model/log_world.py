"""A real server with --follow-name, and a writer whose file is rotated, truncated and deleted.

The model knows the log: every byte that the writer has written, in that order. The writer writes
nothing to a file after the next one has a byte. So the order is certain, whatever the server's
timing is.
"""

import os
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from model.client import ModelClient
from model.history import LogHistory, LogStream, Stream
from model.world import FILE, Links, World, peers_of
from support.server import Server, hurried
from support.sockets import LINE_LENGTH, expect, recv_exactly
from support.status import status
from support.waiting import DEADLINE, eventually

# The log line before a worker is killed that does not freeze.
HUNG = "worker does not take part in a roll"

# The log line before a client is disconnected that had not received all bytes before a truncation.
BYTES_GONE = "client disconnected: its next bytes no longer exist"

# Seconds after which something happens to a worker in a race: later than the first byte of the next
# file plus `seal_limit` of QUICK, and earlier than that plus `freeze_patience`.
RACE = 0.4

# Seconds after which the old file counts as complete: `settle` of QUICK, and some more.
PAUSE = 0.3

# An example needs a few seconds. Some waits stay long enough for a busy machine: a worker that is
# only slow must not be killed, and late bytes must be counted.
QUICK = hurried(settle=0.15, seal_limit=0.3, late_patience=10.0)


@dataclass
class LogFile:
    """A file of the log. `path` is its present name, None if it was deleted.

    `size` is None while the writer has not gone on to the next file.
    """

    base: int
    inode: int
    path: Path | None
    size: int | None = None

    @property
    def end(self) -> int:
        """The offset after the last byte."""
        assert self.size is not None
        return self.base + self.size


class LogWorld(World):
    """A server with --follow-name, with a state file or without, and the log that it serves."""

    def __init__(self) -> None:
        super().__init__()
        self.history: LogHistory = LogHistory()
        Path(self.folder.name, "state").mkdir()
        # Every file that the writer has written to. It is at the last one.
        self.files: list[LogFile] = []
        # Empty files that were rotated: the server may keep them open for a while.
        self.empty: set[int] = set()
        # Whether the path names the writer's file, and the descriptor of the file that the path
        # names while the writer still has another one open.
        self.here = True
        self.next: int | None = None
        # Descriptors that the writer has not closed yet after a rotation.
        self.kept: list[int] = []
        # The possible starts of the log, and the ends that a worker may know.
        self.log_starts, self.pending_ends = {0}, set[int]()
        # The inode, the start and the end of each segment that was truncated.
        self.lost: list[tuple[int, int, int]] = []
        # The end of the bytes that were truncated while the workers had no supervisor.
        self.lost_end = 0
        # Whether the server has opened the first file.
        self.opened = False
        # The path was changed and changed back, so workers may be frozen for a moment.
        self.moved_back = False
        self.rotations = self.truncations = self.restarts = 0

    def begin_log(self, naming: str, size: int | None, saved: bool) -> None:
        """Start the server.

        Args:
            naming: How rotated files are named.
            size: The size of the file at first, None if there is none yet.
            saved: Whether there is a state file.

        """
        self.naming, self.saved = naming, saved
        self.start(linger=False, size=size)

    def program(self) -> Sequence[str | Path]:
        """Return the command of a server with shorter waits."""
        return QUICK

    def options(self) -> list[str]:
        """Return options with a grace period that is long enough to read every stream."""
        state_file = Path(self.folder.name, "state", "log.json")
        saved = ["--state-file", str(state_file)] if self.saved else []
        return ["--follow-name", "--grace", str(DEADLINE), *saved]

    # The log.

    def create(self) -> None:
        """Create the first file."""
        self.file = self.new_file(self.path)
        self.enter(self.file)
        self.note_size()

    def new_file(self, path: Path) -> int:
        """Create a file with the name `path`; with symbolic links, one that `path` links to."""
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        if self.naming != "link" or path != self.path:
            return os.open(path, flags, 0o644)
        self.rotations += 1
        target = self.dated("file-%d.log")
        file = os.open(target, flags, 0o644)
        link = path.with_name("link")
        link.symlink_to(target)
        link.rename(path)
        return file

    def dated(self, form: str) -> Path:
        """Return a name with a number that looks like a date."""
        return self.path.with_name(form % (2026010100 + self.rotations))

    def enter(self, file: int) -> None:
        """Record that the writer continues with `file`."""
        self.file_base = self.history.size
        self.files.append(LogFile(self.file_base, os.fstat(file).st_ino, self.path.resolve()))

    @property
    def current(self) -> LogFile:
        """The writer's file."""
        return self.files[-1]

    def write(self, data: bytes, offset: int) -> None:
        """Write `data` at the log offset `offset`."""
        super().write(data, offset - self.file_base)

    def note_size_to(self, client: ModelClient) -> None:
        """Record the possible starts and ends of the log when the header of `client` is read."""
        if isinstance(stream := client.stream, LogStream):
            if not self.here:
                self.pending_ends.add(self.history.size)
            stream.note_log(self.log_starts, self.pending_ends | {self.history.size})
            client.may_end = client.may_end or stream.may_be_refused
            if stream.may_be_before(self.lost_end):
                client.may_end = True
            client.doomed = client.doomed or not stream.starts

    def new_stream(self, header: bytes, number: int) -> Stream:
        """Return the stream that `header` with its `number` asks for."""
        return LogStream(abs(number), b"-" in header, self.history.now, b"?" in header)

    def note_log(self) -> None:
        """Record that the start or the end of the log may have changed."""
        for client in self.living:
            self.note_size_to(client)

    # Rotations.

    def move_away(self, how: str) -> None:
        """Remove the path; the writer still has its file open."""
        self.await_first()
        if how == "unlink" and self.orphaned and self.pending_ends:
            # Only workers have files open now, and they may not have this one.
            how = "rename"
        if self.naming != "link":
            if how == "unlink":
                self.await_open(self.current.inode)
                self.path.unlink()
                self.current.path = None
            else:
                self.rename_aside()
        elif how == "unlink":
            self.await_open(self.current.inode)
            self.path.resolve().unlink()
            self.current.path = None
        else:
            self.path.unlink()
        self.here = False
        self.pending_ends.add(self.history.size)
        self.note_log()

    def rename_aside(self) -> None:
        """Rename the writer's file as logrotate does, with `dateext` or with numbers."""
        assert self.naming != "link"
        self.rotations += 1
        if self.naming == "dated":
            target = self.dated(f"{self.path.name}-%d")
        else:
            target = self.path.with_name(f"{self.path.name}.1")
            numbered = (file for file in self.files if file.path not in (None, self.path))
            for file in sorted(numbered, key=lambda file: file.base):
                assert file.path is not None
                number = int(file.path.suffix[1:]) + 1
                file.path = file.path.rename(file.path.with_suffix(f".{number}"))
        self.current.path = self.path.rename(target)

    def create_next(self) -> None:
        """Create the next file; the writer still has its file open."""
        self.next = self.new_file(self.path)

    def hesitate(self, count: int, upgrade: bool) -> None:
        """Append to the old file long after the next one was created, which is still empty.

        The workers freeze before that, because the log will probably roll soon. But it does not.
        """
        self.move_away("rename")
        self.create_next()
        if upgrade:
            self.upgrade()
        self.await_serving()
        # Nothing tells when the workers have frozen.
        time.sleep(PAUSE)
        self.append(count)
        for client in self.living:
            self.read(client, 1 << 20)

    def move_back(self) -> None:
        """Let the path name the writer's file again, also in place of an empty next file."""
        assert self.current.path is not None
        if self.naming == "link":
            self.path.unlink(missing_ok=True)
            self.path.symlink_to(self.current.path)
        else:
            self.current.path = self.current.path.rename(self.path)
        if self.next is not None:
            self.empty.add(os.fstat(self.next).st_ino)
            os.close(self.next)
            self.next = None
        self.here = self.moved_back = True

    def switch(self, keep: bool) -> None:
        """Let the writer continue with the next file; with `keep` it does not close the old one."""
        assert self.file is not None
        assert self.next is not None
        left = self.current
        left.size = self.history.size - left.base
        self.pending_ends.add(self.history.size)
        if left.path is None and left.size:
            self.log_starts.add(left.end)
        if not left.size:
            self.empty.add(left.inode)
        self.kept.append(self.file)
        if not keep:
            self.close_kept()
        self.file, self.next = self.next, None
        self.enter(self.file)
        self.here, self.moved_back = True, False
        self.note_log()

    def close_kept(self) -> None:
        """Close the files that the writer does not use any more."""
        while self.kept:
            os.close(self.kept.pop())

    def rotate(self, how: str, counts: list[int], keep: bool) -> None:
        """Rotate at once, for each of `counts`, and append so many bytes to the next file."""
        self.await_first()
        for count in counts:
            if how == "replace" and self.naming != "link" and not self.orphaned:
                # The server cannot find a file that has no name any more.
                self.await_open(self.current.inode)
                aside = self.path.with_name("next")
                self.next = self.new_file(aside)
                aside.rename(self.path)
                self.current.path = None
                self.pending_ends.add(self.history.size)
                self.here = False
            else:
                self.rotate_silently()
            self.switch(keep)
            self.append(count)

    def append_late(self, count: int) -> None:
        """Append to a file after it was sealed: no client gets these bytes, and the log says so."""
        if self.history.size == self.file_base:
            self.append(1)
        self.rotate("rename", [1], keep=True)
        self.await_rolled()
        warning = "bytes were appended to the old file after the roll"
        before = len(self.server.lines(warning))
        os.pwrite(self.kept[-1], b"late" * count, os.fstat(self.kept[-1]).st_size)
        line = self.server.logged(warning, count=before + 1)
        assert f" bytes={4 * count} " in line, line

    def race(self, count: int, event: str) -> None:
        """Rotate while the writer does not stop to append to the old file.

        The server decides how many of these bytes belong to the log. All clients must get the same.
        With an `event`, a worker is stopped, so that it does not acknowledge the order to freeze,
        and is later killed or continued.
        """
        self.await_rolled()
        self.append(1)
        self.await_known(self.living)
        assert self.file is not None
        old, start = self.file, self.history.size - self.file_base
        probes = [World.connect(self, b"?-0\n") for _ in range(3)]
        for probe in probes:
            self.read(probe, LINE_LENGTH)
        self.rotate_silently()
        first = random.Random(f"{self.history.size} next").randbytes(count)
        assert self.next is not None
        rolled = len(self.server.lines("rolled: "))
        pid = self.worker_pids()[count % self.workers]
        if event != "none":
            self.note_risk()
            self.unsettled = True
            if event == "SIGKILL":
                self.killed.add(pid)
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP)
        os.write(self.next, first)
        os.lseek(old, 0, os.SEEK_END)
        late = random.Random(f"{self.history.size} late").randbytes(1 << 20)
        written, began = 0, time.monotonic()
        while not (lines := self.server.lines("rolled: ")[rolled:]):
            assert time.monotonic() < began + DEADLINE, self.server.log
            for _ in range(10):
                written += os.write(old, late[written : written + 5])
            if event != "none" and time.monotonic() > began + RACE:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.Signals[event])
                event = "none"
        sealed = int(lines[0].partition(" sealed=")[2].split()[0])
        assert start <= sealed <= start + written, lines
        self.history.append(late[: sealed - start])
        self.switch(keep=False)
        self.history.append(first)
        self.note_size()
        self.await_rolled()
        for probe in probes:
            self.read(probe, 1 << 40)
            if probe in self.living:
                self.leave(probe, "close")

    def rotate_silently(self) -> None:
        """Rotate without writing to the next file."""
        if self.naming != "link":
            self.rename_aside()
        self.here = False
        self.create_next()

    def cut(self, count: int) -> None:
        """Truncate the last `count` bytes of the writer's file; the log continues with the rest."""
        assert self.file is not None
        self.await_rolled()
        size = self.history.size - self.file_base
        left = max(0, size - count)
        self.await_known(self.living)
        for client in self.living:
            self.read(client, 1 << 16)
        # Its worker has seen the end, so that the base of the next segment is certain. And it
        # monitors the file.
        probe = World.connect(self, b"?-0\n")
        self.read(probe, LINE_LENGTH)
        for client in self.living:
            if client.stream and client.due(self.history.size):
                client.may_end = True
        rolled, end = len(self.server.lines("rolled: ")), self.history.size
        rest = os.pread(self.file, left, 0)
        self.note_truncation(left)
        os.ftruncate(self.file, left)
        line = self.server.logged("rolled: ", count=rolled + 1)
        assert line.endswith(f" offset={end}"), line
        self.truncated(end, rest)
        self.read(probe, 1 << 40)
        assert probe.stream, probe
        assert probe.stream.stands_at(self.history.size), probe
        self.leave(probe, "close")

    def note_truncation(self, left: int) -> None:
        """Record that the writer's file is truncated to `left` bytes."""
        # The bytes in flight may also be those of an earlier segment in the same file.
        self.lost.append((self.current.inode, self.file_base, self.history.size))
        self.history.note_truncation(
            (base + left, lost_end)
            for inode, base, lost_end in self.lost
            if inode == self.current.inode
        )
        self.truncations += 1

    def truncated(self, end: int, rest: bytes) -> None:
        """Record that the log ended at `end` and continues with `rest`, in the same file."""
        self.continue_truncated(end, rest)
        self.await_start(end)
        self.await_rolled()

    def continue_truncated(self, end: int, rest: bytes) -> None:
        self.files.pop()
        assert self.file is not None
        self.enter(self.file)
        self.pending_ends.add(end)
        self.log_starts.add(end)
        self.history.append(rest)
        self.note_size()

    def cut_orphaned(self, count: int) -> None:
        """Truncate the last `count` bytes while the workers have no supervisor.

        The workers hold the log at its end until the next one takes over.
        """
        assert self.file is not None
        size = self.history.size - self.file_base
        if self.pending_ends or not size:
            # It is not certain which file the workers have.
            return
        self.go_on()
        left = max(0, size - count)
        for client in self.living:
            self.read(client, 1 << 16)
        # Its worker has seen the end, so that the base of the next segment is certain.
        probe = World.connect(self, b"?-0\n")
        self.read(probe, LINE_LENGTH)
        end = self.history.size
        for client in self.living:
            if client.stream and client.stream.may_be_before(end):
                client.may_end = True
        rest = os.pread(self.file, left, 0)
        self.note_truncation(left)
        os.ftruncate(self.file, left)
        self.lost_end = end
        self.continue_truncated(end, rest)
        self.leave(probe, "close")
        self.await_noticed()

    def die_agreed(self, count: int, late: int, alone: int | None) -> None:
        """Kill the supervisor when workers may roll by themselves, and let them do so.

        Args:
            count: How many bytes to append to the next file.
            late: How many bytes to append to the old file when a worker has rolled.
            alone: The index of a worker that gets no clients, so that it does not roll. The others
                are killed when they have. None if there is none.

        """
        self.await_rolled()
        self.await_known(self.living)
        self.append(1)
        for client in self.living:
            self.read(client, 1 << 40)
        pids = sorted(self.worker_pids())
        rolling = [pid for pid in pids if alone is None or pid != pids[alone % len(pids)]]
        for pid in {*pids} - {*rolling}:
            self.leave_all(pid)
        self.rotate_silently()
        assert self.next is not None
        inode = os.fstat(self.next).st_ino
        eventually(lambda: all(files_of(pid, self.folder.name)[inode] for pid in pids))
        end = self.history.size
        super().supervisor_dies("SIGKILL", settled=False)
        self.switch(keep=True)
        self.append(count)
        rolled = []
        for pid in rolling:
            for client in self.clients_of(pid):
                if client.stream and client.stream.stands_at(end) and not client.may_end:
                    self.receive(client, 1)
                    rolled.append(pid)
                    break
        if rolled:
            os.pwrite(self.kept[-1], b"late" * late, os.fstat(self.kept[-1]).st_size)
        if alone is not None and len(pids) > 1:
            for pid in rolled:
                self.end_orphan(pid, signal.SIGKILL)

    def clients_of(self, pid: int) -> list[ModelClient]:
        """Return the clients that the worker `pid` has."""
        ports = peers_of(pid)
        return [client for client in self.living if client.sock.getsockname()[1] in ports]

    def leave_all(self, pid: int) -> None:
        """Reset all connections to the worker `pid`, and wait until it has noticed that."""
        for client in self.clients_of(pid):
            self.leave(client, "reset")
            client.ended = True
        eventually(lambda: not peers_of(pid))

    def await_noticed(self) -> None:
        """Wait until all workers have looked at the file: they have then if they get a client."""
        probes: list[ModelClient] = []
        for pid in self.worker_pids():
            for _ in range(1000):
                if {probe.sock.getsockname()[1] for probe in probes} & peers_of(pid):
                    break
                # By its port, the kernel decides which worker gets it.
                probes.append(World.connect(self, b"?-0\n"))
                self.read(probes[-1], LINE_LENGTH)
        for probe in probes:
            self.leave(probe, "close")

    def delete(self, count: int) -> None:
        """Delete the oldest files that the server has sealed."""
        if self.orphaned:
            # No other file is certain to be sealed in all workers.
            reach = self.reach()
            sealed = [file for file in self.sealed_files() if reach and file.end < reach]
        else:
            self.await_rolled()
            sealed = self.sealed_files()
        self.log_starts.add(self.delete_files(sealed[:count]))
        self.note_log()
        if not self.orphaned:
            self.await_start(max(self.log_starts))

    def sealed_files(self) -> list[LogFile]:
        """Return the files before the writer's one that still have a name."""
        return [file for file in self.files[:-1] if file.path is not None and file.size]

    def delete_files(self, files: list[LogFile]) -> int:
        """Delete `files`, the oldest ones, and return where the log begins now."""
        for file in files:
            assert file.path is not None
            file.path.unlink()
            file.path = None
        return max([*self.log_starts, *(file.end for file in files)])

    # The server.

    def reach(self) -> int | None:
        """Return the least offset up to which every worker serves the log, None if none does.

        Without a supervisor, workers do not roll, except to a file for which that was agreed.
        """
        if not self.orphaned:
            return self.history.size
        return min(self.pending_ends | {self.history.size}) if self.served else None

    def supervisor_dies(self, how: str, settled: bool) -> None:
        """Kill the supervisor alone. Files that only the supervisor could find must be open."""
        if self.file is not None:
            if not self.served:
                self.await_first()
                self.await_settled()
            if settled and self.here:
                self.await_rolled()
            elif any(file.path is None for file in self.files[self.certain() :]):
                self.await_active()
        super().supervisor_dies(how, settled)

    def may_be_empty(self) -> bool:
        """Tell whether there may be no worker, so that the port would be closed."""
        return super().may_be_empty() or bool(self.server.lines(HUNG))

    def certain(self) -> int:
        """Return the number of files that are certainly sealed in all workers."""
        ends = min(self.pending_ends | {self.history.size})
        return sum(file.size is not None and file.end < ends for file in self.files)

    def await_active(self) -> None:
        """Wait until all workers have the writer's file."""
        self.await_serving()
        if self.history.size == self.file_base:
            self.append(1)
        eventually(self.is_active)

    def is_active(self) -> bool:
        """Tell whether all workers have the writer's file."""
        pids = self.worker_pids()
        return len(pids) == self.workers and all(
            files_of(pid, self.folder.name)[self.current.inode] for pid in pids
        )

    def takeover(self, workers: int, more: list[str], failing: list[int]) -> None:
        """Start another supervisor."""
        super().takeover(workers, more, failing)
        if self.file is not None:
            self.note_log()

    def await_open(self, inode: int) -> None:
        """Wait until the supervisor has the file `inode` open, to serve it later.

        It opens a file once more before that, only to examine it. Thus one look is not enough.
        """
        looks = 0
        while looks < 3 and not self.orphaned:
            if files_of(self.server.pid, self.folder.name)[inode]:
                looks += 1
                time.sleep(0.01)
            else:
                looks = 0
                self.go_on()
                eventually(lambda: files_of(self.server.pid, self.folder.name)[inode])

    def await_first(self) -> None:
        """Wait until the server has opened the first file: the log begins with it."""
        if not self.opened:
            self.await_open(self.current.inode)
            self.opened = True

    def await_rolled(self) -> None:
        """Wait until the writer's file is the active segment in all processes."""
        self.await_first()
        self.await_serving()
        if self.history.size == self.file_base:
            self.append(1)
        eventually(self.has_rolled)
        self.lost_end = 0
        if not self.moved_back and self.here:
            self.pending_ends.clear()
        self.await_start(max(self.log_starts))

    def has_rolled(self) -> bool:
        """Tell whether the writer's file is the active segment in all processes."""
        pids = self.worker_pids()
        return (
            status(self.server)["log"]["end"] == self.history.size
            and len(pids) == self.workers
            and all(files_of(pid, self.folder.name)[self.current.inode] for pid in pids)
        )

    def await_start(self, start: int) -> None:
        """Wait until no stream begins before `start`, and record that."""
        eventually(lambda: status(self.server)["log"]["start"] == start)
        self.log_starts = {start}
        self.note_log()

    def go_on(self) -> None:
        """Continue the stopped processes. A worker that delayed a roll was killed."""
        stopping = self.stopping
        super().go_on()
        if stopping and self.server.lines(HUNG):
            self.note_risk()

    def note_risk(self) -> None:
        """Record that clients that the supervisor does not know may be lost."""
        for client in self.living:
            client.may_be_lost = client.may_be_lost or not client.known

    def kill(self, slot: int, number: str, known: bool) -> None:
        """Kill a worker."""
        if self.server.pid in self.stopped:
            self.go_on()
        super().kill(slot, number, known)

    def upgrade(self) -> None:
        """Upgrade the program, after a previous upgrade has finished."""
        self.await_serving()
        super().upgrade()

    def stop(self) -> None:
        """Stop all workers. One that delays a roll is killed."""
        super().stop()
        self.unsettled = True

    def stop_supervisor(self) -> None:
        """Stop the supervisor, so that several rotations occur before its next turn."""
        self.stopping = True
        os.kill(self.server.pid, signal.SIGSTOP)
        self.stopped.append(self.server.pid)

    def restart(
        self,
        crash: bool,
        first: str,
        before: list[int],
        away: bool,
        down: list[int],
        delete: int,
        reuse: bool,
        orphaned: bool,
    ) -> None:
        """End the server, rotate while it is down, and start it again.

        Args:
            crash: Whether it is killed.
            first: What happens before: something that only the state file tells later.
            before: How many bytes to append after each rotation just before that.
            away: Whether to rename the file once more, without a next one.
            down: The same as `before` for the rotations meanwhile.
            delete: How many old files to delete meanwhile.
            reuse: Whether the first rotation is to give a deleted file's inode to the new file.
            orphaned: Whether the supervisor dies before these rotations.

        """
        self.restarts += 1
        if first == "late":
            self.append_late(100)
        elif first == "cut" and self.history.size > self.file_base:
            self.cut(1000)
        # A file that has no name any more must be sealed: a new server could not find it.
        self.await_rolled()
        deleted = self.sealed_files()[:delete]
        if orphaned:
            self.supervisor_dies("SIGKILL", settled=False)
        self.rotate("rename", before, keep=False)
        if away:
            self.move_away("rename")
        self.end_server(crash or orphaned)
        self.log_starts = {self.delete_files(deleted)}
        for index, count in enumerate(down):
            if not self.here:
                self.create_next()
                self.switch(keep=False)
                self.append(count)
            elif reuse and deleted and not index and self.naming != "link":
                self.reuse_inode(deleted[-1])
                self.append((deleted[-1].size or 0) + count)
            else:
                self.rotate("rename", [count], keep=False)
        self.launch()
        self.await_serving()

    def reuse_inode(self, deleted: LogFile) -> None:
        """Rotate, to a file that has the inode of a deleted one if the file system permits it."""
        self.rename_aside()
        created = []
        aside = self.path.with_name("candidate")
        for index in range(20):
            created.append(self.new_file(aside.with_suffix(f".{index}")))
            if os.fstat(created[-1]).st_ino == deleted.inode:
                break
        aside.with_suffix(f".{len(created) - 1}").rename(self.path)
        for index, file in enumerate(created[:-1]):
            aside.with_suffix(f".{index}").unlink()
            os.close(file)
        self.here, self.next = False, created[-1]
        self.switch(keep=False)

    def end_server(self, crash: bool) -> None:
        """End the server; every client gets a part of its stream, and all of it in a drain."""
        least = min(self.pending_ends | {self.history.size})
        if not crash:
            self.await_known(self.living)
        if crash:
            for server in (*self.dead, self.server):
                server.kill_all()
        else:
            self.server.expected_status = 0
            self.server.signal(signal.SIGTERM)
        for client in self.living:
            if not client.ended:
                self.read_last(client, 0 if crash else least)
                client.ended = True
        self.living.clear()
        for sock in self.server.clients:
            sock.close()
        for server in {*self.dead, self.server}:
            server.wait()
            self.check_log(server)
        self.dead.clear()
        self.orphaned = self.unsettled = False
        self.kills = self.upgrades = 0

    def read_last(self, client: ModelClient, least: int) -> None:
        """Read the stream to its end, which must not be before the offset `least`."""
        try:
            while received := client.sock.recv(1 << 20):
                assert client.stream, f"{client} received {received[:20]!r}"
                client.stream.take(received, self.history)
        except ConnectionError:
            assert not least or client.may_be_lost or client.may_end or client.doomed, client
            return
        if not (client.may_be_lost or client.may_end or client.doomed):
            assert client.due(least) == 0, f"{client} ended {client.due(least)} bytes too early"

    # The end of an example.

    def finish(self) -> None:
        """Bring every stream to an end that is known exactly, and read the log once more."""
        self.go_on()
        if self.orphaned:
            self.takeover(self.workers, self.more, [])
        if self.file is None:
            self.create()
        if not self.here:
            if self.next is None:
                self.create_next()
            self.switch(keep=False)
        self.append(max(0, self.furthest - self.history.size) + 100)
        self.await_rolled()
        self.await_known(self.living)
        for client in self.living:
            self.read(client, 1 << 40)
        self.living = [client for client in self.living if not client.ended]
        eventually(self.is_left_alone)
        for client in self.living:
            self.read(client, 1 << 40)
            assert client.stream is None or client.stream.stands_at(self.history.size), client
        self.check_all_offsets()
        for client in self.living:
            client.sock.close()
        self.living.clear()
        self.close_kept()
        eventually(self.is_left_alone)
        self.check_descriptors()
        self.server.signal(signal.SIGTERM)
        self.server.wait()
        self.check_log(self.server)

    def check_all_offsets(self) -> None:
        """Start streams at the ends of the files, and just before and after them."""
        (start,) = self.log_starts
        borders = [start, *(file.end for file in self.files[-8:-1]), self.history.size]
        offsets = {border + more for border in borders for more in (-1, 0, 1)}
        for offset in sorted(offsets & set(range(1, self.history.size))):
            if offset < start:
                with suppress(ConnectionError):
                    assert self.server.connect(b"%d\n" % offset).recv(1) == b"", offset
            else:
                self.check_offset(offset, offset)
        self.check_offset(0, start)

    def check_offset(self, header: int, start: int) -> None:
        """Assert that `header` leads to the bytes from `start` to the end."""
        with closing(self.server.connect(b"?%d\n" % header)) as sock:
            line = b"%019d %019d\n" % (start, self.history.size)
            assert recv_exactly(sock, LINE_LENGTH) == line
            expect(sock, bytes(self.history.data[start:]))

    def expected_errors(self, server: Server) -> set[str]:
        """Return the errors in the log of `server` that the model has caused."""
        expected = super().expected_errors(server) | set(server.lines(HUNG))
        if self.truncations:
            expected.update(server.lines(BYTES_GONE))
        return expected

    def describe(self) -> str:
        """Return what helps to explain a failure."""
        files = "\n".join(map(str, self.files))
        return f"The files:\n{files}\nThe end: {self.history.size}\n{super().describe()}"

    def differing_links(self) -> list[str]:
        """Return how the open descriptors differ from the expected ones, one line per process."""
        (start,) = self.log_starts
        files = Counter(
            file.inode for file in self.files[:-1] if file.path and file.size and file.end > start
        )
        files[self.current.inode] += 1
        found = []
        for pid in (self.server.pid, *self.worker_pids()):
            links = files_of(pid, self.folder.name)
            extra, missing = links - files, files - links
            if pid == self.server.pid:
                # It counts late bytes of files that were empty, too.
                for file in self.empty:
                    del extra[file]
            if extra or missing:
                found.append(f"{pid}: files too many {dict(extra)}, too few {dict(missing)}")
        return found + self.differing_others()

    def differing_others(self) -> list[str]:
        """Return how what is open besides files differs from what was open at the start."""
        if self.base is None:
            return []
        found = []
        for name, links, base in zip(
            ("supervisor", "workers"), self.open_links(), self.expected_links(), strict=True
        ):
            extra, missing = without_files(links - base), without_files(base - links)
            # The supervisor needs inotify since the first rotation.
            if name == "supervisor" and extra == Links({"anon_inode:inotify": 1}):
                extra.clear()
            if extra or missing:
                found.append(f"{name}: too many {dict(extra)}, too few {dict(missing)}")
        return found


def without_files(links: Links) -> Links:
    """Return `links` without the files of this example."""
    return Links({link: n for link, n in links.items() if link != FILE})


def files_of(pid: int, folder: str) -> Counter[int]:
    """Return how often the process `pid` has each file of the log in `folder` open, by inode."""
    found = Counter[int]()
    # The process may end, and the file may be closed meanwhile.
    with suppress(FileNotFoundError):
        for fd in os.listdir(f"/proc/{pid}/fd"):
            path = f"/proc/{pid}/fd/{fd}"
            with suppress(FileNotFoundError):
                if os.readlink(path).startswith(os.path.realpath(folder) + "/file"):
                    found[os.stat(path).st_ino] += 1
    return found
