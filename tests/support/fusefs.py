"""A FUSE file system of one file that misbehaves as ordered: a wrapper for the command behind it.

`fusefs.py FOLDER COMMAND...` mounts it on FOLDER/mnt, where `file.log` is then, and becomes the
command. FOLDER/orders (JSON) says how it behaves and is read at every request:

- `node`: which file it is. Its contents are those of FOLDER/content-NODE; without those there is
  no such name.
- `unstable`: each answer has another inode number.
- `fail`: {OPERATION: [ERROR, SKIP, TIMES]}: after SKIP calls, so many fail. They are counted from
  when the orders were given. "GETATTR AFTER OPEN" is an operation of its own: fstat(2) behind open(2).

FOLDER/pid has the pid of the daemon, which dies with the command.
"""

import ctypes
import errno
import json
import os
import shutil
import signal
import struct
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# prctl(2)
PR_SET_PDEATHSIG = 1
NAME = b"file.log"

# The operations of linux/fuse.h that this needs; all others get ENOSYS, or nothing where the kernel
# expects no answer.
OPERATIONS = {
    1: "LOOKUP", 3: "GETATTR", 14: "OPEN", 15: "READ", 16: "WRITE", 17: "STATFS", 18: "RELEASE", 20: "FSYNC", 25: "FLUSH", 26: "INIT",
    27: "OPENDIR", 29: "RELEASEDIR", 34: "ACCESS",
}  # fmt: skip
# FORGET, INTERRUPT, BATCH_FORGET
UNANSWERED = (2, 36, 42)


class FileSystem:
    """Answers the kernel's requests, protocol 7.31. The kernel is to remember nothing: each call asks."""

    def __init__(self, device: int, folder: Path) -> None:
        self.device, self.folder = device, folder
        self.orders: dict[str, Any] = {}
        # which orders these are
        self.given = 0
        self.calls: Counter[str] = Counter()
        self.number = 1000
        self.last = ""

    def run(self) -> None:
        """Answer until the file system is no longer mounted."""
        while True:
            try:
                request = os.read(self.device, 1 << 18)
            except OSError as error:
                if error.errno in (errno.EINTR, errno.ENOENT):
                    continue
                return
            _, code, unique, node = struct.unpack_from("=IIQQ", request)
            if code in UNANSWERED:
                continue
            answer = self.answer(OPERATIONS.get(code, ""), node, request[40:])
            failed, data = (0, answer) if isinstance(answer, bytes) else (-answer, b"")
            try:
                os.write(self.device, struct.pack("=IiQ", 16 + len(data), failed, unique) + data)
            except FileNotFoundError:
                # whoever asked has been interrupted
                pass

    def read_orders(self) -> None:
        status = (self.folder / "orders").stat()
        if status.st_ino != self.given:
            self.given, self.orders = (
                status.st_ino,
                json.loads((self.folder / "orders").read_bytes()),
            )
            self.calls.clear()

    def fault(self, operation: str) -> int:
        """Return the error with which this call is to fail, 0 if it is not to."""
        self.read_orders()
        if operation == "GETATTR" and self.last == "OPEN":
            operation = "GETATTR AFTER OPEN"
        self.last = operation
        name, skip, times = self.orders.get("fail", {}).get(operation, ("", 0, 0))
        self.calls[operation] += 1
        return getattr(errno, name) if name and skip < self.calls[operation] <= skip + times else 0

    def content(self, node: int) -> Path:
        return self.folder / f"content-{node}"

    def attributes(self, node: int) -> bytes:
        self.number += 1
        size = 0 if node == 1 else self.content(node).stat().st_size
        number = self.number if self.orders.get("unstable") and node != 1 else node
        mode = 0o040755 if node == 1 else 0o100644
        return struct.pack(
            "=QQQQQQIIIIIIIIII", number, size, 1, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0
        )

    def answer(self, operation: str, node: int, body: bytes) -> bytes | int:
        """Return what to answer, or an error."""
        if failed := self.fault(operation):
            return failed
        match operation:
            case "INIT":
                return struct.pack("=IIIIHHIIHHI28x", 7, 31, 65536, 0, 12, 10, 65536, 1, 0, 0, 0)
            case "LOOKUP":
                found = int(self.orders["node"])
                if body.rstrip(b"\0") != NAME or not self.content(found).exists():
                    return errno.ENOENT
                return struct.pack("=QQQQII", found, 1, 0, 0, 0, 0) + self.attributes(found)
            case "GETATTR":
                return struct.pack("=QII", 0, 0, 0) + self.attributes(node)
            case "OPEN" | "OPENDIR":
                return struct.pack("=QII", 1, 0, 0)
            case "READ":
                offset, size = struct.unpack_from("=QI", body, 8)
                return self.content(node).read_bytes()[offset : offset + size]
            case "STATFS":
                return struct.pack(
                    "=QQQQQIIII24x", 1000, 1000, 1000, 1000, 1000, 4096, 255, 4096, 0
                )
            case "RELEASE" | "FLUSH" | "RELEASEDIR" | "ACCESS" | "FSYNC":
                return b""
        return errno.ENOSYS


def mount(folder: Path) -> int:
    """Mount the file system of `folder`, and return the device that its requests come from."""
    device = os.open("/dev/fuse", os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}".encode()
    if libc.mount(b"odd", bytes(folder / "mnt"), b"fuse.odd", 0, options) != 0:
        raise OSError(ctypes.get_errno(), "mount")
    return device


def start_daemon(device: int, folder: Path) -> None:
    """Fork the daemon, in a session of its own. The kernel ends it when this process ends."""
    parent = os.getpid()
    if os.fork() == 0:
        os.setsid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        null = os.open(os.devnull, os.O_RDWR)
        # nobody is to wait for what we might say
        for standard in range(3):
            os.dup2(null, standard)
        (folder / "pid").write_text(str(os.getpid()))
        try:
            # else it has ended before the kernel knew what to do then
            if os.getppid() == parent:
                FileSystem(device, folder).run()
        finally:
            os._exit(0)
    os.close(device)


def main(arguments: Sequence[str]) -> None:
    """Mount, fork the daemon and become the command."""
    folder = Path(arguments[0])
    start_daemon(mount(folder), folder)
    os.execv(shutil.which(arguments[1]) or arguments[1], list(arguments[1:]))


class Fuse:
    """The test's end: the file system of a folder, in the mount namespace of what `wrapper` starts.

    It is `fresh` where nobody has mounted it yet.
    """

    def __init__(self, folder: Path, fresh: bool = True) -> None:
        self.folder, self.path = folder, folder / "mnt" / NAME.decode()
        self.orders: dict[str, Any] = {"node": 2}
        if fresh:
            (folder / "mnt").mkdir(parents=True)
            self.order()
        user = () if os.geteuid() == 0 else ("--user", "--map-root-user")
        self.wrapper = ("unshare", *user, "--mount", sys.executable, __file__, str(folder))

    def order(self, **orders: Any) -> None:
        """Change how it behaves."""
        self.orders |= orders
        fresh = self.folder / "orders.new"
        fresh.write_text(json.dumps(self.orders))
        fresh.rename(self.folder / "orders")

    def write(self, data: bytes, node: int = 2) -> None:
        """Set the contents of a file."""
        fresh = self.folder / "content.new"
        fresh.write_bytes(data)
        fresh.rename(self.folder / f"content-{node}")

    def kill(self) -> None:
        """Kill the daemon: nothing that is open on its file system ever answers again."""
        os.kill(int((self.folder / "pid").read_text()), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
