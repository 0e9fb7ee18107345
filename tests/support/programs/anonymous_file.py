"""Prints the contents of an anonymous file, and the name that the kernel shows for it."""

import os

from tailsrv.linux.libc_fallbacks import memory_file

fd = memory_file("name")
os.write(fd, b"data")
print(
    os.pread(fd, 10, 0),
    os.get_inheritable(fd),
    os.fstat(fd).st_nlink,
    os.readlink(f"/proc/self/fd/{fd}").startswith("/memfd:name"),
)
