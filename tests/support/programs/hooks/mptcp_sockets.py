"""Makes every TCP socket an MPTCP socket, as mptcpize(8) or a BPF program would."""

import socket


class Socket(socket.socket):
    """A socket that uses MPTCP where TCP was requested."""

    def __init__(
        self,
        family: int = -1,
        type: int = -1,  # noqa: A002
        proto: int = -1,
        fileno: int | None = None,
    ) -> None:
        if (
            fileno is None
            and family in (socket.AF_INET, socket.AF_INET6)
            and type == socket.SOCK_STREAM
        ):
            proto = socket.IPPROTO_MPTCP
        super().__init__(family, type, proto, fileno)


socket.socket = Socket  # type: ignore[misc]
