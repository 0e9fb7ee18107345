"""Looks a name up where no descriptor can be had; prints the error, and what there is to wait for."""

import resource

from tailsrv.client.name_lookup import Lookup

resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
lookup = Lookup("localhost", 1)
try:
    lookup.result()
except OSError as error:
    print(error.strerror, lookup.fileno())
