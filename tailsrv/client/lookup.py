"""Looks up the addresses of a name without holding up who waits for them."""

import socket
import threading
from typing import Any

# what connect(2) takes depends on the family
Found = tuple[socket.AddressFamily, Any]


class Lookup:
    """The look-up of one name, which is begun here and takes as long as it takes.

    getaddrinfo(3) has no time limit, and cannot be interrupted: it waits for silent name servers for half a minute, and for other
    sources of names, a directory server for instance, perhaps for ever. So a thread of its own calls it. Nothing waits for the end of
    that thread, not even the end of the process. An address that is written as numbers needs no thread.
    """

    def __init__(self, host: str, port: int) -> None:
        self._found: list[Found] = []
        self._error: Exception | None = None
        # is readable when the thread is done
        self._end: socket.socket | None = None
        try:
            self._found = _addresses(host, port, socket.AI_NUMERICHOST)
        except OSError:
            self._begin(host, port)
        except UnicodeError as error:
            # a label too long for a name
            self._error = error

    def fileno(self) -> int | None:
        """Return a descriptor that is readable as soon as there is a result, None if there is one."""
        return None if self._end is None else self._end.fileno()

    def result(self) -> list[Found]:
        """Return the addresses, when they are there. Raises what getaddrinfo has raised: OSError, UnicodeError."""
        self.close()
        if self._error is not None:
            raise self._error
        return self._found

    def close(self) -> None:
        """Wait for the result no more; the thread goes on until it has one."""
        if self._end is not None:
            self._end.close()
        self._end = None

    def _begin(self, host: str, port: int) -> None:
        try:
            self._end, theirs = socket.socketpair()
        except OSError as error:
            self._error = error
            return
        try:
            threading.Thread(target=self._ask, args=(host, port, theirs), daemon=True).start()
        except RuntimeError:
            # no room for another thread: everything waits
            self._ask(host, port, theirs)

    def _ask(self, host: str, port: int, theirs: socket.socket) -> None:
        # ours to close: the number of a descriptor that the other side closed may be somebody else's by now
        with theirs:
            try:
                self._found = _addresses(host, port)
            except Exception as error:
                self._error = error
            # closing it is not enough if the process has forked meanwhile
            theirs.shutdown(socket.SHUT_RDWR)


def _addresses(host: str, port: int, flags: int = 0) -> list[Found]:
    """Return the addresses of `host`, in the order in which to try them (RFC 6724). Raises OSError, UnicodeError."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return [(family, address) for family, _, _, _, address in found]
