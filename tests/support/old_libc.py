"""What an interpreter built against glibc 2.17 (Linux 3.10) or musl 1.2.2 lacks.

`take_away` removes all of it from the interpreters of a test.
"""

import ast
import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

from support.hooks import install_hook

# By module: the names that are missing in the headers of at least one of the two libraries, among
# those that any version of Python has.
LACKING = {
    "os": r"memfd_create|MFD_\w+|RWF_\w+|copy_file_range|pidfd_open|PIDFD_\w+|P_PIDFD|getrandom"
    r"|GRND_\w+|statx|STATX_\w+|O_TMPFILE"
    r"|POSIX_SPAWN_CLOSEFROM|CLONE_NEW(CGROUP|TIME)|SCHED_DEADLINE|SCHED_NORMAL|EFD_\w+"
    r"|eventfd\w*|TFD_\w+|timerfd_\w+"
    r"|posix_openpt|login_tty",
    "socket": r"TCP_(?!CONGESTION|CORK|DEFER_ACCEPT|INFO|KEEPCNT|KEEPIDLE|KEEPINTVL|LINGER2"
    r"|MAXSEG|NODELAY|QUICKACK|SYNCNT"
    r"|USER_TIMEOUT|WINDOW_CLAMP)\w+|IPPROTO_MPTCP|SO_(DOMAIN|PROTOCOL|INCOMING_\w+|BUSY_POLL\w*"
    r"|PREFER_BUSY\w+|COOKIE|TXTIME"
    r"|MAX_PACING_RATE|ZEROCOPY|PEERGROUPS|PEERPIDFD|PASSPIDFD|RTABLE|USER_COOKIE|J1939\w+"
    r"|VM_SOCKETS\w+)|MSG_(FASTOPEN|ZEROCOPY)"
    r"|IP_BIND_ADDRESS_NO_PORT|IP_RECVERR|IPV6_RECVERR|IP_RECVTTL|IPV6_DONTFRAG|AF_(VSOCK|QIPCRTR"
    r"|ALG|HYPERV)",
    "select": r"EPOLLEXCLUSIVE|EPOLLWAKEUP",
    "signal": r"pidfd_send_signal",
    "fcntl": r"F_OFD_\w+|F_ADD_SEALS|F_GET_SEALS|F_SEAL_\w+|F_(GET|SET)_\w*RW_HINT|F_DUPFD_QUERY"
    r"|FICLONE\w*|RWH_\w+",
    "mmap": r"MADV_(FREE|COLD|PAGEOUT|COLLAPSE|POPULATE\w+|WIPEONFORK|KEEPONFORK)"
    r"|MAP_(FIXED_NOREPLACE|SYNC|SHARED_VALIDATE|DROPPABLE)",
    "time": r"CLOCK_TAI",
    "resource": r"RLIMIT_KQUEUES",
    "termios": r"TIOCGPTPEER|EXTPROC",
}

# Functions that the C library itself may lack if it is as old as the one at build time.
FUNCTIONS = ("memfd_create", "preadv64v2")


def hidden() -> dict[str, list[str]]:
    """Return the names, by module, that this interpreter has and an old one does not have."""
    return {
        module: [name for name in dir(importlib.import_module(module)) if lacks(module, name)]
        for module in LACKING
    }


def lacks(module: str, name: str) -> bool:
    """Tell whether an interpreter may lack this name."""
    return module in LACKING and re.fullmatch(LACKING[module], name) is not None


def take_away(folder: Path, functions: tuple[str, ...] = ()) -> None:
    """Hide the names, and C functions, from interpreters with `folder` in their PYTHONPATH."""
    install_hook(folder, "old_libc")
    (folder / "lacking.json").write_text(json.dumps({"names": hidden(), "functions": functions}))


def uses(source: str) -> Iterator[tuple[int, str]]:
    """Yield line and name of each use, in a Python program, of a name that may be missing."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(value=ast.Name(id=module), attr=name) if lacks(module, name):
                yield node.lineno, f"{module}.{name}"
            case ast.ImportFrom(module=str(module), names=names):
                yield from (
                    (node.lineno, f"{module}.{alias.name}")
                    for alias in names
                    if lacks(module, alias.name)
                )
            case ast.Call(
                func=ast.Name(id="getattr"),
                args=[ast.Name(id=module), ast.Constant(value=str(name)), *_],
            ) if lacks(module, name):
                yield node.lineno, f"{module}.{name}"
            case ast.Call(func=ast.Attribute(attr="preadv" | "pwritev"), args=[_, _, _, _, *_]):
                yield node.lineno, "os.preadv with flags"
