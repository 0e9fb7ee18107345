"""Occupies those standard descriptors that are closed."""

import os

from tailsrv.linux.process import occupy_standard_descriptors

free = os.dup(2)
os.close(free)
os.close(0)
occupy_standard_descriptors()
assert os.readlink("/proc/self/fd/0") == os.devnull
assert os.dup(2) == free
