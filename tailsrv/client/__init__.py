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
    GoneError,
    OffsetError,
    OtherFileError,
    PlaceError,
    Recall,
    position_at,
)
from tailsrv.client.stream import Follow

__all__ = [
    "Backoff", "ConnectError", "EndpointError", "Follow", "GoneError", "OffsetError",
    "OtherFileError", "PlaceError", "Recall", "UnknownHostError", "Wait", "follow",
]  # fmt: skip

Address = str | tuple[str, int]


def follow(
    addresses: Address | Sequence[Address],
    offset: int | str = 0,
    *,
    once: bool = False,
    idle: float | None = None,
    until_end: bool = False,
    whole_lines: bool = False,
    backoff: Backoff = Backoff(),  # noqa: B008 - frozen
    connect_timeout: float = 10.0,
    recall: Recall | None = None,
    report: Callable[[str], object] = lambda _: None,
    wait: Wait = wait,
) -> Follow:
    """Iterate over the bytes of a served file; reconnect without losing or repeating any.

    The first header begins with `?`, so that the server tells the offset of the first byte. After
    each reconnect the iterator first requests the bytes before its offset again, up to 4 KiB, and
    compares them.

    A server of tailsrv 1 does not answer `?`. The iterator reports that and then sends the header
    without it. A stream that began at an offset from the end then does not know its offset, and
    cannot resume after it has received bytes. Until then, it begins again after a lost connection.

    `recall`, `report` and `wait` are called in the thread that iterates. Each name that is not a
    numeric address is looked up in a daemon thread, which calls none of them.

    Args:
        addresses: One server, or several replicas of the same file: "HOST:PORT" (an IPv6 address in
            brackets) or (host, port). All addresses of all names are tried in turn, then again
            after a pause.
        offset: Where to start, as in the protocol: N counts bytes from the start of the file, -N
            from its end, and "-0" means only new data. The integer 0 means the earliest byte that
            the server has, unless `recall` is given.
        once: Stop when the first connection ends, instead of reconnecting. A connection that only
            shows that the server does not answer `?` does not count.
        idle: Stop after this many seconds without new data. None: never.
        until_end: Stop at the offset where the log ended when the stream began.
        whole_lines: With an offset from the end, start at the first line that begins there or
            later. If fewer bytes than requested exist, start at the first of them.
        backoff: The pauses between rounds of attempts to connect, see `Backoff`.
        connect_timeout: Seconds for each attempt to connect to one address, and for all look-ups of
            names in one round. A name that needs longer is left out until its addresses are found.
        recall: For programs like `tssync`, which keep the received bytes themselves. Called with
            the current offset before each header is sent, also the first. Returns the bytes that
            the server must have directly before that offset, b"" for no comparison. By default
            these are the last bytes that the iterator has received. Not used if `offset` counts
            from the end.
        report: Called with one line of text when no address is left to try (not again while the
            text stays the same), when a server does not send the bytes that it must have, or does
            not answer `?`, and when bytes arrive again after a failure.
        wait: For programs like `tssync`, which do other things while they wait. Called with a
            descriptor (-1: none), poll(2) events, and a number of seconds (None: no limit). Waits
            for the events for at most that time, and returns whether they occurred. It may raise
            any exception but OSError, to interrupt the iteration. This does not close the iterator.

    Returns:
        A `Follow`, which is an iterator and a context manager. Its chunks are never empty, and may
        end in the middle of a line. A chunk has at most 64 KiB. `Follow.offset` is the offset after
        the last chunk, None while it is unknown. `Follow.end` is the offset of the log's end when a
        server last told it, else None. `Follow.close` closes the connection and ends the iteration.

    Raises:
        EndpointError, OffsetError: At once, for malformed arguments. Both are ValueErrors.
        UnknownHostError: While iterating, if no name has an address, and none has ever had one.
        ConnectError: While iterating. With `once`: no server can be reached, or the connection
            fails. With `idle`: within that time no server with the data can be reached. With
            `until_end`: `once` or `idle` stops the iteration before the end, or the server has
            fewer bytes than the caller. It is an OSError, and the base class of UnknownHostError.
        OtherFileError: While iterating: the server has different bytes before the current offset,
            for example because the file was rotated.
        GoneError: While iterating: no server has the next byte, because it was deleted from the
            log. Its `offset` is that of the byte, `start` that of the earliest byte there is.
        PlaceError: While iterating: a server that does not answer `?` cannot continue this stream,
            or serve it with `until_end`, or with `whole_lines` and an offset from the end. It is
            the base class of OtherFileError and GoneError. All of these errors that are raised
            while iterating close the iterator.

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
        position_at(offset, recall, whole_lines),
        wait,
        report,
        once=once,
        idle=idle,
        until_end=until_end,
    )


def _as_list(addresses: Address | Sequence[Address]) -> list[Address]:
    match addresses:
        case str():
            return [addresses]
        case (str() as host, int() as port):
            return [(host, port)]
        case _:
            return list(addresses)
