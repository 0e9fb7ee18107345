"""Measures on this machine what a relay costs, in delay and processor time.

Run it as `python3 measure.py [ROUNDS]`, with the Python of tailsrv's venv. Everything runs over
loopback: an origin, relays (tssync and tailsrv), and clients, which discard what they receive. The
rounds of the different measurements are interleaved; their medians are printed. The default of
three rounds takes a minute.
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

# Bytes of a record.
RECORD = 128
# Seconds between two records.
PAUSE = 0.01
# Records in one measurement of the delay.
RECORDS = 300
# Numbers of relays between the origin and the client.
LEVELS = (0, 1, 2)

# Numbers of relays that serve clients side by side.
RELAYS = (1, 2, 4)
# Clients that replay, of all relays together, and the bytes that each of them receives.
CLIENTS = 64
REPLAY = 64 << 20
# Clients that receive each new record, of all relays together, and the number of records.
LIVE_CLIENTS = 400
LIVE_RECORDS = 200

# Seconds after which waiting is given up.
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
        """Return the processor time that all processes of the server have used, in seconds."""
        process = psutil.Process(self.process.pid)
        times = [one.cpu_times() for one in (process, *process.children())]
        return sum(each.user + each.system for each in times)


def start(stack, command, stderr=subprocess.DEVNULL):
    """Start a program, which `stack` will stop."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stderr=stderr)  # noqa: S603 - tailsrv or tssync
    stack.callback(process.wait)
    stack.callback(process.terminate)
    return process


def wait_for(check):
    """Wait until `check()` is true, and return its result; exit after PATIENCE seconds."""
    end = time.monotonic() + PATIENCE
    while not (seen := check()):
        if time.monotonic() > end:
            sys.exit(f"measure.py: a server is not ready after {PATIENCE:g} seconds")
        time.sleep(0.01)
    return seen


def add_relay(stack, folder, upstream):
    """Start a relay of `upstream`, wait until its copy is complete, and return its server."""
    path = folder / f"copy-{time.monotonic_ns()}"
    start(
        stack, [sys.executable, "-m", "tailsrv.client.tssync", f"127.0.0.1:{upstream.port}", path]
    )
    wait_for(lambda: path.exists() and path.stat().st_size == upstream.path.stat().st_size)
    return Server(stack, path)


def connect(server, offset):
    """Connect to `server`, and request the file from `offset` on."""
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE)
    sock.sendall(b"%d\n" % offset)
    return sock


@contextmanager
def tree(size):
    """Start an origin for the `with` statement, whose file has `size` bytes.

    Gives a function that adds a relay of a server, the origin, and its file.
    """
    with ExitStack() as stack, tempfile.TemporaryDirectory(prefix="tailsrv-") as name:
        path = Path(name, "origin")
        path.write_bytes(os.urandom(1 << 20) * (size >> 20))
        file = stack.enter_context(path.open("ab", buffering=0))
        origin = Server(stack, path)
        yield lambda upstream: add_relay(stack, Path(name), upstream), origin, file
        # Stop all programs before their folder is deleted.
        stack.close()


def measure_delay(level):
    """Return the delay of each record in seconds.

    It is measured from the append at the origin to a client that connects through `level` relays.
    """
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
    """Read `count` bytes from each of `socks`, and discard them."""
    left = {sock.fileno(): count for sock in socks}
    by_number = {sock.fileno(): sock for sock in socks}
    poll = select.epoll()
    for number in left:
        poll.register(number, select.EPOLLIN)
    buffer = bytearray(1 << 20)
    while left:
        for number, _ in poll.poll():
            # With MSG_TRUNC the kernel discards the bytes instead of copying them (tcp(7)).
            left[number] -= by_number[number].recv_into(buffer, 0, socket.MSG_TRUNC)
            if left[number] <= 0:
                poll.unregister(number)
                del left[number]
    poll.close()


def measure_replay(count):
    """Measure a replay by CLIENTS clients of `count` relays.

    Returns the bytes per second of all clients together, and the relays' processor time in seconds
    per GiB.
    """
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
    """Measure the delivery of new records to LIVE_CLIENTS clients of `count` relays.

    Returns the processor time of the relays and that of the origin, in seconds per record and
    client.
    """
    with tree(1 << 20) as (add, origin, file):
        relays = [add(origin) for _ in range(count)]
        socks = [connect(relays[number % count], 1 << 20) for number in range(LIVE_CLIENTS)]
        file.write(bytes(RECORD))
        # All clients are connected and caught up when they have received this record.
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
    """Run all measurements, and print tables."""
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
        f"\n| relays | {CLIENTS} clients replay | CPU for a GiB sent |"
        " CPU for a record delivered | of that, at the origin |"
    )
    print("| --- | --- | --- | --- | --- |")
    for index, count in enumerate(RELAYS):
        rate, gib, live, origin = (
            median(one[index][column] for one in fans) for column in range(4)
        )
        print(
            f"| {count} | {rate / (1 << 30):.2f} GiB/s | {gib:.2f} s"
            f" | {(live + origin) * 1e6:.1f} µs | {origin * 1e6:.2f} µs |"
        )


if __name__ == "__main__":
    main()
