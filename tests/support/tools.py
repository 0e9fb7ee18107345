"""The tools that tests use if they are installed, and the Debian packages that contain them.

As a program, it prints the tools or, with --packages, the packages. Only the standard library is
imported, because .ci/run calls it before an environment exists.
"""

import shutil
import sys

PACKAGES = {
    "busybox": "busybox",
    "cc": "gcc libc6-dev",
    "logrotate": "logrotate",
    "mandoc": "mandoc",
    "nc.openbsd": "netcat-openbsd",
    "nc.traditional": "netcat-traditional",
    "ncat": "ncat",
    "prlimit": "util-linux",
    "rsync": "rsync",
    "setpriv": "util-linux",
    "socat": "socat",
    "strace": "strace",
    "unshare": "util-linux",
    "zsh": "zsh",
}
# Only root can use these tools.
PACKAGES_FOR_ROOT = {
    "debootstrap": "debootstrap",
    "haproxy": "haproxy",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "systemd-nspawn": "systemd-container",
}
NOT_INSTALLED = "not installed: "


def missing(*tools: str) -> str:
    """Return the reason to skip a test that needs `tools`, empty if all of them are installed."""
    absent = [tool for tool in tools if shutil.which(tool) is None]
    return NOT_INSTALLED + ", ".join(absent) if absent else ""


def packages(*tools: str) -> list[str]:
    """Return the packages that contain `tools`, sorted; an unknown tool counts as a package."""
    known = {**PACKAGES, **PACKAGES_FOR_ROOT}
    return sorted({package for tool in tools for package in known.get(tool, tool).split()})


if __name__ == "__main__":
    tools = [*PACKAGES, *(PACKAGES_FOR_ROOT if "--root" in sys.argv else ())]
    print(*(packages(*tools) if "--packages" in sys.argv else tools))
