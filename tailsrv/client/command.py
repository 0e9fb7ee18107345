"""What `tscat` and `tssync` share: how a run ends, and what it says on standard error."""

import os
import sys
from collections.abc import Callable

from tailsrv.arguments import ClientExitStatus
from tailsrv.client import EndpointError, OffsetError, OtherFileError, PlaceError


class RunError(Exception):
    """The command cannot go on; the message says why, in one line."""


def run(command: str, work: Callable[[], object]) -> ClientExitStatus:
    """Do the work of a command and return its exit status; what it ends with is one line at most."""
    try:
        work()
    except SystemExit:
        # argparse has said what there was to say
        ignore_closed_output()
        raise
    except KeyboardInterrupt:
        return ClientExitStatus.DONE
    except (EndpointError, OffsetError) as error:
        complain(command, str(error))
        return ClientExitStatus.USAGE
    except OtherFileError as error:
        complain(command, str(error))
        return ClientExitStatus.OTHER_FILE
    except (RunError, PlaceError) as error:
        complain(command, str(error))
        return ClientExitStatus.FAILED
    except OSError as error:
        complain(
            command,
            f"{error.filename}: {error.strerror}"
            if error.filename
            else error.strerror or str(error),
        )
        return ClientExitStatus.FAILED
    return ClientExitStatus.DONE


def complain(command: str, text: str) -> None:
    """Say a line on standard error, if anybody listens."""
    try:
        if sys.stderr:
            print(f"{command}: {text}", file=sys.stderr, flush=True)
    except OSError:
        pass


def ignore_closed_output() -> None:
    """Let a help that nobody reads to its end go nowhere, rather than have the interpreter complain."""
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
