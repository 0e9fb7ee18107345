"""The protocol and its guarantees, tested with the whole program over real sockets."""

import json
import os
import random
import selectors
import socket
import threading
import time
from itertools import takewhile
from pathlib import Path

import pytest

from support.files import append, random_bytes
from support.processes import cpu_seconds
from support.server import Serve, Server
from support.sockets import expect, expect_eof, readable, recv_all, recv_exactly, reset_at_close
from support.status import ask
from support.waiting import eventually
from tailsrv.addresses import endpoint
from tailsrv.control_socket import CLIENTS

DATA = random_bytes(100)
APPENDED = b"appended after all headers were read"
INT64_MAX = 2**63 - 1

LOOPBACKS = ["127.0.0.1", "::1"]

# The `?` line for each of these headers, with the size of DATA.
OFFSETS_HEADERS = {
    b"?0\n": (0, 100),
    b"?7\n": (7, 100),
    b"?100\n": (100, 100),
    b"?103\n": (103, 100),
    b"?-5\n": (95, 100),
    b"?-0\n": (100, 100),
    b"?-101\n": (0, 100),
    b" ?+7\r\n": (7, 100),
    b"?%d\n" % INT64_MAX: (INT64_MAX, 100),
}

# What a client sends, and at which offset of DATA + APPENDED its stream then starts.
GOOD_HEADERS = {
    b"0\n": 0,
    b"7\n": 7,
    b"99\n": 99,
    b"100\n": 100,
    b"103\n": 103,
    b"-5\n": 95,
    b"-100\n": 0,
    b"-101\n": 0,
    b"-0\n": 100,
    b"+0\n": 0,
    b"+7\n": 7,
    b"7\r\n": 7,
    b"-7\r\n": 93,
    b" 7 \n": 7,
    b"\t 7 \t\r\n": 7,
    b"0007\n": 7,
    b"0" * 31 + b"7\n": 7,
    b"%d\n" % INT64_MAX: 136,
    b"%d\n" % -(2**63): 0,
    b"7\nand more": 7,
    b"7\n8\n": 7,
    b"7\n" + bytes(1000): 7,
}

BAD_HEADERS = {
    b"abc\n": "not a number",
    b"\n": "not a number",
    b"\r\n": "not a number",
    b"1_000\n": "not a number",
    b"1e3\n": "not a number",
    "٣\n".encode(): "not a number",
    b"-\n": "not a number",
    b"--1\n": "not a number",
    b"1 2\n": "not a number",
    b"0x10\n": "not a number",
    b"\xff\0\n": "not a number",
    b"1.0\n": "not a number",
    b"?\n": "not a number",
    b"??1\n": "not a number",
    b"1" * 33: "header too long",
    b"1" * 33 + b"\n": "header too long",
    b" " * 5000: "header too long",
    b"%d\n" % (INT64_MAX + 1): "number does not fit 64 bits",
    b"%d\n" % -(2**63 + 1): "number does not fit 64 bits",
    b"9" * 30 + b"\n": "number does not fit 64 bits",
}


@pytest.mark.parametrize("host", LOOPBACKS)
def test_good_headers(serve: Serve, path: Path, host: str) -> None:
    """Each client gets exactly the bytes from the start that its header requests, and appends."""
    path.write_bytes(DATA)
    server = serve(path, "-v")
    clients = {header: server.connect(header, host) for header in GOOD_HEADERS}
    for client in clients.values():
        server.streaming(client)
    append(path, APPENDED)
    for header, start in GOOD_HEADERS.items():
        expect(clients[header], (DATA + APPENDED)[start:])
    server.process.terminate()
    assert {header: recv_all(client) for header, client in clients.items()} == dict.fromkeys(
        GOOD_HEADERS, b""
    )


def test_offsets_line(serve: Serve, path: Path) -> None:
    """After `?` the first line has the offsets of the next byte and of the end, in 40 bytes."""
    path.write_bytes(DATA)
    server = serve(path, "-v")
    clients = {header: server.connect(header) for header in OFFSETS_HEADERS}
    for client in clients.values():
        server.streaming(client)
    append(path, APPENDED)
    for header, (start, end) in OFFSETS_HEADERS.items():
        expect(clients[header], b"%019d %019d\n" % (start, end) + (DATA + APPENDED)[start:])
    positions = {
        client["peer"]: (client["start"], client["position"])
        for client in json.loads(ask(f"*:{server.port}{CLIENTS}")[0])["clients"]
    }
    assert positions == {
        endpoint(*clients[header].getsockname()): (start, max(start, len(DATA + APPENDED)))
        for header, (start, _) in OFFSETS_HEADERS.items()
    }


