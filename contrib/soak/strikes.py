"""The faults of a run, one per second: killed workers, upgrades, stalled clients and others."""

import random
import signal
from collections.abc import Callable, Sequence
from functools import partial

import clients
from served import Server, until
from tally import Tally
from traffic import Traffic

# The shortest and longest time for which a worker is stopped, in seconds.
STOPPED = (0.1, 0.9)
# The longest time without a supervisor, in seconds.
UNSUPERVISED = 1.0
# Seconds between attempts to kill the supervisor, if a slot is without a worker.
RETRY = 0.05
# The shortest and longest time for which clients do not read, in seconds.
STALLED = (0.5, 5.0)
# Number of connections that are made at once.
BURST = 200
# Bytes of junk that each of the flooding clients sends, and the number of these clients.
FLOOD = 256 << 10
FLOODERS = 8


class Faults:
    """Causes one fault after the other, each equally often, in a random order."""

    def __init__(
        self,
        names: Sequence[str],
        server: Server,
        traffic: Traffic,
        tally: Tally,
        dice: random.Random,
    ) -> None:
        self._server, self._traffic, self._tally, self._dice = server, traffic, tally, dice
        self._names = names
        # Whether the supervisor was killed, and another one is still to be started.
        self._down = False
        self._coming: list[str] = []

    @property
    def known(self) -> dict[str, Callable[[], None]]:
        """All faults by name."""
        return {
            "kill": self.kill,
            "stop": self.stop,
            "supervisor": self.supervisor,
            "upgrade": self.upgrade,
            "reset": self.reset,
            "burst": self.burst,
            "stall": self.stall,
            "flood": self.flood,
            "nonsense": self.nonsense,
        }

    def strike(self) -> None:
        """Cause the next fault, and schedule another one in a second."""
        if not self._traffic.busy:
            return
        self._traffic.later(1.0, self.strike)
        if not self._coming:
            self._coming = self._dice.sample(self._names, len(self._names))
        name = self._coming.pop()
        self._tally.faults[name] += 1
        self.known[name]()

    def calm(self) -> None:
        """Continue workers that are still stopped, and wait for the end of a takeover."""
        if self._down:
            self.restart()
        until(lambda: self._server.supervised, "the supervisor has taken over")
        for pid in self._server.workers():
            self._server.signal(signal.SIGCONT, pid)

    def kill(self) -> None:
        """Kill a worker."""
        if workers := self._server.workers():
            self._tally.note_kill()
            self._server.signal(signal.SIGKILL, self._dice.choice(workers))

    def stop(self) -> None:
        """Stop a worker for a moment."""
        if workers := self._server.workers():
            pid = self._dice.choice(workers)
            self._server.signal(signal.SIGSTOP, pid)
            self._traffic.later(
                self._dice.uniform(*STOPPED), partial(self._server.signal, signal.SIGCONT, pid)
            )

    def supervisor(self) -> None:
        """Kill the supervisor, and start another one at once or a little later.

        The supervisor alone has the clients of a worker that has died. So all slots must have one.
        """
        if not self._traffic.busy or not self._server.supervised:
            return
        if not self._server.is_whole():
            self._traffic.later(RETRY, self.supervisor)
            return
        self._server.kill_supervisor()
        self._down = True
        pause = self._dice.choice([0.0, self._dice.uniform(0, UNSUPERVISED)])
        self._traffic.later(pause, self.restart)

    def restart(self) -> None:
        """Start another supervisor, if the last one was killed."""
        if self._down:
            self._down = False
            self._server.restart()

    def upgrade(self) -> None:
        """Send SIGHUP: the supervisor executes the installed program and replaces all workers."""
        if self._server.supervised:
            self._server.signal(signal.SIGHUP)

    def reset(self) -> None:
        """Reset the connections of half of the clients at once; new clients replace them."""
        readers = list(self._traffic.readers)
        for reader in self._dice.sample(readers, len(readers) // 2):
            self._traffic.disconnect(reader, reset=True)

    def burst(self) -> None:
        """Make many connections at once: some send an invalid header, the others nothing."""
        for _ in range(BURST):
            self._traffic.connect_invalid(
                b"" if self._dice.random() < 0.5 else clients.invalid_header(self._dice)
            )

    def stall(self) -> None:
        """Stop reading at half of the clients for a while."""
        readers = list(self._traffic.readers)
        for reader in self._dice.sample(readers, len(readers) // 2):
            self._traffic.hold(reader, self._dice.uniform(*STALLED))

    def flood(self) -> None:
        """Let some clients send as much junk as their sockets accept."""
        readers = [
            reader
            for reader in self._traffic.readers
            if reader.started and not reader.kind.half_close
        ]
        for reader in self._dice.sample(readers, min(FLOODERS, len(readers))):
            self._traffic.send(reader, bytes(FLOOD))

    def nonsense(self) -> None:
        """Make many connections that send an invalid header."""
        for _ in range(BURST):
            self._traffic.connect_invalid(clients.invalid_header(self._dice))


# The names of all faults.
FAULTS = ("kill", "stop", "supervisor", "upgrade", "reset", "burst", "stall", "flood", "nonsense")
