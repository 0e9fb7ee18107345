"""Looks a name up where no thread can be had; prints whether there is a result, and how many threads there are."""

import threading

from tailsrv.client.name_lookup import Lookup

threading.stack_size(1 << 50)
lookup = Lookup("localhost", 1)
print(bool(lookup.result()), threading.active_count())