def test_offsets_of_an_empty_file(serve: Serve, path: Path) -> None:
    """The end of an empty file is 0, and the line comes although no byte follows it."""
    path.touch()
    server = serve(path)
    client = server.connect(b"?-1000\n")
    expect(client, b"%019d %019d\n" % (0, 0))
    append(path, DATA)
    expect(client, DATA)


@pytest.mark.sample(3)
@pytest.mark.parametrize("start", [0, 1, 5_000_000_000, 2**40 - 1, 2**40, 2**40 + 10])
def test_offsets_beyond_32_bits(serve: Serve, path: Path, start: int) -> None:
    """A client of a huge file gets the bytes from its 64-bit offset, also after the file grew."""
    path.write_bytes(DATA)
    server = serve(path, "-v")
    caught_up = server.connect(b"-%d\n" % len(DATA))
    ahead = (
        server.connect(b"%d\n" % start)
        if start > len(DATA)
        else server.connect(b"%d\n" % (start + 2**40))
    )
    server.streaming(ahead)
    expect(caught_up, DATA)
    # The file is sparse and uses no disk space.
    os.truncate(path, 2**40)
    append(path, DATA)
    zeros = max(0, 2**40 - start) if start > len(DATA) else 0
    expect(
        ahead,
        (bytes(min(zeros, 1000)) + DATA[max(0, start - 2**40) if start > len(DATA) else start :])[
            :1000
        ],
    )


# Each half has no more headers than the ten refusals that a worker logs at once.
@pytest.mark.parametrize("host", LOOPBACKS)
@pytest.mark.parametrize("half", [0, 1])
def test_bad_headers(serve: Serve, path: Path, host: str, half: int) -> None:
    """A bad header ends its connection at once, with no data and one log line with the reason."""
    path.write_bytes(DATA)
    server = serve(path)
    other = server.connect(b"0\n")
    expect(other, DATA)
    for header, reason in list(BAD_HEADERS.items())[half::2]:
        client = server.connect(header, host)
        assert (header, client.recv(100)) == (header, b"")
        name, port = client.getsockname()[:2]
        peer = f" peer=[{name}]:{port} " if ":" in name else f" peer={name}:{port} "
        assert len(server.lines(peer)) == 1, server.log
        assert len(server.lines("warning: client refused: slot=0", peer, "reason=", reason)) == 1, (
            server.log
        )
    append(path, APPENDED)
    expect(other, APPENDED)


@pytest.mark.parametrize(
    ("sent", "reason"),
    [(b"", "input ended without a header"), (b"123", "input ended before the header's newline")],
)
def test_end_of_input_before_the_newline(
    serve: Serve, path: Path, sent: bytes, reason: str
) -> None:
    """A client that ends its input before its header is complete is refused for that reason."""
    path.write_bytes(DATA)
    server = serve(path)
    client = server.connect(sent)
    client.shutdown(socket.SHUT_WR)
    expect_eof(client)
    server.logged("client refused: ", f" peer=127.0.0.1:{client.getsockname()[1]} ", reason)


def test_refusals_do_not_flood_the_log(serve: Serve, path: Path) -> None:
    """Repeated bad headers from one address are all refused, and logged ten times."""
    path.write_bytes(DATA)
    server = serve(path)
    for _ in range(30):
        expect_eof(server.connect(b"rubbish\n"))
    server.finish()
    assert len(server.lines("client refused: ")) == 10


