"""Upgrade in place: has the installed program prove that it starts, and execs it.

The program is started by the very command that started us, with the environment variable TAILSRV_UPGRADE:

- `check`: parse the arguments, read the state on standard input, say on standard output which version this is, exit 0;
- a number: the descriptor of the state to go on from.
"""

import json
import os
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import ExitStack, suppress

from tailsrv import __version__
from tailsrv.linux import systemd
from tailsrv.linux.event_loop import Timers
from tailsrv.linux.files import memory_file_with
from tailsrv.linux.signals import block_all, unblock_all
from tailsrv.log import fields, logger
from tailsrv.supervisor import upgrade_state as state

VARIABLE = "TAILSRV_UPGRADE"
CHECK = "check"
# seconds that the new program may take to start
PROOF_TIMEOUT = 30.0


def command() -> tuple[str, list[str]]:
    """Return the executable and the arguments that this process was started with."""
    return sys.executable, sys.orig_argv


def environment(value: str) -> dict[str, str]:
    """Return our environment with the variable set to `value`."""
    return {**os.environ, VARIABLE: value}


def read_state() -> state.UpgradeState | None:
    """Return the state that this process is to go on from, None if it is not the outcome of an upgrade.

    Takes the variable out of the environment. Raises state.StateError.
    """
    value = os.environ.pop(VARIABLE, "")
    if not value.isdigit():
        return None
    with open(int(value), "rb") as file:
        return state.decode(file.read())


def answer_check() -> int:
    """Prove to a running server that this version can take over from it; return the exit status."""
    try:
        state.decode(sys.stdin.buffer.read())
    except state.StateError as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write(json.dumps({"version": __version__, "format": state.FORMAT}) + "\n")
    return 0


def is_upgrade() -> bool:
    """Tell whether this process is the outcome of an upgrade, or a proof for one: it gets its sockets from the state."""
    return is_check() or os.environ.get(VARIABLE, "").isdigit()


def is_check() -> bool:
    """Tell whether this process was started to prove that it can take over."""
    return os.environ.get(VARIABLE) == CHECK


def _take(fd: int) -> str:
    """Return what is in an anonymous file, and close it."""
    os.lseek(fd, 0, os.SEEK_SET)
    with open(fd, encoding="utf-8", errors="replace") as file:
        return file.read()


def _closing(fd: int, stack: ExitStack) -> int:
    """Have `fd` closed with `stack`, and return it."""
    stack.callback(os.close, fd)
    return fd


class Proof:
    """A child that runs the installed program to see whether it starts. Raises OSError if not even that can be tried."""

    def __init__(self, data: bytes) -> None:
        executable, arguments = command()
        with ExitStack() as refused:
            given, self._answer, self._complaints = (
                _closing(memory_file_with(content), refused) for content in (data, b"", b"")
            )
            files = [
                (os.POSIX_SPAWN_DUP2, fd, number)
                for number, fd in enumerate((given, self._answer, self._complaints))
            ]
            # All signals are blocked: one that is sent to all processes of the service must not
            # fail the upgrade. To end the check takes SIGKILL.
            held = signal.valid_signals()
            self.pid = os.posix_spawn(
                executable,
                arguments,
                environment(CHECK),
                file_actions=files,
                setsigmask=held,
                setsigdef=(signal.SIGPIPE,),
            )
            refused.pop_all()
        os.close(given)

    def close(self) -> None:
        """Close what the child writes to."""
        os.close(self._answer)
        os.close(self._complaints)

    def kill(self) -> None:
        """End the child, which has not been reaped."""
        os.kill(self.pid, signal.SIGKILL)

    def result(self, status: int) -> tuple[str | None, str]:
        """Return the version that has proved itself, or None and the reason, once the child ended with `status`."""
        try:
            answer, complaints = _take(self._answer), _take(self._complaints)
        except (OSError, TypeError) as error:
            # TypeError: the interpreter's, where read(2) says EAGAIN
            return None, f"what it said cannot be read: {_reason(error)}"
        try:
            if status == 0:
                return str(json.loads(answer)["version"]), ""
        except (ValueError, KeyError, TypeError):
            pass
        lines = (
            complaints.strip().splitlines() or answer.strip().splitlines() or ["it did not answer"]
        )
        return None, lines[-1]


