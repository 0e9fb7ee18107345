"""Supervisors that die, and others that take over from their workers."""

from collections.abc import Sequence
from pathlib import Path

from support.processes import session, title
from support.server import TAILSRV, Serve, Server
from support.waiting import eventually

ORPHANED = "supervisor is gone, clients are served until another one takes over: "
TOOK_OVER = " took over: "


def orphan(server: Server) -> list[int]:
    """Kill the supervisor, wait until its workers have noticed, and return their pids."""
    workers = workers_of(server)
    server.kill_supervisor()
    await_lines(server, ORPHANED, count=len(workers))
    return workers


def await_lines(server: Server, *parts: str, count: int = 1) -> None:
    """Wait for `count` lines that contain all of `parts`, also if the supervisor has ended."""
    eventually(lambda: len(server.lines(*parts)) >= count)


def workers_of(server: Server) -> list[int]:
    """Return the pids of the workers that `server` has started, by slot, also of orphans."""
    found = {pid: title(pid) for pid in session(server.pid)}
    workers = [pid for pid, text in found.items() if text.startswith("tailsrv: worker ")]
    return sorted(workers, key=lambda pid: int(found[pid].split()[2]))


def start_successor(
    serve: Serve,
    server: Server,
    path: Path,
    *options: str,
    status: int = 0,
    wrapper: Sequence[str] = (),
    program: Sequence[str] = TAILSRV,
) -> Server:
    """Start another server for the endpoint of `server`, and make its clients this server's."""
    successor = serve(
        path, "-p", str(server.port), *options, status=status, wrapper=wrapper, program=program
    )
    successor.take_clients(server)
    return successor


def take_over(serve: Serve, server: Server, path: Path, *options: str) -> Server:
    """Start another server for the endpoint of `server`, and wait until it has taken over."""
    successor = start_successor(serve, server, path, *options)
    successor.logged(TOOK_OVER)
    eventually(lambda: not session(server.pid))
    return successor