def test_header_in_pieces(serve: Serve, path: Path) -> None:
    """A header that arrives byte by byte is one header; its newline fixes the size it refers to."""
    path.write_bytes(DATA)
    server = serve(path, "-v")
    other = server.connect(b"0\n")
    expect(other, DATA)
    client = server.connect()
    header = b"  -101\r\n"
    for index in range(len(header)):
        client.sendall(header[index : index + 1])
        if header[index : index + 1] == b"\n":
            server.streaming(client)
        append(path, b"%03d," % index)
        # When this arrives, the server has seen all of the header that was sent.
        expect(other, b"%03d," % index)
    expected = DATA + b"".join(b"%03d," % index for index in range(len(header)))
    # The newline was sent before the last append.
    end = len(expected) - len(b"000,")
    expect(client, expected[end - 101 :])
    append(path, APPENDED)
    expect(client, APPENDED)


@pytest.mark.slow
def test_endless_input_after_the_header(serve: Serve, path: Path) -> None:
    """A client that never stops sending after its header is never blocked and gets exact data."""
    path.write_bytes(DATA)
    server = serve(path)
    client, other = server.connect(b"0\n"), server.connect(b"0\n")
    expect(client, DATA)
    expect(other, DATA)
    junk = b"0\n-7\nabc" * (1 << 17)
    # This is far more than the kernel's socket buffers hold.
    for turn in range(50):
        client.sendall(junk)
        append(path, appended := random_bytes(1000, turn))
        expect(client, appended)
        expect(other, appended)


def test_half_close(serve: Serve, path: Path) -> None:
    """A client that half-closes its connection after the header is still served."""
    path.write_bytes(DATA)
    server = serve(path, "-v")
    clients = [
        server.connect(header) for header in (b"0\n", b"50\n", b"-0\n", b"110\n", b"0\nmore")
    ]
    for client in clients:
        client.shutdown(socket.SHUT_WR)
        server.streaming(client)
    append(path, APPENDED)
    for client, start in zip(clients, (0, 50, 100, 110, 0), strict=True):
        expect(client, (DATA + APPENDED)[start:])
    append(path, DATA)
    for client in clients:
        expect(client, DATA)


def test_header_timeout(serve: Serve, path: Path) -> None:
    """--header-timeout ends connections without a complete header, and no others."""
    path.write_bytes(DATA)
    server = serve(path, "--header-timeout", "0.1")
    streaming = server.connect(b"0\n")
    expect(streaming, DATA)
    silent, incomplete = server.connect(), server.connect(b"12")
    expect_eof(silent)
    expect_eof(incomplete)
    for client in (silent, incomplete):
        server.logged("client refused: ", f":{client.getsockname()[1]} ", "no header in 0.1 s")
    append(path, APPENDED)
    expect(streaming, APPENDED)


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 2])
def test_many_clients_while_the_file_grows(serve: Serve, path: Path, workers: int) -> None:
    """Two hundred clients that connect during appends get every byte once and in order."""
    whole, before = random_bytes(1 << 20), 1 << 18
    path.write_bytes(whole[:before])
    server = serve(path, "-w", str(workers))
    dice = random.Random(2)

    def keep_appending() -> None:
        end = before
        while end < len(whole):
            size = dice.randint(1, 20_000)
            append(path, whole[end : end + size])
            end += size

    appender = threading.Thread(target=keep_appending)
    starts = random.Random(3).sample(range(len(whole)), 200)
    received = [bytearray() for _ in starts]
    with selectors.DefaultSelector() as selector:
        for number, start in enumerate(starts):
            client = server.connect(b"%d\n" % start, LOOPBACKS[number % 2])
            selector.register(client, selectors.EVENT_READ, number)
            if number == 20:
                appender.start()
        while selector.get_map():
            ready = selector.select(20)
            assert ready, "no client received data in 20 seconds"
            for key, _ in ready:
                assert isinstance(key.fileobj, socket.socket)
                stream = received[key.data]
                chunk = key.fileobj.recv(1 << 20)
                stream += chunk
                if not chunk or len(stream) >= len(whole) - starts[key.data]:
                    selector.unregister(key.fileobj)
    appender.join()
    wrong = {
        start: len(stream)
        for start, stream in zip(starts, received, strict=True)
        if stream != whole[start:]
    }
    assert wrong == {}


