"""Looks up user names, with a time limit that a health check can afford."""

import pwd
import threading
from collections.abc import Iterable

# Seconds for all names together. The user database may be on a server that does not answer.
LOOKUP_TIMEOUT = 0.5


def user_names(uids: Iterable[int]) -> dict[int, str]:
    """Return the name of each user in `uids`, or the number as text if no name is found.

    All look-ups together end after LOOKUP_TIMEOUT seconds.
    """
    names = {uid: str(uid) for uid in uids}
    # getpwuid(3) can block for minutes and cannot be interrupted, so a daemon thread calls it. It
    # looks up the lowest numbers first: these are the machine's local users, whose names need no
    # directory service.
    thread = threading.Thread(target=_look_up, args=(names, sorted(names)), daemon=True)
    try:
        thread.start()
    except RuntimeError:
        # The system cannot start another thread.
        return names
    thread.join(LOOKUP_TIMEOUT)
    return names.copy()


def _look_up(names: dict[int, str], uids: Iterable[int]) -> None:
    for uid in uids:
        try:
            names[uid] = pwd.getpwuid(uid).pw_name
        except (KeyError, OSError):
            # The user has no name, or the database cannot be read. The number stays.
            pass
