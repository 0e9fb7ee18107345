"""Raises the soft limit for descriptors to the hard limit."""

import resource

from tailsrv.linux.process import raise_descriptor_limit

resource.setrlimit(resource.RLIMIT_NOFILE, (100, 200))
assert raise_descriptor_limit() == 200
assert resource.getrlimit(resource.RLIMIT_NOFILE) == (200, 200)
assert raise_descriptor_limit() == 200
