"""Looks up the addresses of a host name in a thread, so that a slow name service blocks nothing."""

import socket
import threading
from typing import Any

# A family, and an address in the form that connect(2) expects for that family.
Found = tuple[socket.AddressFamily, Any]


class Lookup:
    """The look-up of one host name. It starts when the object is created.

    getaddrinfo(3) has no time limit and cannot be interrupted. It waits half a minute for name
    servers that do not answer, and possibly forever for other sources of names, such as a directory
    server. So a separate thread calls it. Nothing waits for that thread to end: it is a daemon
    thread, and the process can exit before it. A numeric address needs no thread.
    """

    def __init__(self, host: str, port: int) -> None:
        self._found: list[Found] = []
        self._error: Exception | None = None
        # Becomes readable when the thread has finished. None if there is nothing to wait for.
        self._done: socket.socket | None = None
        try:
            self._found = _addresses(host, port, socket.AI_NUMERICHOST)
        except OSError:
            self._start_thread(host, port)
        except UnicodeError as error:
            # A part of the name is longer than the name service allows.
            self._error = error

    def fileno(self) -> int | None:
        """Return a descriptor that becomes readable when `result` may be called; None: at once."""
        return None if self._done is None else self._done.fileno()

    def result(self) -> list[Found]:
        """Return the addresses. Call it only when the look-up has finished.

        Raises what getaddrinfo has raised: OSError or UnicodeError.
        """
        self.close()
        if self._error is not None:
            raise self._error
        return self._found

    def close(self) -> None:
        """Stop waiting for the result. The thread keeps running until it has one."""
        if self._done is not None:
            self._done.close()
        self._done = None

    def _start_thread(self, host: str, port: int) -> None:
        try:
            self._done, thread_end = socket.socketpair()
        except OSError as error:
            self._error = error
            return
        try:
            threading.Thread(
                target=self._look_up, args=(host, port, thread_end), daemon=True
            ).start()
        except RuntimeError:
            # The system cannot start another thread. Look up the name here, and block the caller.
            self._look_up(host, port, thread_end)

    def _look_up(self, host: str, port: int, thread_end: socket.socket) -> None:
        # This thread closes its own end. If the caller's side closed it, the descriptor's number
        # could already belong to another file when the thread uses it.
        with thread_end:
            try:
                self._found = _addresses(host, port)
            except Exception as error:
                self._error = error
            # Closing alone does not make the other end readable if a forked process holds a
            # duplicate.
            thread_end.shutdown(socket.SHUT_RDWR)


def _addresses(host: str, port: int, flags: int = 0) -> list[Found]:
    """Return the addresses of `host`, in the order in which to try them (RFC 6724).

    Raises OSError or UnicodeError.
    """
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
    return [(family, address) for family, _, _, _, address in found]
