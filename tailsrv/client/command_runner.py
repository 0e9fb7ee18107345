"""What the commands `tscat` and `tssync` share: exit statuses, and messages on standard error."""

import os
import sys
from collections.abc import Callable

from tailsrv.arguments import ClientExitStatus
from tailsrv.client import EndpointError, GoneError, OffsetError, OtherFileError, PlaceError


class RunError(Exception):
    """The command cannot continue. The message says why, in one line."""


def run(command: str, work: Callable[[], object]) -> ClientExitStatus:
    """Do the work of a command and return its exit status.

    An error that ends the command is printed as one line on standard error. SystemExit, which
    argparse raises after it has printed help or a usage error, is raised again.
    """
    try:
        work()
    except SystemExit:
        ignore_closed_stdout()
        raise
    except KeyboardInterrupt:
        return ClientExitStatus.DONE
    except (EndpointError, OffsetError) as error:
        print_message(command, str(error))
        return ClientExitStatus.USAGE
    except (OtherFileError, GoneError) as error:
        print_message(command, str(error))
        return ClientExitStatus.OTHER_FILE
    except (RunError, PlaceError) as error:
        print_message(command, str(error))
        return ClientExitStatus.FAILED
    except OSError as error:
        print_message(
            command,
            f"{error.filename}: {error.strerror}"
            if error.filename
            else error.strerror or str(error),
        )
        return ClientExitStatus.FAILED
    return ClientExitStatus.DONE


def print_message(command: str, text: str) -> None:
    """Print a line on standard error. Do nothing if standard error is closed or has no reader."""
    try:
        if sys.stderr:
            print(f"{command}: {text}", file=sys.stderr, flush=True)
    except OSError:
        pass


def ignore_closed_stdout() -> None:
    """Flush standard output. If its reader has closed the pipe, discard what is left of the text.

    Otherwise the interpreter would flush it again at exit, and print an error message about the
    closed pipe.
    """
    try:
        if sys.stdout:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
