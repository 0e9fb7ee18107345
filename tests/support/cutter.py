"""A proxy that cuts connections."""

import random
import socket
import threading
from types import TracebackType
from typing import Self

from support.sockets import reset_at_close
from support.waiting import DEADLINE


class Cutter:
    """A proxy to a local server that ends each of its first connections after a random byte.

    It listens on every address of the loopback network, so that a client can reconnect to it at
    once as if to another server. A cut connection delivers fewer than `longest` bytes. Some cuts
    are resets; with `resets`, all of them are.
    """

    def __init__(self, port: int, cuts: int, longest: int, resets: bool = False) -> None:
        self._port, self._random, self._longest = port, random.Random(1), longest
        self._resets = resets
        self.left = cuts
        self._listener = socket.create_server(("0.0.0.0", 0))
        self.port = int(self._listener.getsockname()[1])
        self._open: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def endpoints(self, count: int = 20) -> list[str]:
        """Return `count` addresses of the proxy."""
        return [f"127.0.0.{number + 1}:{self.port}" for number in range(count)]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for sock in (self._listener, *self._open):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                # The connection has ended by itself.
                pass
        for thread in self._threads:
            thread.join(DEADLINE)
        for sock in (self._listener, *self._open):
            sock.close()

    def _accept(self) -> None:
        while True:
            try:
                near, _ = self._listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._port))
            except OSError:
                near.close()
                continue
            self._open += [near, far]
            limit = self._random.randrange(self._longest) if self.left > 0 else None
            self.left -= 1
            thread = threading.Thread(
                target=self._forward,
                args=(near, far, limit, self._resets or self._random.random() < 0.5),
            )
            self._threads.append(thread)
            thread.start()

    def _forward(
        self, near: socket.socket, far: socket.socket, limit: int | None, reset: bool
    ) -> None:
        try:
            far.sendall(near.recv(100))
            passed = 0
            while (limit is None or passed < limit) and (
                some := far.recv(1 << 16 if limit is None else min(1 << 16, limit - passed))
            ):
                near.sendall(some)
                passed += len(some)
        except OSError:
            # One of the two connections has ended.
            pass
        if reset and limit is not None:
            reset_at_close(near)
        far.close()
        near.close()
