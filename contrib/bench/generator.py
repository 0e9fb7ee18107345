"""Compiles the load generator, load.c, and runs it: connect clients, start, read the results."""

import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

SOURCE = Path(__file__).with_name("load.c")
COMPILERS = ("cc", "gcc", "clang")

Numbers = dict[str, float]


class LoadError(Exception):
    """The load generator cannot run, or its clients received wrong data; the message says more."""


class Generator:
    """The compiled load generator, and the file that it creates and appends to, both in `folder`.

    Raises LoadError if the load generator cannot be compiled.
    """

    def __init__(self, folder: Path) -> None:
        self.program = folder / "load"
        self.file = folder / "served.log"
        compiler = os.environ.get("CC") or next(filter(shutil.which, COMPILERS), None)
        if compiler is None:
            raise LoadError("no C compiler: install one (on Debian: apt install gcc libc6-dev)")
        command = [*compiler.split(), "-O2", "-pthread", "-o", str(self.program), str(SOURCE)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True)
        except OSError as error:
            raise LoadError(f"cannot run the C compiler {compiler}: {error.strerror}") from None
        except subprocess.CalledProcessError as error:
            reason = (error.stderr.strip() or "no reason given").splitlines()[0]
            raise LoadError(f"cannot compile {SOURCE.name}: {reason}") from None

    def make(self, size: int) -> None:
        """Create the file, `size` bytes long. Raises LoadError."""
        done = subprocess.run(
            [self.program, "make", "-f", self.file, "-b", str(size)], capture_output=True, text=True
        )
        if done.returncode:
            raise LoadError(
                _error(done.stdout) or f"cannot create the file: status {done.returncode}"
            )

    def start(self, mode: str, *arguments: object) -> "Clients":
        """Start the clients of the scenario `mode`; load.c explains modes and arguments."""
        return Clients([str(self.program), mode, "-f", str(self.file), *map(str, arguments)])


class Clients:
    """The running load generator.

    Use it in a `with` statement, which closes all connections at its end.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ready(self) -> Numbers:
        """Wait until all clients are connected; return the figures of connecting.

        Raises LoadError.
        """
        return self._expect("ready")

    def go(self) -> Numbers:
        """Let the clients start, and return the figures of the result; they stay connected.

        Raises LoadError.
        """
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write("\n")
            stdin.flush()
        except BrokenPipeError:
            # The load generator has failed while it waited. Its next line says why.
            pass
        return self._expect("result")

    def _expect(self, key: str) -> Numbers:
        stdout = self._process.stdout
        assert stdout is not None
        line = stdout.readline()
        if error := _error(line):
            raise LoadError(error)
        if not line:
            raise LoadError(f"the load generator exited with status {self._process.wait()}")
        numbers: Numbers = json.loads(line)[key]
        return numbers

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.kill()
        self._process.communicate()


def _error(line: str) -> str:
    return str(json.loads(line).get("error", "")) if line.startswith("{") else ""
