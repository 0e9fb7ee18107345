"""The texts of the process titles (shown by ps) and of the status line in `systemctl status`."""

from collections.abc import Sequence

from tailsrv.config import MAX_CLIENTS, MAX_WORKERS
from tailsrv.formatting import counted
from tailsrv.status_schema import ServerState


def supervisor_title(
    endpoints: Sequence[str], path: str, state: ServerState, workers: int, clients: int
) -> str:
    """Return the supervisor's title."""
    # A title must be one line of decodable text.
    name = path if path.isprintable() else ascii(path)
    status = service_status(state, workers, clients)
    return f"tailsrv: supervisor {','.join(endpoints)} {name} [{status}]"


def service_status(state: ServerState, workers: int, clients: int) -> str:
    """Return the text for `systemctl status`, which the title also shows in brackets."""
    status = [] if state is ServerState.SERVING else [str(state)]
    if state not in (ServerState.STARTING, ServerState.WAITING):
        status += [counted(workers, "worker"), counted(clients, "client")]
    return ", ".join(status)


def worker_title(slot: int, endpoints: Sequence[str], state: str, clients: int) -> str:
    """Return the title of the worker in `slot`.

    `state` is empty, `starting`, `orphaned` or `draining`.
    """
    status = [state] if state else []
    if state != "starting":
        status.append(counted(clients, "client"))
    return f"tailsrv: worker {slot} {','.join(endpoints)} [{', '.join(status)}]"


def longest_title(endpoints: Sequence[str], path: str) -> int:
    """Return the largest length of the supervisor's title in bytes; a worker's is shorter."""
    title = supervisor_title(endpoints, path, ServerState.DRAINING, MAX_WORKERS, MAX_CLIENTS)
    return len(title.encode())
