"""Compiles load.c, and runs it step by step: ready, go, result."""

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
    """The clients did not get what they should have got; the message says what was wrong."""


class Generator:
    """The compiled load generator and the file that it makes and appends to, both in `folder`.

    Raises LoadError if it cannot be compiled.
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
            raise LoadError(
                f"cannot compile {SOURCE.name}: {(error.stderr.strip() or 'no reason given').splitlines()[0]}"
            ) from None

    def make(self, size: int) -> None:
        """Make the file `size` bytes long."""
        done = subprocess.run(
            [self.program, "make", "-f", self.file, "-b", str(size)], capture_output=True, text=True
        )
        if done.returncode:
            raise LoadError(
                _error(done.stdout) or f"the file cannot be made: status {done.returncode}"
            )

    def start(self, mode: str, *arguments: object) -> "Clients":
        """Return the clients of the scenario `mode`, as load.c explains it."""
        return Clients([str(self.program), mode, "-f", str(self.file), *map(str, arguments)])


class Clients:
    """The running generator. Use it in a `with` statement, at the end of which all connections are closed."""

    def __init__(self, command: Sequence[str]) -> None:
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ready(self) -> Numbers:
        """Wait until all are connected, and return how that went."""
        return self._expect("ready")

    def go(self) -> Numbers:
        """Let them begin, and return what came of it; they stay connected."""
        stdin = self._process.stdin
        assert stdin is not None
        try:
            stdin.write("\n")
            stdin.flush()
        except BrokenPipeError:
            # it has failed while it waited: the next line says why
            pass
        return self._expect("result")

    def _expect(self, key: str) -> Numbers:
        stdout = self._process.stdout
        assert stdout is not None
        line = stdout.readline()
        if error := _error(line):
            raise LoadError(error)
        if not line:
            raise LoadError(f"the load generator ended with status {self._process.wait()}")
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
