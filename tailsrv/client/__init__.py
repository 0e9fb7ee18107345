"""The Python client of tailsrv: `follow` iterates over the bytes of a served file.

The commands `tscat` and `tssync` use it as well. Example:
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
    "Backoff", "ConnectError", "EndpointError", "Follow", "LostPlaceError", "OffsetError",
    "OtherFileError", "PlaceError", "Recall", "UnknownHostError", "Wait", "follow",
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
    """Iterate over the bytes of a served file; reconnect without losing or repeating any.

    After each reconnect the iterator first requests the bytes before its offset again, up to 4
    KiB, and compares them. It does not ask the server for offsets, so after -N or "-0" one is
    unknown at first. If the file is shorter than 64 KiB, and not empty, the iterator learns the
    offset when no data has arrived for a second. If the offset is unknown after a reconnect, the
    iterator searches the end of the file, up to 64 MiB, for the last 4 KiB before its position.
    They must be there exactly once. The search can find a wrong position only if, during one
    outage, the same 4 KiB are appended once more, and more than 1 MiB later. If a connection is
    lost before any byte was received, and either within a second or while the file is empty, -N is
    requested again.

    `recall`, `report` and `wait` are called in the thread that iterates. Each name that is not a
    numeric address is looked up in a daemon thread, which calls none of them.

    Args:
        addresses: One server, or several replicas of the same file: "HOST:PORT" (an IPv6 address in
            brackets) or (host, port). All addresses of all names are tried in turn, then again
            after a pause.
        offset: Where to start, as in the protocol: N counts bytes from the start of the file, -N
            from its end, and "-0" means only new data. The integer 0 means the start of the file.
        once: Stop when the first connection ends, instead of reconnecting.
        idle: Stop after this many seconds without new data. None: never.
        whole_lines: With an offset from the end, start at the first line that begins there or
            later.
        backoff: The pauses between rounds of attempts to connect, see `Backoff`.
        connect_timeout: Seconds for each attempt to connect to one address, and for all look-ups of
            names in one round. A name that needs longer is left out until its addresses are found.
        recall: For programs like `tssync`, which keep the received bytes themselves. Called with
            the current offset before each header is sent, also the first. Returns the bytes that
            the server must have directly before that offset, b"" for no comparison. By default
            these are the last bytes that the iterator has received. Not used if `offset` counts
            from the end.
        report: Called with one line of text when no address is left to try (not again while the
            text stays the same), when a server does not send the bytes that it must have, and when
            bytes arrive again after a failure.
        wait: For programs like `tssync`, which do other things while they wait. Called with a
            descriptor (-1: none), poll(2) events, and a number of seconds (None: no limit). Waits
            for the events for at most that time, and returns whether they occurred. It may raise
            any exception but OSError, to interrupt the iteration. This does not close the iterator.

    Returns:
        A `Follow`, which is an iterator and a context manager. Its chunks are never empty, and may
        end in the middle of a line. A chunk has at most 64 KiB, with one exception: after a
        reconnect with an unknown offset, the first chunk may have up to 64 MiB. `Follow.offset` is
        the offset after the last chunk, None while it is unknown. `Follow.close` closes the
        connection and ends the iteration.

    Raises:
        EndpointError, OffsetError: At once, for malformed arguments. Both are ValueErrors.
        UnknownHostError: While iterating, if no name has an address, and none has ever had one.
        ConnectError: While iterating. With `once`: no server can be reached, or the connection
            fails. With `idle`: within that time no server with the data can be reached. It is an
            OSError, and the base class of UnknownHostError.
        OtherFileError: While iterating: the server has different bytes before the current offset,
            for example because the file was rotated.
        LostPlaceError: While iterating, only if `offset` counts from the end: the current position
            cannot be found again. This error and OtherFileError are PlaceErrors. All of these
            errors that are raised while iterating close the iterator.

    """
    servers = [
        parse_endpoint(one) if isinstance(one, str) else check_port(*one)
        for one in _as_list(addresses)
    ]
    if not servers:
        raise EndpointError("no HOST:PORT given; name at least one server, as in localhost:4321")
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


def _as_list(addresses: Address | Sequence[Address]) -> list[Address]:
    match addresses:
        case str():
            return [addresses]
        case (str() as host, int() as port):
            return [(host, port)]
        case _:
            return list(addresses)
