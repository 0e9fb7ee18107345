"""Looks a name up while no descriptor is available; prints the error and the descriptor to poll."""

import resource

from tailsrv.client.name_lookup import Lookup

resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
lookup = Lookup("localhost", 1)
try:
    lookup.result()
except OSError as error:
    print(error.strerror, lookup.fileno())
