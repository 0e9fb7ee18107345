"""Systems that resemble Linux, but do not tell how much of a stream has been sent."""

from pathlib import Path

# As a sandbox may have TCP_INFO: not at all, short, with a field that is always 0, or one that counts something else.
SYSTEMS = {
    "none": "raise OSError(errno.ENOPROTOOPT, os.strerror(errno.ENOPROTOOPT))",
    "empty": "return b''",
    "short": "return info[:104]",
    "not counted": "return info[:120] + bytes(8)",
    "counted otherwise": "return info[:120] + (10**6).to_bytes(8, sys.byteorder)",
}

HOOK = """
import errno, os, socket, sys
getsockopt = socket.socket.getsockopt
def other(self, level, option, *size):
    info = getsockopt(self, level, option, *size)
    if (level, option) == (socket.IPPROTO_TCP, socket.TCP_INFO):
        {}
    return info
socket.socket.getsockopt = other
"""


def write_hook(folder: Path, system: str) -> None:
    """Make each interpreter that has `folder` in its PYTHONPATH run on that system."""
    (folder / "sitecustomize.py").write_text(HOOK.format(SYSTEMS[system]))
