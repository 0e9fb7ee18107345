"""Every TCP socket is one of MPTCP, as mptcpize(8) or a BPF program does behind a program's back."""

import socket


class Socket(socket.socket):
    """A socket that is not of the kind that was asked for."""

    def __init__(
        self, family: int = -1, type: int = -1, proto: int = -1, fileno: int | None = None
    ) -> None:
        if (
            fileno is None
            and family in (socket.AF_INET, socket.AF_INET6)
            and type == socket.SOCK_STREAM
        ):
            proto = socket.IPPROTO_MPTCP
        super().__init__(family, type, proto, fileno)


socket.socket = Socket  # type: ignore[misc]
