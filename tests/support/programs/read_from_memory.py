"""Prints the bytes of the file argv[1] that are in the page cache, or the error."""

import sys

from tailsrv.linux.libc_fallbacks import preadv_nowait

with open(sys.argv[1], "rb") as file:
    buffer = bytearray(2)
    try:
        print(
            preadv_nowait(file.fileno(), buffer, 1),
            bytes(buffer),
            preadv_nowait(file.fileno(), buffer, 4),
        )
    except OSError as error:
        print(error.errno)
