"""Keeps a local file equal to one that tailsrv serves: the command `tssync`."""

import fcntl
import os
import sys
import time
from argparse import Namespace
from collections.abc import Sequence

from tailsrv.client import OtherFileError, PlaceError, follow
from tailsrv.client_arguments import ExitStatus, make_tssync_parser
from tailsrv.dial import wait
from tailsrv.mirror import ROOM_PAUSE, Mirror, MirrorError

PIPE = 1 << 20  # bytes; what an ordinary user may have


def main(argv: Sequence[str] | None = None) -> int:
    """Run `tssync` with `argv` (sys.argv if None); return the exit status."""
    try:
        options = make_tssync_parser().parse_intermixed_args(argv)
        with Mirror(options.path) as mirror:
            Sync(mirror, options).run()
    except KeyboardInterrupt:
        return ExitStatus.DONE
    except ValueError as error:
        complain(str(error))
        return ExitStatus.USAGE
    except OtherFileError as error:
        complain(f"{options.path} is no beginning of the remote file: {error}")
        return ExitStatus.OTHER_FILE
    except (OSError, MirrorError, PlaceError) as error:
        complain(str(error))
        return ExitStatus.FAILED
    return ExitStatus.DONE


def complain(text: str) -> None:
    """Say a line on standard error, if there is one."""
    print(f"tssync: {text}", file=sys.stderr)


class Sync:
    """One run: socket to pipe to file."""

    def __init__(self, mirror: Mirror, options: Namespace) -> None:
        self.mirror, self.options = mirror, options
        self.dirty = False
        self.synced = time.monotonic()
        self.full = False

    def run(self) -> None:
        """Append until it is to end."""
        while True:
            try:
                return self.copy()
            except OtherFileError:
                if self.options.on_mismatch != "restart":
                    raise
                complain(f"the remote file is another one: {self.mirror.path} is {self.mirror.set_aside()} now, beginning again")

    def copy(self) -> None:
        out, into = os.pipe()
        try:
            fcntl.fcntl(into, fcntl.F_SETPIPE_SZ, PIPE)
        except OSError:
            pass
        with (
            open(out, closefd=True),
            open(into, closefd=True),
            follow(
                self.options.servers,
                self.mirror.length,
                once=self.options.once,
                idle=self.options.until_idle,
                recall=self.mirror.recall,
                report=complain,
                wait=self.wait,
            ) as stream,
        ):
            while count := stream.splice(into, PIPE):
                self.mirror.append(out, count, self.wait_for_room)
                self.full = False
                self.dirty = True

    def wait(self, fd: int, events: int, seconds: float | None) -> bool:
        return wait(fd, events, seconds)

    def wait_for_room(self) -> None:
        if not self.full:
            complain("no room")
        self.full = True
        self.wait(-1, 0, ROOM_PAUSE)


if __name__ == "__main__":
    sys.exit(main())
