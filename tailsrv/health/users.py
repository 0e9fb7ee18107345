"""Looks users' names up, for no longer than a health check can wait for them."""

import pwd
import threading
from collections.abc import Iterable

# seconds for all names; the user database may be on a server that does not answer
LOOKUP_TIMEOUT = 0.5


def user_names(uids: Iterable[int]) -> dict[int, str]:
    """Return the name of each user in `uids`, for one that has none the number as text.

    Each is looked up once. Where the names take longer than PATIENCE in all, the rest of them are
    numbers, too. getpwuid(3) can wait for minutes and cannot be ended: it is left to a thread.
    """
    names = {uid: str(uid) for uid in uids}
    # The numbers of a machine's own users are lower than those of a directory's: they come first.
    thread = threading.Thread(target=_look_up, args=(names, sorted(names)), daemon=True)
    try:
        thread.start()
    except RuntimeError:
        # no room for a thread
        return names
    thread.join(LOOKUP_TIMEOUT)
    return names.copy()


def _look_up(names: dict[int, str], uids: Iterable[int]) -> None:
    for uid in uids:
        try:
            names[uid] = pwd.getpwuid(uid).pw_name
        except (KeyError, OSError):
            # it has none, or the database cannot be read: the number stays
            pass
