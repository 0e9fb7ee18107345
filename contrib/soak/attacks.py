"""What strangers do to a port: each attack is an endless generator of small steps, and lets go of everything when it is closed.

As a program, `attacks.py NAME PORT RATE SECONDS`, it does so many things a second (0: as many as it can) until it is terminated, or for
so long, and prints how many they were. Only for servers of one's own, on loopback.
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
# connections without a header
SLOW = 10_000
# connections that ask for everything and never read
DEAF = 1000
# connections that wait for the server to say something
PATIENT = 500
# things that are done in one step: a connection each, or a send
STEP = 50
FLOODERS = 8
# bytes of junk in one send
FLOOD = 64 << 10

Attack = Generator[None, None, None]

# SO_LINGER: no FIN on close, but a reset
_RESET = struct.pack("ii", 1, 0)
# what a TLS client begins with
_HELLO = b"\x16\x03\x01\x00\xc8\x01\x00\x00\xc4\x03\x03" + bytes(range(194))
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


def _say(sock: socket.socket, data: bytes) -> bool:
    """Send what goes, and tell whether the connection is still there."""
    try:
        sock.send(data)
    except BlockingIOError:
        # it is full
        pass
    except OSError:
        return False
    return True


def slowloris(port: int, dice: random.Random, most: int = SLOW) -> Attack:
    """Have `most` connections, send no whole header on any, and now and then a byte."""
    with _held() as socks:
        while True:
            for _ in range(min(STEP, most - len(socks))):
                socks.append(_connect(port, dice))
            for place in dice.sample(range(len(socks)), min(STEP, len(socks))):
                # a header of too many blanks is refused: come again
                if not _say(socks[place], b" "):
                    refused, socks[place] = socks[place], _connect(port, dice)
                    refused.close()
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
            for number in range(STEP):
                _say(socks[number % FLOODERS], bytes(FLOOD))
            yield


def deaf(port: int, dice: random.Random) -> Attack:
    """Ask for the whole file on many connections, and never read."""
    with _held() as socks:
        while True:
            for _ in range(min(STEP, DEAF - len(socks))):
                socks.append(_connect(port, dice))
                _say(socks[-1], b"0\n")
            if len(socks) == DEAF:
                # there is nothing to be done
                time.sleep(0.01)
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
        # takes CAP_NET_RAW
        with contextlib.suppress(PermissionError):
            _half_open(port, dice)
        yield


def _half_open(port: int, dice: random.Random) -> None:
    """Send bare SYNs; our own kernel, which knows nothing of them, answers the server's with resets, as with `nmap -sS`."""
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
    # the kernel's choice of a source
    pseudo = socket.inet_aton(HOST) * 2 + struct.pack("!HH", socket.IPPROTO_TCP, len(segment))
    total = sum(struct.unpack(f"!{(len(pseudo) + len(segment)) // 2}H", pseudo + segment))
    struct.pack_into("!H", segment, 16, ~(total % 0xFFFF) & 0xFFFF)
    return bytes(segment)


def banner(port: int, dice: random.Random) -> Attack:
    """Connect, wait for the service to say what it is, and leave without a word."""
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

# How many connections an attack keeps, once it is in full swing.
KEPT = {"slowloris": SLOW, "junk": FLOODERS, "deaf": DEAF, "banner": PATIENT}


def run(steps: Attack, rate: float) -> Iterator[None]:
    """Take the steps at that pace, and none faster to make up for what did not go as fast."""
    due = time.monotonic()
    for _ in steps:
        yield
        if rate:
            due = max(due + STEP / rate, time.monotonic() - STEP / rate)
            time.sleep(max(0.0, due - time.monotonic()))


def main(name: str, port: str, rate: str, seconds: str) -> None:
    """Attack with the processor time that nobody else wants: real attackers bring their own."""
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    _, descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (descriptors, descriptors))
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGALRM, _end)
    signal.alarm(int(seconds))
    done = 0
    try:
        while True:
            # the server is too busy to be connected to: once more
            with contextlib.suppress(OSError):
                for _ in run(ATTACKS[name](int(port), random.Random(1)), float(rate)):
                    done += STEP
    finally:
        print(done)


def _end(*_: object) -> None:
    raise SystemExit


if __name__ == "__main__":
    main(*sys.argv[1:])
