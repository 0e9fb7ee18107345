"""Says what an operator can do about it, where the kernel's own words leave that open."""

import errno
import os
import stat

from tailsrv.linux.systemd import is_service

# What ProtectHome= and PrivateTmp= of systemd.exec(5) hide from a service. DynamicUser= has a private /tmp whatever PrivateTmp= says.
_HOMES, _TEMPORARY = ("/home", "/root", "/run/user"), ("/tmp", "/var/tmp")  # noqa: S108


def absolute(path: str) -> str:
    """Return `path` as somebody who works in another folder would have to write it."""
    try:
        return os.path.abspath(path)
    except OSError:
        # our own folder is gone, or getcwd(2) fails in another way
        return path


def cannot_bind(error: OSError, port: int) -> str:
    """Return why a port cannot be listened on, and what to change."""
    reason = os.strerror(error.errno or 0)
    if error.errno == errno.EADDRINUSE and port == 0:
        return f"{reason}; no port of net.ipv4.ip_local_port_range is free"
    if error.errno == errno.EADDRINUSE:
        return f"{reason}; choose another port, or see who has this one: ss -tanp sport = :{port}{_taken_by_connection(port)}"
    if error.errno == errno.EACCES and port < 1024:
        return f"{reason}; choose a port above 1023, or let systemd listen for the service (tailsrv@.socket)"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{reason}; no interface of this machine has it: ip addr"
    return reason


def _taken_by_connection(port: int) -> str:
    """Return that an outgoing connection may have this port, empty if the kernel does not give it to any."""
    try:
        with open("/proc/sys/net/ipv4/ip_local_port_range") as file:
            first, last = map(int, file.read().split())
    except (OSError, ValueError):
        return ""
    if not first <= port <= last:
        return ""
    return f"; it may be a connection, as the port lies in net.ipv4.ip_local_port_range ({first} to {last})"


def cannot_open(path: str, error: OSError) -> str:
    """Return why the file cannot be opened, and what to change."""
    reason = os.strerror(error.errno or 0)
    if error.errno not in (errno.EACCES, errno.EPERM):
        return reason
    if sandbox := _sandbox(path):
        return f"{reason}; if users can read it: {sandbox}"
    return f"{reason}; {_permissions(path)}, and we are {_ourselves()}: chmod or chgrp it, or give the service a group that may read it"


def cannot_see(path: str) -> str | None:
    """Return why a file may look as if it did not exist, None if there is no reason to think so."""
    if sandbox := _sandbox(path):
        return f"if it exists: {sandbox}"
    folder = os.path.dirname(absolute(path))
    return None if os.path.exists(folder) else f"there is no folder {folder}"


def _sandbox(path: str) -> str | None:
    """Return which setting of a systemd service hides `path` from it, None if none is known to."""
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
            return f"the service cannot see it in {folder}, set {setting} (systemctl edit) or move the file"
    return None


def _permissions(path: str) -> str:
    """Return who may read `path`, or which folder keeps even that from us."""
    try:
        status = os.stat(path)
    except OSError:
        folder = os.path.dirname(absolute(path))
        while folder not in ("/", "") and not _is_reachable(folder):
            path, folder = folder, os.path.dirname(folder)
        return (
            f"{folder} may not be entered"
            if not os.access(folder, os.X_OK)
            else f"{path} may not be looked at"
        )
    # Numbers, no names: a user database that is slow or down (LDAP) would stop the supervisor's loop.
    return f"it has mode {stat.S_IMODE(status.st_mode):04o}, user {status.st_uid} and group {status.st_gid}"


def _is_reachable(folder: str) -> bool:
    try:
        os.stat(folder)
    except OSError:
        return False
    return True


def _ourselves() -> str:
    groups = sorted({os.getegid(), *os.getgroups()})
    return f"user {os.geteuid()} with groups {','.join(map(str, groups))}"
