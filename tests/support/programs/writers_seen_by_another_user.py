"""Prints what a user without privileges learns about the writers of three files in argv[1].

It owns the files `own` and `written`, of which the second has a writer. The file `other` is not its
own.
"""

import os
import sys

from support.processes import NOBODY
from tailsrv.linux.files import has_writers

os.chdir(sys.argv[1])
for name in ("own", "written"):
    os.chown(name, NOBODY, NOBODY)
files = {name: os.open(name, os.O_RDONLY) for name in ("own", "written", "other")}
writer = os.open("written", os.O_WRONLY)
os.setgroups([])
os.setgid(NOBODY)
os.setuid(NOBODY)
print({name: has_writers(file) for name, file in files.items()})
