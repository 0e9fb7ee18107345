"""Follows a file that tailsrv serves: the library that the commands use, for everybody.

from tailsrv.client import follow

for chunk in follow("logserver:4321"):
    print(chunk)
"""

from collections.abc import Callable, Sequence

from tailsrv.addresses import EndpointError, check_port, parse_endpoint
from tailsrv.client.connector import Backoff, ConnectError, Connector, UnknownHostError, Wait, wait
from tailsrv.client.resume import (
    LostPlaceError,
    OffsetError,
    OtherFileError,
    PlaceError,
    Recall,
    position_at,
)
from tailsrv.client.stream import Follow

__all__ = [
    "Backoff", "ConnectError", "EndpointError", "Follow", "LostPlaceError", "OffsetError", "OtherFileError", "PlaceError", "Recall",
    "UnknownHostError", "Wait", "follow",
]  # fmt: skip

Address = str | tuple[str, int]


def follow(
    addresses: Address | Sequence[Address],
    offset: int | str = 0,
    *,
    once: bool = False,
    idle: float | None = None,
    whole_lines: bool = False,
    backoff: Backoff = Backoff(),  # noqa: B008 - frozen
    connect_timeout: float = 10.0,
    recall: Recall | None = None,
    report: Callable[[str], object] = lambda _: None,
    wait: Wait = wait,
) -> Follow:
    """Return an iterator of a served file's bytes from `offset` on, none lost and none twice, whatever becomes of connections.

    `addresses` is "HOST:PORT" (an IPv6 address in brackets) or (host, port), or several of these that serve the same file.
    They are tried in turn, each with every address that its name has, `connect_timeout` seconds each.
    Looking up the names may take as long, too; a name that takes longer is left out until its addresses are found. A daemon thread
    does that, for names that are no numeric addresses, and calls nothing of yours.
    `offset` is N, -N or "-0", as in the protocol. Chunks end anywhere and are never empty.

    `once` ends the iteration with the first connection, `idle` after so many seconds without a byte; by default it never ends.
    With `whole_lines`, an offset from the end begins at the next line. `report` is called with a line for people when connections
    are lost or cannot be made, once for each reason. `recall` returns the bytes before an offset that are to be compared (by default
    those that have come). `wait` waits for poll(2) events of a descriptor (-1: none), for so many seconds at most (None: for ever),
    and tells whether they came; one's own may wait for other things as well, and raise what it likes but OSError to end the iteration.

    On each new connection it first asks for the last 4 KiB again and compares. From N on this is exact; OtherFileError says that
    another file is served now, after a rotation for instance. From -N and "-0" on, no offset is known, and it searches the file's end
    for those 4 KiB; LostPlaceError says that they are not there exactly once. Only a file that repeats 4 KiB to the byte, once,
    and more than 1 MiB later, while there is no connection, could deceive it. Where a connection is lost before anything has come,
    and within a second or from an empty file, -N is asked for anew.

    Raises EndpointError and OffsetError (both are ValueErrors) at once. The iteration raises UnknownHostError if no name has an
    address at the start, ConnectError (`once`, `idle`) if there is no connection or it breaks, and those two.
    """
    servers = [
        parse_endpoint(one) if isinstance(one, str) else check_port(*one)
        for one in _several(addresses)
    ]
    if not servers:
        raise EndpointError("no HOST:PORT")
    connector = Connector(servers, backoff, connect_timeout, wait, report)
    return Follow(
        connector,
        position_at(offset, recall),
        wait,
        report,
        once=once,
        idle=idle,
        whole_lines=whole_lines,
    )


def _several(addresses: Address | Sequence[Address]) -> list[Address]:
    match addresses:
        case str():
            return [addresses]
        case (str() as host, int() as port):
            return [(host, port)]
        case _:
            return list(addresses)
