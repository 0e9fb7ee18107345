"""Starts a program with listening sockets, as a service manager does.

Usage: `activate.py KIND[,KIND...] COMMAND [ARGUMENT...]`. Kinds:

- `tcp4` and `tcp6` (which also accepts IPv4) listen on a free port.
- `again` joins the port of the first socket with SO_REUSEPORT.
- `mptcp` listens for MPTCP.
- `bound` is a TCP socket that does not listen.
- `udp`, `unix` and `file` are a UDP socket, a Unix socket and a file.
- `none` is a closed descriptor.
"""

import fcntl
import os
import socket
import sys

FIRST = 3


def listening(family: socket.AddressFamily, host: str, port: int = 0) -> socket.socket:
    """Return a listening socket whose port other sockets may join."""
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind((host, port))
    sock.listen(4096)
    return sock


def make(kind: str, made: list[socket.socket]) -> socket.socket:
    """Return a socket of the kind `kind`."""
    match kind:
        case "tcp4":
            return listening(socket.AF_INET, "127.0.0.1")
        case "tcp6":
            return listening(socket.AF_INET6, "::")
        case "mptcp":
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_MPTCP)
            sock.bind(("127.0.0.1", 0))
            sock.listen()
            return sock
        case "again":
            return listening(made[0].family, *made[0].getsockname()[:2])
        case "bound":
            sock = socket.socket()
            sock.bind(("127.0.0.1", 0))
            return sock
        case "udp":
            return socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        case "unix":
            sock = socket.socket(socket.AF_UNIX)
            sock.bind("")
            sock.listen()
            return sock
    raise SystemExit(f"no such kind: {kind}")


def main() -> None:
    """Pass the sockets on from descriptor 3, and become the program."""
    kinds, command = sys.argv[1].split(","), sys.argv[2:]
    made: list[socket.socket] = []
    descriptors: list[int | None] = []
    for kind in kinds:
        if kind == "file":
            descriptors.append(os.memfd_create("a file"))
        elif kind == "none":
            descriptors.append(None)
        else:
            made.append(make(kind, made))
            descriptors.append(made[-1].fileno())
    # Above the numbers that the sockets get, so that dup2(2) overwrites none of them.
    above = [
        None if fd is None else fcntl.fcntl(fd, fcntl.F_DUPFD, FIRST + len(kinds))
        for fd in descriptors
    ]
    for number, fd in enumerate(above, FIRST):
        if fd is not None:
            os.dup2(fd, number)
        else:
            os.closerange(number, number + 1)
    # First in the environment, as with systemd. setproctitle searches the environment for its
    # memory, and must still find that after these variables have been removed.
    environment = {
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDS": str(len(kinds)),
        "LISTEN_FDNAMES": ":".join(kinds),
        **os.environ,
    }
    os.execvpe(command[0], command, environment)


if __name__ == "__main__":
    main()
