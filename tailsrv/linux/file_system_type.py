"""Finds out from a file's file system whether inotify(7) reports every change to the file.

The type of the file system is looked up in /proc/self/mountinfo. If the mount is not listed there,
fstatfs(2) gives the type as a number instead.
"""

import ctypes
import sys
from pathlib import Path

# File systems whose files change only through this kernel, so that inotify(7) reports every write.
# On all others (NFS, SMB, FUSE, ...) another host or a daemon may append, and the kernel does not
# report that. The keys are the names in /proc/self/mountinfo, the values are f_type of statfs(2).
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
    """Return whether only this kernel can change the open `file`.

    If so, inotify reports every change, and device and inode number together identify a file.
    """
    return why_poll(file) is None


def why_poll(file: int) -> str | None:
    """Return why inotify may not report every append to the open `file`, or None if it does."""
    if (name := _mounted_type(file)) is not None:
        return (
            None
            if name in LOCAL_FILE_SYSTEMS
            else f"inotify does not report every change on {name}"
        )
    # In a chroot, or without /proc, the mount cannot be looked up. The file system may be local or
    # not, so ask for the number of its type.
    if (number := _type_number(file)) in LOCAL_FILE_SYSTEMS.values():
        return None
    kind = "of unknown type" if number is None else f"of type {number:#x} (see statfs(2))"
    return (
        "inotify may not report every change: the mount is not in /proc/self/mountinfo, "
        f"and the file system is {kind}"
    )


def _mounted_type(file: int) -> str | None:
    """Return the type of the open file's mount, or None if /proc does not list the mount."""
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
    """Return f_type of fstatfs(2) for the open `file`, or None if the call fails or is missing.

    Python's `os` module has statvfs(3), which does not give the type.
    """
    # struct statfs has about 120 bytes. f_type is its first field.
    status = ctypes.create_string_buffer(512)
    try:
        if ctypes.CDLL(None).fstatfs(file, status) != 0:
            return None
    except (AttributeError, OSError):
        # This C library does not have the function, or the interpreter is linked statically.
        return None
    number = int.from_bytes(status.raw[: ctypes.sizeof(ctypes.c_long)], sys.byteorder)
    return number & 0xFFFFFFFF
