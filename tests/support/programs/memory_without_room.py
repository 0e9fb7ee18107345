"""Makes an anonymous file that exceeds the limit for the size of files."""

import errno
import os
import resource

from tailsrv.linux.files import memory_file_with

with open(memory_file_with(b"data"), "rb") as file:
    assert file.read() == b"data"
before = os.listdir("/proc/self/fd")
unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (10, unlimited[1]))
try:
    memory_file_with(b"x" * 11)
except OSError as error:
    print(errno.errorcode[error.errno or 0])
resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
assert os.listdir("/proc/self/fd") == before
