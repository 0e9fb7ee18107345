"""Measures on this machine what a relay costs: `python3 measure.py [ROUNDS]`, with the Python of tailsrv's venv.

Everything runs over loopback: an origin, relays (tssync and tailsrv), and the clients, which throw away what they get.
It prints medians of the rounds, which take turns. Three rounds take a minute.
"""

import os
import re
import select
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median, quantiles

import psutil

RECORD = 128
# seconds between records
PAUSE = 0.01
# of one measurement of the delay
RECORDS = 300
LEVELS = (0, 1, 2)

RELAYS = (1, 2, 4)
# that replay, over all relays together
CLIENTS = 64
REPLAY = 64 << 20
# that get each record, over all relays together
LIVE_CLIENTS = 400
LIVE_RECORDS = 200

# seconds
PATIENCE = 60.0


class Server:
    """A tailsrv that serves `path`."""

    def __init__(self, stack, path):
        log = Path(f"{path}.log")
        with log.open("wb") as stderr:
            command = [
                sys.executable,
                "-m",
                "tailsrv",
                "--bind=127.0.0.1",
                "-p",
                "0",
                "--grace=0.1",
                path,
            ]
            self.process = start(stack, command, stderr)
        self.path = path
        self.port = int(wait_for(lambda: re.search(rb" port=(\d+)", log.read_bytes()))[1])
        wait_for(lambda: b"worker ready" in log.read_bytes())

    def cpu(self):
        """Return the processor time that it has used, all of its processes together."""
        process = psutil.Process(self.process.pid)
        times = [one.cpu_times() for one in (process, *process.children())]
        return sum(each.user + each.system for each in times)


def start(stack, command, stderr=subprocess.DEVNULL):
    """Start a program that is ended with `stack`."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=stderr)  # noqa: S603 - our own
    stack.callback(process.wait)
    stack.callback(process.terminate)
    return process


def wait_for(check):
    """Return what `check` returns as soon as that is true."""
    end = time.monotonic() + PATIENCE
    while not (seen := check()):
        if time.monotonic() > end:
            sys.exit("measure.py: this takes too long")
        time.sleep(0.01)
    return seen


def add_relay(stack, folder, upstream):
    """Return the server of a relay of `upstream`, once its copy is complete."""
    path = folder / f"copy-{time.monotonic_ns()}"
    start(
        stack, [sys.executable, "-m", "tailsrv.client.tssync", f"127.0.0.1:{upstream.port}", path]
    )
    wait_for(lambda: path.exists() and path.stat().st_size == upstream.path.stat().st_size)
    return Server(stack, path)


def connect(server, offset):
    """Return a connection to `server`."""
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
    sock.sendall(b"%d\n" % offset)
    return sock


@contextmanager
def tree(size):
    """Give a function that adds relays to an origin, the origin, and its file, which has `size` bytes."""
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="tailsrv-") as name:
        path = Path(name, "origin")
        path.write_bytes(os.urandom(1 << 20) * (size >> 20))
        file = stack.enter_context(path.open("ab", buffering=0))
        origin = Server(stack, path)
        yield lambda upstream: add_relay(stack, Path(name), upstream), origin, file
        # before the folder goes
        stack.close()


def measure_delay(level):
    """Return the seconds that each record took from the file of the origin to a client `level` relays away."""
    with tree(0) as (add, origin, file):
        server = origin
        for _ in range(level):
            server = add(server)
        delays = []
        with connect(server, 0) as sock:
            for number in range(RECORDS + 10):
                time.sleep(PAUSE)
                sent = time.monotonic()
                file.write(b"%0127d\n" % number)
                sock.recv(RECORD, socket.MSG_WAITALL)
                delays.append(time.monotonic() - sent)
        return delays[10:]


def read_all(socks, count):
    """Read `count` bytes from each of `socks`, without looking at them."""
    left = {sock.fileno(): count for sock in socks}
    by_number = {sock.fileno(): sock for sock in socks}
    poll = select.epoll()
    for number in left:
        poll.register(number, select.EPOLLIN)
    buffer = bytearray(1 << 20)
    while left:
        for number, _ in poll.poll():
            # tcp(7): no copy
            left[number] -= by_number[number].recv_into(buffer, 0, socket.MSG_TRUNC)
            if left[number] <= 0:
                poll.unregister(number)
                del left[number]
    poll.close()


def measure_replay(count):
    """Return bytes per second over all clients of `count` relays, and the relays' processor time for a GiB."""
    with tree(REPLAY) as (add, origin, _):
        relays = [add(origin) for _ in range(count)]
        used, began = sum(relay.cpu() for relay in relays), time.monotonic()
        socks = [connect(relays[number % count], 0) for number in range(CLIENTS)]
        read_all(socks, REPLAY)
        took, used = time.monotonic() - began, sum(relay.cpu() for relay in relays) - used
        for sock in socks:
            sock.close()
        return CLIENTS * REPLAY / took, used / (CLIENTS * REPLAY / (1 << 30))


def measure_live(count):
    """Return the processor time of the `count` relays, and of the origin, for each record that a client gets."""
    with tree(1 << 20) as (add, origin, file):
        relays = [add(origin) for _ in range(count)]
        socks = [connect(relays[number % count], 1 << 20) for number in range(LIVE_CLIENTS)]
        file.write(bytes(RECORD))
        # all are there
        read_all(socks, RECORD)
        used, at_origin = sum(relay.cpu() for relay in relays), origin.cpu()
        for _ in range(LIVE_RECORDS):
            file.write(bytes(RECORD))
            read_all(socks, RECORD)
        deliveries = LIVE_CLIENTS * LIVE_RECORDS
        used, at_origin = (
            (sum(relay.cpu() for relay in relays) - used) / deliveries,
            (origin.cpu() - at_origin) / deliveries,
        )
        for sock in socks:
            sock.close()
        return used, at_origin


def percentile(values, percent):
    """Return the value that `percent` of `values` do not exceed."""
    return quantiles(values, n=100, method="inclusive")[percent - 1]


def main():
    """Measure, and print tables."""
    rounds = range(int(sys.argv[1]) if sys.argv[1:] else 3)
    delays = [[measure_delay(level) for level in LEVELS] for _ in rounds]
    print("| relays between origin and client | p50 | p99 |\n| --- | --- | --- |")
    for level in LEVELS:
        p50, p99 = (
            median(percentile(one[level], percent) * 1000 for one in delays) for percent in (50, 99)
        )
        print(f"| {level} | {p50:.2f} ms | {p99:.2f} ms |", flush=True)
    fans = [[(*measure_replay(count), *measure_live(count)) for count in RELAYS] for _ in rounds]
    print(
        f"\n| relays | {CLIENTS} clients replay | CPU for a GiB sent | CPU for a record delivered | of that, at the origin |"
    )
    print("| --- | --- | --- | --- | --- |")
    for index, count in enumerate(RELAYS):
        rate, gib, live, origin = (
            median(one[index][column] for one in fans) for column in range(4)
        )
        print(
            f"| {count} | {rate / (1 << 30):.2f} GiB/s | {gib:.2f} s | {(live + origin) * 1e6:.1f} µs | {origin * 1e6:.2f} µs |"
        )


if __name__ == "__main__":
    main()
