"""Removes the names and the C library's functions that `lacking.json` in this folder lists."""

import ctypes
import importlib
import json
import os
from typing import Any

with open(os.path.join(os.path.dirname(__file__), "lacking.json")) as file:
    lacking = json.load(file)
for module, names in lacking["names"].items():
    for candidate in (module, "_" + module, {"os": "posix"}.get(module, module)):
        try:
            found = importlib.import_module(candidate)
        except ImportError:
            continue
        for name in names:
            if hasattr(found, name):
                delattr(found, name)

preadv = os.preadv


def without_flags(fd: int, buffers: Any, offset: int, flags: int = 0, /) -> int:
    """Call the original function, which does not get flags."""
    if flags:
        raise NotImplementedError("preadv2() is not available on this platform")
    return preadv(fd, buffers, offset)


class CDLL(ctypes.CDLL):
    """A library that lacks functions."""

    def __getitem__(self, name_or_ordinal: Any) -> Any:
        if name_or_ordinal in lacking["functions"]:
            raise AttributeError(name_or_ordinal)
        return super().__getitem__(name_or_ordinal)


os.preadv = without_flags
ctypes.CDLL = CDLL  # type: ignore[misc]
