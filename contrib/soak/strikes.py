"""What befalls a server in a run, once a second: each fault is a method of a few lines."""

import random
import signal
from collections.abc import Callable, Sequence
from functools import partial

import clients
from served import Server
from tally import Tally
from traffic import Traffic

# seconds
STOPPED = (0.1, 0.9)
# seconds
STALLED = (0.5, 5.0)
# connections at a time
BURST = 200
# bytes of junk from each of those who flood
FLOOD = 256 << 10
FLOODERS = 8


class Faults:
    """Brings about one fault after the other, each as often as the others, in an order that the dice choose."""

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
        self._coming: list[str] = []

    @property
    def known(self) -> dict[str, Callable[[], None]]:
        """Return every fault by its name."""
        return {
            "kill": self.kill,
            "stop": self.stop,
            "upgrade": self.upgrade,
            "reset": self.reset,
            "burst": self.burst,
            "stall": self.stall,
            "flood": self.flood,
            "nonsense": self.nonsense,
            "rotate": self.rotate,
        }

    def strike(self) -> None:
        """Bring about the next fault, and the one after it in a second."""
        if not self._traffic.busy:
            return
        self._traffic.later(1.0, self.strike)
        if not self._coming:
            self._coming = self._dice.sample(self._names, len(self._names))
        name = self._coming.pop()
        self._tally.faults[name] += 1
        self.known[name]()

    def calm(self) -> None:
        """End what lasts."""
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

    def upgrade(self) -> None:
        """Have the supervisor exec the installed program, and replace all workers."""
        self._server.signal(signal.SIGHUP)

    def reset(self) -> None:
        """Reset the connections of half of the clients at once; others come in their place."""
        readers = list(self._traffic.readers)
        for reader in self._dice.sample(readers, len(readers) // 2):
            self._traffic.part(reader, reset=True)

    def burst(self) -> None:
        """Have many connect at once, of whom some say nothing and leave."""
        for _ in range(BURST):
            self._traffic.meet(b"" if self._dice.random() < 0.5 else clients.nonsense(self._dice))

    def stall(self) -> None:
        """Have half of the clients read nothing for a while."""
        readers = list(self._traffic.readers)
        for reader in self._dice.sample(readers, len(readers) // 2):
            self._traffic.hold(reader, self._dice.uniform(*STALLED))

    def flood(self) -> None:
        """Have some clients send junk, as much as their sockets take."""
        readers = [
            reader
            for reader in self._traffic.readers
            if reader.started and not reader.kind.half_close
        ]
        for reader in self._dice.sample(readers, min(FLOODERS, len(readers))):
            self._traffic.send(reader, bytes(FLOOD))

    def nonsense(self) -> None:
        """Have many send what is no header."""
        for _ in range(BURST):
            self._traffic.meet(clients.nonsense(self._dice))

    def rotate(self) -> None:
        """Move the file away, and make the next one of its name."""
        self._traffic.file.rotate()


# all but a rotation, for which the server must be set
FAULTS = ("kill", "stop", "upgrade", "reset", "burst", "stall", "flood", "nonsense")
