"""Prints the hint about the file argv[1] where the user database is not available."""

import errno
import grp
import pwd
import sys

for module, names in (
    (pwd, ("getpwuid", "getpwnam", "getpwall")),
    (grp, ("getgrgid", "getgrnam", "getgrall")),
):
    for name in names:
        delattr(module, name)

from tailsrv.error_hints import cannot_open, cannot_see  # noqa: E402

print(cannot_open(sys.argv[1], OSError(errno.EACCES, "")), cannot_see(sys.argv[1]))
