"""A service manager that implements the receiving end of sd_notify(3)."""

import socket
from pathlib import Path

from support.waiting import DEADLINE

FILLER = b"STATUS=of another service"


class ServiceManager:
    """The service manager's end of sd_notify(3), whose queue can be filled."""

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
        """Return the first words of the next `count` messages, status messages not counted."""
        messages: list[str] = []
        while len(messages) < count:
            word = self.sock.recv(4096).decode().partition("\n")[0]
            if not word.startswith("STATUS="):
                messages.append(word)
        return messages

    def unread(self) -> list[str]:
        """Return the messages in the queue."""
        messages = []
        self.sock.setblocking(False)
        try:
            while True:
                messages.append(self.sock.recv(4096).decode())
        except BlockingIOError:
            return [message for message in messages if message != FILLER.decode()]
        finally:
            self.sock.settimeout(DEADLINE)

    def until(self, word: str) -> list[str]:
        """Wait for the message `word`, and return it with all messages since the last call."""
        messages: list[str] = []
        while word not in messages:
            messages += self.sock.recv(4096).decode().split("\n")
        return messages

    def wrapper(self, *variables: str) -> tuple[str, ...]:
        """Return a wrapper that sets NOTIFY_SOCKET, and more `variables`, for a program."""
        return ("env", f"NOTIFY_SOCKET={self.address}", *variables)
