"""A server in the test's process, for what the real one does rarely, or does no longer."""

import socket
import threading
from contextlib import suppress
from types import TracebackType
from typing import Self

from support.waiting import DEADLINE


def offsets_line(start: int, end: int) -> bytes:
    """Return the line that a server sends before the bytes for a header with `?`."""
    return b"%019d %019d\n" % (start, end)


class FakeServer:
    """Serves `log`, whose bytes before `first` are gone, until its end; then it stays silent.

    With `old`, it closes a connection whose header begins with `?`, as tailsrv 1 does. The first
    `refused` connections are closed without a byte. `headers` are those that it has received.
    """

    def __init__(
        self, log: bytes, first: int = 0, *, old: bool = False, refused: int = 0, port: int = 0
    ) -> None:
        self.log, self.first, self.old, self.refused = log, first, old, refused
        self.headers: list[bytes] = []
        # The most bytes of the log to send on one connection.
        self.limit: int | None = None
        self._open: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", port))
        self.endpoint = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._thread = threading.Thread(target=self._serve)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join(DEADLINE)
        self.hang_up()
        self._listener.close()

    def hang_up(self) -> None:
        """Close all connections normally."""
        while self._open:
            with self._open.pop() as sock, suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _serve(self) -> None:
        # Ends with the listener, which `__exit__` shuts down.
        with suppress(OSError):
            while True:
                sock, _ = self._listener.accept()
                with suppress(OSError):
                    self._answer(sock)

    def _answer(self, sock: socket.socket) -> None:
        header = sock.recv(100)
        self.headers.append(header)
        if (answer := self._bytes_for(header)) is None:
            sock.close()
            return
        self._open.append(sock)
        sock.sendall(answer)

    def _bytes_for(self, header: bytes) -> bytes | None:
        """Return the answer to `header`; None: close the connection without a byte."""
        number = header.strip().removeprefix(b"?")
        asked = header.startswith(b"?")
        start = len(self.log) + int(number) if number.startswith(b"-") else int(number)
        if self.refused > 0:
            self.refused -= 1
            return None
        if (asked and self.old) or (not number.startswith(b"-") and 0 < start < self.first):
            return None
        start = max(start, self.first)
        line = offsets_line(start, len(self.log)) if asked else b""
        return line + self.log[start:][: self.limit]
