"""Prints why the files in argv must be polled: here, in a chroot with /proc, in one without."""

import os
import subprocess
import sys

from tailsrv.linux.file_system_type import why_poll

odd, local = (os.open(path, os.O_RDONLY) for path in sys.argv[1:3])
print(why_poll(odd), why_poll(local), sep="\n")
os.makedirs("jail/proc")
os.makedirs("jail/empty")
subprocess.run(["mount", "-t", "proc", "proc", "jail/proc"], check=True)
os.chroot("jail")
print(why_poll(odd), why_poll(local), sep="\n")
os.chroot("/empty")
print(why_poll(odd), why_poll(local), sep="\n")
