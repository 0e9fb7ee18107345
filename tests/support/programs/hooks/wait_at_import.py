"""Makes the program wait for the named pipe $TAILSRV_TEST_GATE before it imports its modules."""

import builtins
import os
from typing import Any

original = builtins.__import__


def importing(name: str, *arguments: Any, **more: Any) -> Any:
    """Import a module; before `tailsrv.main`, wait for the test."""
    if name == "tailsrv.main":
        builtins.__import__ = original
        with open(os.environ["TAILSRV_TEST_GATE"]) as gate:
            gate.read()
    return original(name, *arguments, **more)


builtins.__import__ = importing
