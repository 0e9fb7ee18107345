"""The file that is served, as the supervisor holds it: awaited, open, or gone from its path."""

from tailsrv.descriptors import close_file
from tailsrv.hints import absolute
from tailsrv.identity import Identity
from tailsrv.log import fields, logger
from tailsrv.watch import LeasedError, size_of, try_to_open


class Source:
    """One path, and the open file that all workers share: `file` is its descriptor, None while it is awaited."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.file: int | None = None
        self.gone = False  # the path does not name it any more
        self.polling: str | None = None  # why the workers look at it by the clock
        self.trouble = ""  # why the next one of this name cannot be opened
        self._identity: Identity | None = None
        self._leased = False  # and the log says so

    def open(self) -> bool:
        """Open the file if there is one, and tell whether it is open. Raises CannotServeError."""
        try:
            self.file = try_to_open(self.path)
        except LeasedError:
            self._note_lease()
        return self.file is not None

    def _note_lease(self) -> None:
        if not self._leased:
            self._leased = True
            logger.warning(
                "another program has a lease on the file, clients wait until it is given up: %s",
                fields(path=self.path, hint="Samba: kernel oplocks = no; see /proc/locks"),
            )

    def has_gone(self, now: float) -> bool | None:
        """Tell whether the path names something else by now, or nothing; None if that cannot be seen yet."""
        assert self.file is not None
        if self._identity is None:
            self._identity = Identity(self.file, self.path)
        return self._identity.is_gone(now)

    def let_go(self) -> None:
        """Close the file, for the next one of its name."""
        assert self.file is not None
        close_file(self.file)
        self.file, self.gone, self.polling, self._identity = None, False, None, None
        self._leased = False

    def size(self) -> int | None:
        """Return the file's size in bytes, None if there is none."""
        return size_of(self.file) if self.file is not None else None

    def describe(self) -> dict[str, object]:
        """Return what the status says of the file."""
        return {"path": absolute(self.path), "gone": self.gone, "error": self.trouble or None, "size": self.size()}
