"""Carries packets between two network interfaces, with a delay, and loses some: `lossy_link.py ONE OTHER LOSS SECONDS`.

It is what tc-netem(8) does in the kernel, for kernels that have been built without it. It ends with its standard input.
"""

import random
import select
import socket
import sys
import time
from collections import deque
from typing import Any

# linux/if_packet.h, linux/socket.h
SOL_PACKET, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 263, 15, 23
ETH_P_ALL = 3
# a packet that the kernel has yet to cut into segments has 64 KiB, and headers
LARGEST = 1 << 17
# packets; what is more finds the queue full, as with a router
WAITING = 1 << 15


def attach(interface: str) -> socket.socket:
    """Return a socket that receives and sends the packets of `interface` as the kernel has them.

    They come with the header in which the kernel says what it has left for the hardware to do (segments, checksums).
    """
    sock = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    sock.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    sock.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    sock.bind((interface, 0))
    return sock


def carry(one: socket.socket, other: socket.socket, loss: float, delay: float) -> None:
    """Carry packets both ways until standard input ends."""
    to = {one: other, other: one}
    chance = random.Random(1)
    # when it is due, where to, what
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