@pytest.mark.slow
def test_blocked_client(serve: Serve, path: Path) -> None:
    """A blocked client delays no others, stays connected, and later reads every byte."""
    data = random_bytes(16 << 20)
    path.write_bytes(data)
    server = serve(path)
    blocked = server.connect(b"0\n", receive_buffer=4096)
    expect(blocked, data[:10])
    other = server.connect(b"0\n")
    expect(other, data)
    for turn in range(10):
        append(path, appended := random_bytes(100, turn))
        expect(other, appended)
        data += appended
    expect(blocked, data[10:])


@pytest.mark.slow
def test_clients_that_connect_and_leave(serve: Serve, path: Path) -> None:
    """Connections that end in any way and at any time leave the other streams exact."""
    data = random_bytes(4 << 20)
    path.write_bytes(data)
    server = serve(path, "-w", "2")
    staying = [server.connect(b"0\n", receive_buffer=1 << 16) for _ in range(10)]
    for turn in range(300):
        client = server.connect(
            [b"", b"12", b"0\n", b"0\njunk", b"rubbish\n", b"-0\n", b"999999999\n"][turn % 7]
        )
        if turn % 3 == 0:
            reset_at_close(client)
        elif turn % 3 == 1:
            client.shutdown(socket.SHUT_WR)
        client.close()
        append(path, appended := random_bytes(50, turn))
        data += appended
    for client in staying:
        expect(client, data)


# The descriptor limit of each process, which uses about a dozen itself.
DESCRIPTORS = 40

# prlimit execs the program, so the pid stays the same.
FEW_DESCRIPTORS = ("prlimit", f"--nofile={DESCRIPTORS}:{DESCRIPTORS}")


def fill(server: Server, data: bytes) -> list[socket.socket]:
    """Return as many streaming clients as the server has descriptors for, and one that waits."""
    clients: list[socket.socket] = []
    while not server.lines("out of file descriptors or memory"):
        clients.append(server.connect(b"0\n"))
        eventually(
            lambda: readable(clients[-1]) or server.lines("out of file descriptors or memory")
        )
    for client in clients[:-1]:
        expect(client, data)
    return clients


def test_short_of_descriptors_drops_headerless_first(serve: Serve, path: Path) -> None:
    """Without free descriptors, the oldest headerless connections are dropped; streams continue."""
    path.write_bytes(DATA)
    server = serve(path, "--bind", "127.0.0.1", wrapper=FEW_DESCRIPTORS)
    streaming = [server.connect(b"0\n") for _ in range(5)]
    for client in streaming:
        expect(client, DATA)
    headerless = [server.connect() for _ in range(2 * DESCRIPTORS)]
    headerless[-1].sendall(b"0\n")
    # The last client is accepted, and so are all before it.
    expect(headerless[-1], DATA)
    for client in headerless[:-1]:
        if not readable(client):
            client.sendall(b"0\n")
    received = [recv_exactly(client, len(DATA)) for client in headerless[:-1]]
    dropped = len(list(takewhile(lambda stream: stream == b"", received)))
    assert 40 <= dropped < 2 * DESCRIPTORS - 5
    assert received[dropped:] == [DATA] * (len(received) - dropped)
    append(path, APPENDED)
    for client in streaming + headerless[dropped:]:
        expect(client, APPENDED)
    assert (
        len(
            server.lines(
                "warning: out of file descriptors: disconnected the oldest client without a header"
            )
        )
        == 1
    )


@pytest.mark.slow
def test_short_of_descriptors_keeps_streaming_clients(serve: Serve, path: Path) -> None:
    """With streaming clients only, a new client waits until another leaves, without a busy loop."""
    path.write_bytes(DATA)
    server = serve(path, "--bind", "127.0.0.1", wrapper=FEW_DESCRIPTORS)
    *clients, waiting = fill(server, DATA)
    assert len(clients) > 10
    (worker,) = server.workers(1)
    append(path, APPENDED)
    for client in clients:
        expect(client, APPENDED)
    before = cpu_seconds(worker)
    # There is no event to wait for: the test is that none happens.
    time.sleep(1)
    assert cpu_seconds(worker) - before < 0.2
    assert not readable(waiting)
    assert len(server.lines("out of file descriptors or memory")) == 1
    clients.pop(0).close()
    # The server cannot tell the close from a half-close until it sends this.
    append(path, DATA)
    for client in clients:
        expect(client, DATA)
    expect(waiting, DATA + APPENDED + DATA)
