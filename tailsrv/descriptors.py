"""Sees to this process's own descriptors: how many it may have, and that the standard ones are taken."""

import os
import resource


def occupy_standard() -> None:
    """See to it that 0, 1 and 2 are open: what is written there must not go to a socket or into a file that got such a number."""
    while (fd := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(fd)


def raise_limit() -> int:
    """Raise the soft limit of open descriptors to the hard one and return what it is now."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # pragma: no cover: a sandbox may forbid it; the soft limit then is what we have
            return soft
    return hard


def close_file(fd: int) -> None:
    """Close the descriptor of a file, and pass over what its file system says to that.

    A network or FUSE file system may answer with any error (close(2): EIO, ENOTCONN, ...). Of a file that was only read
    that means nothing, and on Linux the descriptor is free whatever the answer is.
    """
    try:
        os.close(fd)
    except OSError:
        pass
