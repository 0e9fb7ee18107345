"""The user database does not answer but for root; it complains when it is asked for a user again."""

import pwd
import sys
import threading

asked, look_up = set[int](), pwd.getpwuid


def getpwuid(uid: int) -> pwd.struct_passwd:
    """Look a user up, for ever if it is not root."""
    if uid in asked:
        sys.stderr.write(f"{uid} was looked up before\n")
    asked.add(uid)
    if uid:
        threading.Event().wait()
    return look_up(uid)


pwd.getpwuid = getpwuid
