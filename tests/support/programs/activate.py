"""Starts a program as a service manager does that listens for it: `activate.py KIND[,KIND...] COMMAND [ARGUMENT...]`.

Kinds: `tcp4` and `tcp6` (which takes IPv4, too) listen on a free port, `again` joins the first one's port with
SO_REUSEPORT, `mptcp` listens for MPTCP, `bound` does not listen, `udp`, `unix` and `file` are what they say, `none` is a closed descriptor.
"""

import fcntl
import os
import socket
import sys

FIRST = 3


def listening(family: socket.AddressFamily, host: str, port: int = 0) -> socket.socket:
    """Return a listening socket that others may join."""
    sock = socket.socket(family)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    if family == socket.AF_INET6:
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.bind((host, port))
    sock.listen(4096)
    return sock


def make(kind: str, made: list[socket.socket]) -> socket.socket:
    """Return a socket of that kind."""
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
    sources: list[int | None] = []
    for kind in kinds:
        if kind == "file":
            sources.append(os.memfd_create("a file"))
        elif kind == "none":
            sources.append(None)
        else:
            made.append(make(kind, made))
            sources.append(made[-1].fileno())
    # out of the way
    above = [
        None if fd is None else fcntl.fcntl(fd, fcntl.F_DUPFD, FIRST + len(kinds)) for fd in sources
    ]
    for number, fd in enumerate(above, FIRST):
        if fd is not None:
            os.dup2(fd, number)
        else:
            os.closerange(number, number + 1)
    # First in the environment, as systemd has it: what setproctitle looks for must not be confused when they go.
    environment = {
        "LISTEN_PID": str(os.getpid()),
        "LISTEN_FDS": str(len(kinds)),
        "LISTEN_FDNAMES": ":".join(kinds),
        **os.environ,
    }
    os.execvpe(command[0], command, environment)


if __name__ == "__main__":
    main()
