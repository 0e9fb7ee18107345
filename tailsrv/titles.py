"""The texts of the process titles (shown by ps) and of the status line in `systemctl status`."""

from collections.abc import Sequence

from tailsrv.config import MAX_CLIENTS, MAX_WORKERS
from tailsrv.formatting import counted


def supervisor_title(
    endpoints: Sequence[str], path: str, state: str, workers: int, clients: int
) -> str:
    """Return the supervisor's title.

    `state` is empty, `starting`, `waiting for file` or `draining`.
    """
    # A title must be one line of decodable text.
    name = path if path.isprintable() else ascii(path)
    status = service_status(state, workers, clients)
    return f"tailsrv: supervisor {','.join(endpoints)} {name} [{status}]"


def status_title(endpoints: Sequence[str]) -> str:
    """Return the title of a child process that answers requests at a control socket."""
    return f"tailsrv: status {','.join(endpoints)}"


def service_status(state: str, workers: int, clients: int) -> str:
    """Return the text for `systemctl status`, which the title also shows in brackets."""
    status = [state] if state else []
    if state not in ("starting", "waiting for file"):
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
    return len(supervisor_title(endpoints, path, "draining", MAX_WORKERS, MAX_CLIENTS).encode())
