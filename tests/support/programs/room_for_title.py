"""Makes room for a long title, by way of the program argv[1]; prints the environment that others get, and how long a title can be."""

import os
import sys

from setproctitle import getproctitle, setproctitle

# it looks for the room that there is, before the environment is changed
getproctitle()

from tailsrv.linux.process_title import make_room  # noqa: E402

make_room(100_000, sys.argv[1], sys.orig_argv)
os.system("env")
setproctitle("y" * 100_000)
print(len(getproctitle()))