def execute(handed_on: state.UpgradeState, pending: Callable[[], Iterable[int]]) -> None:
    """Become the installed program, which goes on from `handed_on`. Returns only by raising OSError.

    `pending()` returns the signals that have been caught and not acted on: they are sent again.
    """
    fd = memory_file_with(state.encode(handed_on))
    descriptors = [fd, *handed_on.descriptors()]
    executable, arguments = command()
    # a signal now is for the new program; the mask and what is pending live through exec(2)
    block_all()
    try:
        for descriptor in descriptors:
            os.set_inheritable(descriptor, True)
        for number in pending():
            os.kill(os.getpid(), number)
        os.execve(executable, arguments, environment(str(fd)))  # noqa: S606 our own command
    finally:
        # still here, and whatever has failed, signals must come through again
        unblock_all()
        for descriptor in descriptors:
            with suppress(OSError):
                os.set_inheritable(descriptor, False)
        os.close(fd)


def _reason(error: Exception) -> str:
    """Return why an upgrade has failed, in the kernel's words where they are its."""
    return (isinstance(error, OSError) and error.strerror) or repr(error)


def keep_private(descriptors: list[int]) -> None:
    """Keep the descriptors that came through exec(2) from going any further."""
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)


class Upgrader:
    """One upgrade at a time: proof, then exec. Requests that come meanwhile are one more, to be asked for again.

    `snapshot()` returns the state to hand on, `pending()` the signals that have been caught and not acted on.
    While the new program replaces the workers, `busy` stays set.
    """

    def __init__(
        self,
        timers: Timers,
        snapshot: Callable[[], state.UpgradeState],
        pending: Callable[[], list[int]],
        lifecycle: systemd.Lifecycle,
        busy: bool,
    ) -> None:
        self._timers, self._snapshot, self._pending, self._lifecycle = (
            timers,
            snapshot,
            pending,
            lifecycle,
        )
        self._proof: Proof | None = None
        # the version to exec at the end of this turn
        self._proven: str | None = None
        self._requested = False
        self._paused = False
        # a request has come since the proof began: what it proves may not be what is installed now
        self._stale = False
        self._busy = busy

    def request(self, now: float) -> None:
        """Start an upgrade, or note that one more is wanted after the one that is under way."""
        if self._busy or self._paused:
            self._requested = self._stale = True
            return
        self._lifecycle.reloading()
        self._prove(now)

    def _prove(self, now: float) -> None:
        self._stale = False
        try:
            self._proof = Proof(state.encode(self._snapshot()))
        except Exception as error:
            self._fail(_reason(error), now)
            return
        self._busy = True
        self._timers.set(self.kill_check, now + PROOF_TIMEOUT)
        logger.info("upgrade: asking the installed program whether it starts")

    def kill_check(self) -> None:
        """End a program that takes too long to start."""
        if self._proof is not None:
            self._proof.kill()

    def pause(self) -> None:
        """Put upgrades off, also the one whose proof is under way: there is no good moment for an exec until `resume`."""
        self._paused = True

    def resume(self, now: float) -> None:
        """Do what was asked for since `pause`."""
        self._paused = False
        self._start_requested(now)

    def cancel(self) -> None:
        """Forget all about it: the server is ending."""
        self._proven = None
        self.kill_check()
        self._timers.cancel(self.kill_check)

    def close_in_child(self) -> None:
        """Close, in a forked child, what is the supervisor's."""
        if self._proof is not None:
            self._proof.close()

    def handle_exit(self, pid: int, status: int, now: float, ending: bool) -> bool:
        """Tell whether the child `pid` was our proof, and note what it has shown, unless the server is `ending`."""
        if self._proof is None or pid != self._proof.pid:
            return False
        version, reason = self._proof.result(status)
        self._proof = None
        self._timers.cancel(self.kill_check)
        if ending:
            return True
        if version is None:
            self._fail(reason, now)
        self._proven = version
        return True

    def execute_if_proven(self, now: float) -> None:
        """Become the program that has proved itself, if there is one.

        To be called when every signal that has been read is acted on: the exec would lose the others.
        """
        version, self._proven = self._proven, None
        if version is None:
            return
        if self._paused:
            self._requested = True
            self.finish(now)
            return
        if self._stale:
            self._prove(now)
            return
        logger.info("upgrade: %s", fields(old=__version__, new=version))
        try:
            execute(self._snapshot(), self._pending_signals)
        # Whatever it is, the old program still runs and serves: an upgrade must never end the server.
        except Exception as error:
            self._fail(_reason(error), now)

    def finish(self, now: float) -> None:
        """Note that an upgrade is over, one way or the other, and start the one that was asked for meanwhile."""
        self._busy = False
        self._lifecycle.ready()
        self._start_requested(now)

    def _start_requested(self, now: float) -> None:
        if self._requested and not self._busy and not self._paused:
            self._requested = False
            self.request(now)

    def _pending_signals(self) -> list[int]:
        return [*self._pending(), *([signal.SIGHUP] if self._requested else [])]

    def _fail(self, reason: str, now: float) -> None:
        logger.error("upgrade failed, nothing has changed: %s", fields(reason=reason))
        self.finish(now)
