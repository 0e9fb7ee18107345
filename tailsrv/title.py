"""Shows what a process is and how it does, in its title, which people, `ps` and psutil read, and to the service manager."""

from collections.abc import Callable, Sequence

from setproctitle import setproctitle

from tailsrv.timers import Timers

INTERVAL = 1.0  # seconds; a title changes at most so often, and not at all while nothing does
STATUS_INTERVAL = 5.0  # seconds; the service manager wakes up for each status


def counted(number: int, noun: str) -> str:
    """Return `1 client`, `2 clients`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def supervisor_title(endpoints: Sequence[str], path: str, state: str, workers: int, clients: int) -> str:
    """Return the supervisor's title; `state` is empty, `starting`, `waiting for file`, `rotating` or `draining`."""
    name = path if path.isprintable() else ascii(path)  # a title is one line of decodable text
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


class Title:
    """A text that follows `render()` at a bounded pace, by default this process's title: `changed` may be called at any time."""

    def __init__(
        self, timers: Timers, render: Callable[[], str], show: Callable[[str], object] = setproctitle, interval: float = INTERVAL
    ) -> None:
        self._timers, self._render, self._show, self._interval = timers, render, show, interval
        self._shown = ""
        self._next = float("-inf")  # the title must not change before
        self._now = float("-inf")

    def changed(self, now: float) -> None:
        """Note at the time `now` that the title may be out of date: it is renewed at once, or when its interval is over."""
        self._now = now
        if now >= self._next:
            self._renew()
        elif self._renew not in self._timers and self._render() != self._shown:
            self._timers.set(self._renew, self._next)

    def _renew(self) -> None:
        if (title := self._render()) != self._shown:
            self._next = max(self._now, self._next) + self._interval
            self._shown = title
            self._show(title)
