"""A service manager, as far as sd_notify(3) goes."""

import socket
from pathlib import Path

from support.waiting import DEADLINE

FILLER = b"STATUS=of another service"


class ServiceManager:
    """The service manager's end of sd_notify(3), whose queue can be full."""

    def __init__(self, path: Path) -> None:
        self.address = str(path)
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.sock.bind(self.address)
        self.sock.settimeout(DEADLINE)

    def stuff(self) -> None:
        """Fill the queue."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            try:
                while True:
                    sock.sendto(FILLER, self.address)
            except BlockingIOError:
                pass

    def phases(self, count: int) -> list[str]:
        """Return the first words of the next `count` messages that are no status."""
        said: list[str] = []
        while len(said) < count:
            word = self.sock.recv(4096).decode().partition("\n")[0]
            if not word.startswith("STATUS="):
                said.append(word)
        return said

    def unread(self) -> list[str]:
        """Return what is in the queue."""
        said = []
        self.sock.setblocking(False)
        try:
            while True:
                said.append(self.sock.recv(4096).decode())
        except BlockingIOError:
            return [message for message in said if message != FILLER.decode()]
        finally:
            self.sock.settimeout(DEADLINE)

    def until(self, word: str) -> list[str]:
        """Wait until `word` is said, and return all that was said since the last time, it too."""
        said: list[str] = []
        while word not in said:
            said += self.sock.recv(4096).decode().split("\n")
        return said

    def wrapper(self, *variables: str) -> tuple[str, ...]:
        """Return what starts a program that tells us, with more variables in its environment."""
        return ("env", f"NOTIFY_SOCKET={self.address}", *variables)
