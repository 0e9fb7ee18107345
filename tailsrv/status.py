"""What the server shows of itself: in its title, to the service manager, and to those who ask at its control sockets."""

import json
import os
import sys
from collections.abc import Callable, Sequence

from tailsrv import __version__, systemd
from tailsrv.config import Config
from tailsrv.control import start_ticks
from tailsrv.crew import Crew
from tailsrv.loop import Loop
from tailsrv.source import Source
from tailsrv.title import Title, service_status, supervisor_title


class Status:
    """The supervisor's knowledge, put into words. `state()` returns the server's state, empty while all is as it should be."""

    def __init__(
        self,
        config: Config,
        endpoints: Sequence[str],
        started: float,
        crew: Crew,
        source: Source,
        state: Callable[[], str],
        loop: Loop,
    ) -> None:
        self._config, self._endpoints, self._started = config, endpoints, started
        self._crew, self._source, self._state, self._loop = crew, source, state, loop
        self._title = Title(loop.timers, self._render_title)
        interval = config.timing.status_interval
        self._service_status = Title(loop.timers, self.sentence, lambda status: systemd.notify(f"STATUS={status}"), interval)

    def changed(self) -> None:
        """Note that something may have: what is shown is renewed, at a bounded pace."""
        self._title.changed(self._loop.now)
        if systemd.is_managed():
            self._service_status.changed(self._loop.now)

    def sentence(self) -> str:
        """Return the status as the service manager shows it."""
        return service_status(self._state(), len(self._crew.running()), self._crew.clients())

    def _render_title(self) -> str:
        return supervisor_title(self._endpoints, self._config.path, self._state(), len(self._crew.running()), self._crew.clients())

    def tell(self) -> bytes:
        """Return the status as JSON, and have the workers asked: whoever wants to know again soon learns who does not answer."""
        status = (json.dumps(self._describe()) + "\n").encode()
        self._crew.ask()
        return status

    def _describe(self) -> dict[str, object]:
        return {
            "version": __version__,
            "command": sys.orig_argv,
            "pid": os.getpid(),
            "ticks": start_ticks(os.getpid()),
            "state": self._state() or "serving",
            "started": self._started,
            "endpoints": list(self._endpoints),
            "file": self._source.describe(),
            "clients": self._crew.clients(),
            "unprotected": self._crew.intake.unprotected(),
            "max_clients": self._config.max_clients,
            "workers": [slot.describe(self._loop.now) for slot in self._crew.slots],
            "listeners": [listener for slot in self._crew.slots for listener in slot.describe_listeners()],
        }

    def tell_clients(self) -> bytes:
        """Return as JSON who is connected and where each stream stands; takes time, and is for a child that has it."""
        clients = [{"slot": slot.index, **client} for slot in self._crew.slots for client in slot.roster.describe()]
        return (json.dumps({"pid": os.getppid(), "size": self._source.size(), "clients": clients}) + "\n").encode()
