"""The tools that tests use where they are installed, and the Debian packages that have them; run, it prints what root would install.

Nothing but the standard library is imported: .ci/run asks before there is an environment.
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
# Only root can do what these are for.
PACKAGES_FOR_ROOT = {
    "debootstrap": "debootstrap",
    "haproxy": "haproxy",
    "ip": "iproute2",
    "nsenter": "util-linux",
    "systemd-nspawn": "systemd-container",
}
NOT_INSTALLED = "not installed: "


def missing(*tools: str) -> str:
    """Return the reason to skip what needs `tools`, empty if all of them are installed."""
    absent = [tool for tool in tools if shutil.which(tool) is None]
    return NOT_INSTALLED + ", ".join(absent) if absent else ""


def packages(*tools: str) -> list[str]:
    """Return the packages that have `tools`, sorted; a tool that is not known here is taken for a package."""
    known = {**PACKAGES, **PACKAGES_FOR_ROOT}
    return sorted({package for tool in tools for package in known.get(tool, tool).split()})


if __name__ == "__main__":
    tools = [*PACKAGES, *(PACKAGES_FOR_ROOT if "--root" in sys.argv else ())]
    print(*(packages(*tools) if "--packages" in sys.argv else tools))
