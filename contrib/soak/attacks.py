"""What strangers do to a port: each attack is an endless generator of small steps, and lets go of everything when it is closed.

As a program, `attacks.py NAME PORT`, it goes on until it is killed. Only for servers of one's own, on loopback.
"""

import contextlib
import os
import random
import resource
import socket
import struct
import sys
from collections.abc import Callable, Generator, Iterator

HOST = "127.0.0.1"
SLOW = 10_000  # connections without a header
STEP = 50  # connections that come in one step
FLOODERS = 8
FLOOD = 64 << 10  # bytes of junk from each of them in one step

Attack = Generator[None, None, None]

_RESET = struct.pack("ii", 1, 0)  # SO_LINGER: no FIN on close, but a reset
_HELLO = b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03" + bytes(range(194))  # what a TLS client begins with
_REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: scanner\r\nAccept: */*\r\n\r\n"
_LETTERS = b"0123456789+-_ex \t\r\n\0\xff"


def _connect(port: int, dice: random.Random) -> socket.socket:
    """Return a connection from anywhere in 127.0.0.0/8: one address alone has too few ports for a flood."""
    sock = socket.socket()
    try:
        sock.settimeout(10)
        sock.bind((f"127.{dice.randrange(256)}.{dice.randrange(256)}.{dice.randrange(1, 255)}", 0))
        sock.connect((HOST, port))
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def _reset(sock: socket.socket) -> None:
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
    sock.close()


@contextlib.contextmanager
def _held() -> Iterator[list[socket.socket]]:
    """Give a list for connections, which are reset in the end."""
    socks: list[socket.socket] = []
    try:
        yield socks
    finally:
        for sock in socks:
            _reset(sock)


def _say(sock: socket.socket, data: bytes) -> None:
    with contextlib.suppress(OSError):  # it has been ended, or is full
        sock.send(data)


def slowloris(port: int, dice: random.Random, most: int = SLOW) -> Attack:
    """Connect up to `most` times, send no whole header on any, and now and then a byte."""
    with _held() as socks:
        while True:
            for _ in range(min(STEP, most - len(socks))):
                socks.append(_connect(port, dice))
            for sock in dice.sample(socks, min(STEP, len(socks))):
                _say(sock, b" ")  # a header of too many blanks is refused: some are
            yield


def fuzz(port: int, dice: random.Random) -> Attack:
    """Send anything, in pieces, and leave in any way."""
    while True:
        with _held() as socks:
            for _ in range(STEP):
                socks.append(_connect(port, dice))
            for sock in socks * 3:
                _say(sock, bytes(dice.choices(_LETTERS, k=dice.randrange(1, 20))))
            for sock in dice.sample(socks, STEP // 2):
                with contextlib.suppress(OSError):
                    sock.shutdown(dice.choice([socket.SHUT_WR, socket.SHUT_RDWR]))
        yield


def reset(port: int, dice: random.Random) -> Attack:
    """Connect and reset at once."""
    while True:
        for _ in range(STEP):
            _reset(_connect(port, dice))
        yield


def begin(port: int, dice: random.Random) -> Attack:
    """Ask for the whole file and reset at once."""
    while True:
        with _held() as socks:
            for _ in range(STEP):
                socks.append(_connect(port, dice))
                _say(socks[-1], b"0\n")
        yield


def junk(port: int, dice: random.Random) -> Attack:
    """Ask for what is new, and send as much as goes."""
    with _held() as socks:
        for _ in range(FLOODERS):
            socks.append(_connect(port, dice))
            _say(socks[-1], b"-0\n")
        while True:
            for sock in socks:
                _say(sock, bytes(FLOOD))
            yield


def deaf(port: int, dice: random.Random) -> Attack:
    """Ask for the whole file, up to 1000 times, and never read."""
    with _held() as socks:
        while True:
            for _ in range(min(STEP, 1000 - len(socks))):
                socks.append(_connect(port, dice))
                _say(socks[-1], b"0\n")
            yield


def tls(port: int, dice: random.Random) -> Attack:
    """Begin with TLS."""
    return _converse(port, dice, _HELLO)


def http(port: int, dice: random.Random) -> Attack:
    """Send a request of HTTP."""
    return _converse(port, dice, _REQUEST)


def _converse(port: int, dice: random.Random, says: bytes) -> Attack:
    while True:
        with _held() as socks:
            for _ in range(STEP):
                socks.append(_connect(port, dice))
                _say(socks[-1], says)
        yield


def scan(port: int, dice: random.Random) -> Attack:
    """Look whether the port is open: connect and close, connect and reset, or only half of a handshake."""
    while True:
        for _ in range(STEP):
            leave = dice.choice([socket.socket.close, _reset])
            leave(_connect(port, dice))
        with contextlib.suppress(PermissionError):  # takes CAP_NET_RAW
            _half_open(port, dice)
        yield


def _half_open(port: int, dice: random.Random) -> None:
    """Send bare SYNs; our own kernel, which knows nothing of them, answers the server's with resets, as with `nmap -sS`."""
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as sock:
        for _ in range(STEP):
            sock.sendto(_syn(port, dice), (HOST, 0))


def _syn(port: int, dice: random.Random) -> bytes:
    segment = bytearray(struct.pack("!HHIIBBHHH", dice.randrange(1024, 32768), port, dice.getrandbits(32), 0, 5 << 4, 2, 1024, 0, 0))
    pseudo = socket.inet_aton(HOST) * 2 + struct.pack("!HH", socket.IPPROTO_TCP, len(segment))  # the kernel's choice of a source
    total = sum(struct.unpack(f"!{(len(pseudo) + len(segment)) // 2}H", pseudo + segment))
    struct.pack_into("!H", segment, 16, ~(total % 0xFFFF) & 0xFFFF)
    return bytes(segment)


ATTACKS: dict[str, Callable[[int, random.Random], Attack]] = {
    attack.__name__: attack for attack in (slowloris, fuzz, reset, begin, junk, deaf, tls, http, scan)
}


def main(name: str, port: str) -> None:
    """Attack until somebody ends it, with the processor time that nobody else wants: real attackers bring their own."""
    os.nice(19)
    _, descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    steps = ATTACKS[name](int(port), random.Random(1))
    while True:
        with contextlib.suppress(OSError):  # the server is too busy to be connected to: go on
            for _ in steps:
                pass
        steps = ATTACKS[name](int(port), random.Random(1))


if __name__ == "__main__":
    main(*sys.argv[1:])
