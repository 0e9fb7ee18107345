"""Turns errors of the operating system into messages that tell the operator what to change.

The messages are one line each: the kernel's own words first, then what to do where that is known.
"""

import errno
import os
import stat

from tailsrv.linux.systemd import is_service

# The folders that ProtectHome= and PrivateTmp= (systemd.exec(5)) hide from a service. A service
# with DynamicUser= has a private /tmp whatever PrivateTmp= says.
_HOMES, _TEMPORARY = ("/home", "/root", "/run/user"), ("/tmp", "/var/tmp")  # noqa: S108


def absolute(path: str) -> str:
    """Return `path` as an absolute path, or unchanged if the working directory is unknown."""
    try:
        return os.path.abspath(path)
    except OSError:
        # The working directory has been deleted, or getcwd(2) fails for another reason.
        return path


def cannot_bind(error: OSError, port: int) -> str:
    """Explain why bind(2) or listen(2) failed for `port`, and what to change."""
    reason = os.strerror(error.errno or 0)
    if error.errno == errno.EADDRINUSE and port == 0:
        return f"{reason}; no port of net.ipv4.ip_local_port_range is free"
    if error.errno == errno.EADDRINUSE:
        return (
            f"{reason}; choose another port, or find the process that uses this one:"
            f" sudo ss -tanp sport = :{port}{_taken_by_connection(port)}"
        )
    if error.errno == errno.EACCES and port < 1024:
        return (
            f"{reason}; choose a port above 1023,"
            " or let systemd listen for the service (tailsrv@.socket)"
        )
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{reason}; no interface of this machine has this address (see: ip addr)"
    return reason


def _taken_by_connection(port: int) -> str:
    """Return a note that an outgoing connection may use `port`.

    The note is empty if the kernel does not give this port to outgoing connections.
    """
    try:
        with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
            first, last = map(int, file.read().split())
    except (OSError, ValueError):
        return ""
    if not first <= port <= last:
        return ""
    return (
        "; an outgoing connection may use it,"
        f" as the port is in net.ipv4.ip_local_port_range ({first} to {last})"
    )


def cannot_open(path: str, error: OSError) -> str:
    """Explain why `path` cannot be opened, and what to change."""
    reason = os.strerror(error.errno or 0)
    if error.errno not in (errno.EACCES, errno.EPERM):
        return reason
    if sandbox := _sandbox(path):
        return f"{reason}; if users can read it: {sandbox}"
    return (
        f"{reason}; {_permissions(path)}, and tailsrv runs as {_own_credentials()}:"
        " use chmod or chgrp, or give the service a group that may read the file"
    )


def cannot_see(path: str) -> str | None:
    """Explain why the file `path` may seem not to exist; return None if no reason is known."""
    if sandbox := _sandbox(path):
        return f"if it exists: {sandbox}"
    folder = os.path.dirname(absolute(path))
    return None if os.path.exists(folder) else f"there is no folder {folder}"


def _sandbox(path: str) -> str | None:
    """Name the setting of the systemd service that hides `path` from it; None if none does."""
    if not is_service():
        return None
    path = absolute(path)
    for folder in (*_HOMES, *_TEMPORARY):
        if path.startswith(folder + "/"):
            setting = (
                "ProtectHome=read-only"
                if folder in _HOMES
                else f"BindReadOnlyPaths={os.path.dirname(path)}"
            )
            return (
                f"the service cannot see files in {folder},"
                f" set {setting} (systemctl edit) or move the file"
            )
    return None


def _permissions(path: str) -> str:
    """Describe the permissions of `path`.

    If this process cannot read them, name the folder or file that it has no access to.
    """
    try:
        status = os.stat(path)
    except OSError:
        folder = os.path.dirname(absolute(path))
        while folder not in ("/", "") and not _is_reachable(folder):
            path, folder = folder, os.path.dirname(folder)
        return (
            f"{folder} may not be entered"
            if not os.access(folder, os.X_OK)
            else f"{path} may not be examined"
        )
    # Numbers instead of names: a look-up in a user database that is slow or down (LDAP) would block
    # the supervisor's loop.
    return (
        f"it has mode {stat.S_IMODE(status.st_mode):04o},"
        f" user {status.st_uid} and group {status.st_gid}"
    )


def _is_reachable(folder: str) -> bool:
    try:
        os.stat(folder)
    except OSError:
        return False
    return True


def _own_credentials() -> str:
    groups = sorted({os.getegid(), *os.getgroups()})
    return f"user {os.geteuid()} with groups {','.join(map(str, groups))}"
