"""Which file system an open file is on, and whether inotify(7) reports every change there."""

import ctypes
import sys
from pathlib import Path

# File systems whose files change only through this kernel, so that inotify(7) reports every write.
# On all others (NFS, SMB, FUSE, ...) another host or a daemon may append, and nothing reports that.
# Each name, as in /proc/self/mountinfo, has the f_type of statfs(2) beside it.
LOCAL_FILE_SYSTEMS = {
    "bcachefs": 0xCA451A4E,
    "btrfs": 0x9123683E,
    "erofs": 0xE0F5E1E2,
    "exfat": 0x2011BAB0,
    "ext2": 0xEF53,
    "ext3": 0xEF53,
    "ext4": 0xEF53,
    "f2fs": 0xF2F52010,
    "jfs": 0x3153464A,
    "msdos": 0x4D44,
    "nilfs2": 0x3434,
    "ntfs3": 0x7366746E,
    "overlay": 0x794C7630,
    "ramfs": 0x858458F6,
    "reiserfs": 0x52654973,
    "tmpfs": 0x01021994,
    "udf": 0x15013346,
    "vfat": 0x4D44,
    "xfs": 0x58465342,
    "zfs": 0x2FC12FC1,
}


def is_local(file: int) -> bool:
    """Tell whether only this kernel can change the open `file`: then inotify reports all of it.

    On such a file system device and inode number tell one file from another, too.
    """
    return why_poll(file) is None


def why_poll(file: int) -> str | None:
    """Return why inotify may not report every append to the open `file`, None if it does."""
    if (name := _mounted_type(file)) is not None:
        return (
            None
            if name in LOCAL_FILE_SYSTEMS
            else f"inotify does not report every change on {name}"
        )
    # In a chroot, or without /proc, the mount cannot be looked up; that is no sign of a local disk.
    if (number := _type_number(file)) in LOCAL_FILE_SYSTEMS.values():
        return None
    kind = "of unknown type" if number is None else f"of type {number:#x}, see statfs(2)"
    return f"inotify may not report every change: its mount is not in /proc/self/mountinfo, the file system is {kind}"


def _mounted_type(file: int) -> str | None:
    """Return the type of the mount that the open `file` is on, None where /proc does not list it."""
    try:
        info = dict(
            line.split(":\t", 1)
            for line in Path(f"/proc/self/fdinfo/{file}").read_text().splitlines()
            if ":\t" in line
        )
        mounts = Path("/proc/self/mountinfo").read_text(errors="surrogateescape").splitlines()
    except OSError:
        return None
    for mount in mounts:
        if mount.split(" ", 1)[0] == info.get("mnt_id", "").strip():
            return mount.partition(" - ")[2].split(" ", 1)[0]
    return None


def _type_number(file: int) -> int | None:
    """Return f_type of fstatfs(2), which Python's os does not have, None where it cannot be had."""
    # struct statfs has about 120 bytes; f_type is the first field
    status = ctypes.create_string_buffer(512)
    try:
        if ctypes.CDLL(None).fstatfs(file, status) != 0:
            return None
    except (AttributeError, OSError):
        # no such function in this C library
        return None
    number = int.from_bytes(status.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder)
    return number & 0xFFFFFFFF
