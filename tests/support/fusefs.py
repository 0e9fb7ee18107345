"""A FUSE file system of one file that misbehaves as ordered; it wraps another command.

`fusefs.py FOLDER COMMAND...` mounts the file system on FOLDER/mnt, which then contains `file.log`,
and becomes the command. FOLDER/orders (JSON) is read at every request and describes the behaviour:

- `node`: the file to show. Its contents are those of FOLDER/content-NODE; if that does not exist,
  the name does not exist.
- `unstable`: each answer has another inode number.
- `fail`: {OPERATION: [ERROR, SKIP, TIMES]}: after SKIP calls, TIMES calls fail, counted from the
  time when the orders were written. "GETATTR AFTER OPEN" is a separate operation: fstat(2) after
  open(2).

FOLDER/pid contains the pid of the daemon, which dies with the command.
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

# From prctl(2).
PR_SET_PDEATHSIG = 1
NAME = b"file.log"

# The operations of linux/fuse.h that are needed. All others get ENOSYS, or no answer where the
# kernel expects none.
OPERATIONS = {
    1: "LOOKUP",
    3: "GETATTR",
    14: "OPEN",
    15: "READ",
    16: "WRITE",
    17: "STATFS",
    18: "RELEASE",
    20: "FSYNC",
    25: "FLUSH",
    26: "INIT",
    27: "OPENDIR",
    28: "READDIR",
    29: "RELEASEDIR",
    34: "ACCESS",
}
# FORGET, INTERRUPT and BATCH_FORGET have no answer.
UNANSWERED = (2, 36, 42)


class FileSystem:
    """Answers the kernel's requests, protocol 7.31.

    The kernel must not cache anything, so that each system call is a request.
    """

    def __init__(self, device: int, folder: Path) -> None:
        self.device, self.folder = device, folder
        self.orders: dict[str, Any] = {}
        # When the current orders were written.
        self.given = 0
        self.calls: Counter[str] = Counter()
        self.number = 1000
        self.last = ""

    def run(self) -> None:
        """Answer until the file system is unmounted."""
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
                # The calling process has been interrupted.
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
        """Return the error with which this call must fail, 0 if it must succeed."""
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
        """Return the answer to a request, or an error number."""
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
            # A listing is empty: names are looked up all the same.
            case "READDIR" | "RELEASE" | "FLUSH" | "RELEASEDIR" | "ACCESS" | "FSYNC":
                return b""
        return errno.ENOSYS


def mount(folder: Path) -> int:
    """Mount the file system of `folder`, and return the device from which its requests are read."""
    device = os.open("/dev/fuse", os.O_RDWR)
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"fd={device},rootmode=40000,user_id={os.getuid()},group_id={os.getgid()}".encode()
    if libc.mount(b"odd", bytes(folder / "mnt"), b"fuse.odd", 0, options) != 0:
        raise OSError(ctypes.get_errno(), "mount")
    return device


def start_daemon(device: int, folder: Path) -> None:
    """Fork the daemon in its own session. The kernel ends it when this process ends."""
    parent = os.getpid()
    if os.fork() == 0:
        os.setsid()
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        null = os.open(os.devnull, os.O_RDWR)
        # A test that reads to the end of our output must not wait for the daemon.
        for standard in range(3):
            os.dup2(null, standard)
        (folder / "pid").write_text(str(os.getpid()))
        try:
            # Otherwise the parent ended before prctl(2) took effect.
            if os.getppid() == parent:
                FileSystem(device, folder).run()
        finally:
            os._exit(0)
    os.close(device)


def main(arguments: Sequence[str]) -> None:
    """Mount the file system, fork the daemon and become the command."""
    folder = Path(arguments[0])
    start_daemon(mount(folder), folder)
    os.execv(shutil.which(arguments[1]) or arguments[1], list(arguments[1:]))


class Fuse:
    """The test's end: the file system of a folder, in the mount namespace of the wrapped program.

    `fresh` says that it has not been mounted yet.
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
        """Write new orders for the file system."""
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
        """Kill the daemon: calls for files that are open on its file system then get no answer."""
        os.kill(int((self.folder / "pid").read_text()), signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
