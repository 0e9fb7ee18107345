"""What the control sockets of a running server say."""

import json
import socket
import struct
from typing import Any

from support.server import Server
from support.sockets import recv_all
from support.waiting import DEADLINE, eventually
from tailsrv.control_socket import CLIENTS


def ask(endpoint: str) -> tuple[bytes, int]:
    """Return what the control socket of `endpoint` says, and the pid of who holds it."""
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(DEADLINE)
        sock.connect(f"\0tailsrv:{endpoint}")
        pid, _, _ = struct.unpack("iII", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        return recv_all(sock), pid


def status(server: Server) -> dict[str, Any]:
    """Return what the control socket says, but for what changes by asking."""
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
    """Wait until the supervisor knows of `count` clients."""
    eventually(lambda: status(server)["clients"] == count)


def await_protected(server: Server, count: int) -> None:
    """Wait until the supervisor holds `count` clients, without its asking any worker anything."""
    eventually(lambda: len(json.loads(ask(f"*:{server.port}{CLIENTS}")[0])["clients"]) == count)


def worker_pids(server: Server) -> list[int]:
    """Return the pids of the workers that are there, by slot, as the supervisor sees it."""
    return [worker["pid"] for worker in status(server)["workers"] if worker["pid"] is not None]


def ready_workers(server: Server, besides: list[int] | None = None) -> list[int]:
    """Return the pids of the workers once every slot has one that is ready, and none is among `besides`."""

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
