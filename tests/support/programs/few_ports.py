"""Leaves the kernel a choice of four ports, and becomes the program in argv[2:].

The ports in argv[1] are first bound on IPv6 only.
"""

import os
import socket
import sys

with open("/proc/sys/net/ipv4/ip_local_port_range", "w") as file:
    file.write("40000 40003")
for port in map(int, sys.argv[1].split()):
    sock = socket.socket(socket.AF_INET6)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
    sock.bind(("::", port))
    sock.set_inheritable(True)
    sock.detach()
os.execvp(sys.argv[2], sys.argv[2:])
