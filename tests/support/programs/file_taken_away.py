"""Opens the local copy argv[1], which is deleted each time just before it is locked.

Prints the error and the number of open descriptors.
"""

import os
import sys

from tailsrv.client.command_runner import RunError
from tailsrv.client.local_copy import LocalCopy


def take_away(event: str, _: object) -> None:
    if event == "fcntl.flock":
        os.unlink(sys.argv[1])


sys.addaudithook(take_away)
try:
    LocalCopy(sys.argv[1])
except RunError as error:
    print(error, len(os.listdir("/proc/self/fd")))
