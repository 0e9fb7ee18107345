"""Resolves the path of a file in a folder that has been removed."""

import os
import tempfile

from tailsrv.linux.inotify import steps_to

with tempfile.TemporaryDirectory() as folder:
    os.chdir(folder)
    assert list(steps_to("log"))[-1] == os.path.join(os.path.realpath(folder), "log")
assert list(steps_to("log")) == []
