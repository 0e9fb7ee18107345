"""Imitates a user database that answers for root only, and reports repeated queries."""

import pwd
import sys
import threading

asked, look_up = set[int](), pwd.getpwuid


def getpwuid(uid: int) -> pwd.struct_passwd:
    """Look a user up; for a user other than root, this never returns."""
    if uid in asked:
        sys.stderr.write(f"{uid} was looked up before\n")
    asked.add(uid)
    if uid:
        threading.Event().wait()
    return look_up(uid)


pwd.getpwuid = getpwuid
