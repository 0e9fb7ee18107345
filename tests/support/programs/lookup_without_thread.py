"""Looks a name up where no thread can be started.

Prints whether there is a result, and the number of threads.
"""

import threading

from tailsrv.client.name_lookup import Lookup

threading.stack_size(1 << 50)
lookup = Lookup("localhost", 1)
print(bool(lookup.result()), threading.active_count())
