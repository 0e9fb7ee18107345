"""What the processes show in their titles, and to the service manager."""

from collections.abc import Sequence

from tailsrv.config import MAX_CLIENTS, MAX_WORKERS
from tailsrv.formatting import counted


def supervisor_title(
    endpoints: Sequence[str], path: str, state: str, workers: int, clients: int
) -> str:
    """Return the supervisor's title; `state` is empty, `starting`, `waiting for file`, `rotating` or `draining`."""
    # a title is one line of decodable text
    name = path if path.isprintable() else ascii(path)
    return f"tailsrv: supervisor {','.join(endpoints)} {name} [{service_status(state, workers, clients)}]"


def status_title(endpoints: Sequence[str]) -> str:
    """Return the title of a child that tells somebody about the clients."""
    return f"tailsrv: status {','.join(endpoints)}"


def service_status(state: str, workers: int, clients: int) -> str:
    """Return the status as `systemctl status` shows it: what is in the brackets of the title."""
    status = [state] if state else []
    if state not in ("starting", "waiting for file"):
        status += [counted(workers, "worker"), counted(clients, "client")]
    return ", ".join(status)


def worker_title(slot: int, endpoints: Sequence[str], state: str, clients: int) -> str:
    """Return the title of a slot's worker; `state` is empty, `starting` or `draining`."""
    status = [state] if state else []
    if state != "starting":
        status.append(counted(clients, "client"))
    return f"tailsrv: worker {slot} {','.join(endpoints)} [{', '.join(status)}]"


def longest_title(endpoints: Sequence[str], path: str) -> int:
    """Return how many bytes the supervisor's title takes at most; a worker's is shorter."""
    return len(supervisor_title(endpoints, path, "draining", MAX_WORKERS, MAX_CLIENTS).encode())
