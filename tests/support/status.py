"""What the control sockets of a running server answer."""

import json
import socket
import struct
from typing import Any

from support.server import Server
from support.sockets import recv_all
from support.waiting import DEADLINE, eventually
from tailsrv.control_socket import CLIENTS


def ask(endpoint: str) -> tuple[bytes, int]:
    """Return the answer of the control socket of `endpoint`, and the pid of its process."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(DEADLINE)
        sock.connect(f"\0tailsrv:{endpoint}")
        pid, _, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return recv_all(sock), pid


def status(server: Server) -> dict[str, Any]:
    """Return the status, without the fields that asking for it changes."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(DEADLINE)
        sock.connect(f"\0tailsrv:*:{server.port}")
        received = b""
        while some := sock.recv(1 << 16):
            received += some
    found: dict[str, Any] = json.loads(received)
    for worker in found["workers"]:
        del worker["silent"]
    return found


def await_clients(server: Server, count: int) -> None:
    """Wait until the supervisor counts `count` clients."""
    eventually(lambda: status(server)["clients"] == count)


def await_protected(server: Server, count: int) -> None:
    """Wait until the supervisor holds `count` clients; this does not ping the workers."""
    eventually(lambda: len(json.loads(ask(f"*:{server.port}{CLIENTS}")[0])["clients"]) == count)


def worker_pids(server: Server) -> list[int]:
    """Return the pids of the workers that exist, by slot, as the supervisor knows them."""
    return [worker["pid"] for worker in status(server)["workers"] if worker["pid"] is not None]


def ready_workers(server: Server, besides: list[int] | None = None) -> list[int]:
    """Return the pids of the workers once each slot has a ready one that is not in `besides`."""

    def look() -> list[int]:
        found = status(server)["workers"]
        pids = [worker["pid"] for worker in found]
        return (
            pids
            if all(worker["ready"] and worker["pid"] for worker in found)
            and not set(pids) & set(besides or [])
            else []
        )

    return eventually(look)
