"""Forwards packets between two interfaces with a delay, and drops some of them.

Usage: `lossy_link.py ONE OTHER LOSS SECONDS`. It does what tc-netem(8) does in the kernel, for
kernels that were built without it. It ends at the end of its standard input.
"""

import random
import select
import socket
import sys
import time
from collections import deque
from typing import Any

# From linux/if_packet.h and linux/socket.h.
SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 15, 23
ETH_P_ALL = 3
# A packet that the kernel has not segmented yet has up to 64 KiB, and headers.
LARGEST = 1 << 17
# The maximum number of packets in transit; others are dropped, as by a router.
WAITING = 1 << 15


def attach(interface: str) -> socket.socket:
    """Return a socket that receives and sends the packets of `interface` as the kernel has them.

    Each packet has a header with the work that the kernel leaves to the hardware (segmentation,
    checksums).
    """
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    sock.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    sock.bind((interface, 0))
    return sock


def carry(one: socket.socket, other: socket.socket, loss: float, delay: float) -> None:
    """Forward packets in both directions until standard input ends."""
    to = {one: other, other: one}
    chance = random.Random(1)
    # For each packet: the time when it is due, the socket to send it to, and its bytes.
    under_way: deque[tuple[float, socket.socket, bytes]] = deque()
    while True:
        timeout = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        ready: list[Any] = select.select([*to, sys.stdin], [], [], timeout)[0]
        if sys.stdin in ready:
            return
        for sock in ready:
            packet = sock.recv(LARGEST)
            if chance.random() >= loss and len(under_way) < WAITING:
                under_way.append((time.monotonic() + delay, to[sock], packet))
        while under_way and under_way[0][0] <= time.monotonic():
            _, sock, packet = under_way.popleft()
            sock.send(packet)


if __name__ == "__main__":
    first, second = attach(sys.argv[1]), attach(sys.argv[2])
    print("ready", flush=True)
    carry(first, second, float(sys.argv[3]), float(sys.argv[4]))
