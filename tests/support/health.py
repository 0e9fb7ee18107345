"""Running `tailsrv-health`."""

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from support.server import Server
from support.waiting import DEADLINE

HEALTH = (sys.executable, "-W", "error", "-m", "tailsrv.health")


def health(
    *arguments: str,
    wrapper: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    stdout: int = subprocess.PIPE,
) -> "subprocess.CompletedProcess[str]":
    """Run tailsrv-health to its end, and require that it prints no traceback."""
    done = subprocess.run(
        [*wrapper, *HEALTH, *arguments],
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=subprocess.PIPE,
        env={**os.environ, **(env or {})},
        text=True,
        timeout=DEADLINE,
    )
    assert "Traceback" not in done.stderr
    return done


def ask(server: Server, *arguments: str) -> tuple[int, str]:
    """Return the exit status of a check of `server`, and its first line."""
    done = health("-p", str(server.port), *arguments)
    assert done.stderr == ""
    return done.returncode, done.stdout.partition("\n")[0]


def ask_json(server: Server, *arguments: str) -> dict[str, Any]:
    """Return the JSON entry of `server`, which must be the only one on its port."""
    output = json.loads(health("-p", str(server.port), "--format", "json", *arguments).stdout)
    [found] = output["servers"]
    assert isinstance(found, dict)
    return found
