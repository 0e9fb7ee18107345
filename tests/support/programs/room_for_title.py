"""Makes room for a long title by executing the program argv[1] again.

Prints the environment that children get, and the maximum length of a title.
"""

import os
import sys

from setproctitle import getproctitle, setproctitle

# setproctitle determines its room at the first call, before the environment is changed.
getproctitle()

from tailsrv.linux.process_title import make_room  # noqa: E402

make_room(100_000, sys.argv[1], sys.orig_argv)
os.system("env")
setproctitle("y" * 100_000)
print(len(getproctitle()))
