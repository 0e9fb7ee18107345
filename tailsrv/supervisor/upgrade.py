"""Upgrade in place: checks that the installed version starts, then replaces the supervisor with it.

In both steps, the supervisor runs the command line that it was itself started with. The environment
variable TAILSRV_UPGRADE tells the program what to do:

- `check`: parse the arguments, read a state from standard input, boot a worker, write the version
  to standard output, and exit with status 0. This runs in a child, while the old version serves:
  see upgrade_check.py.
- A number: continue from the state in the file with this descriptor. This is for execve(2), which
  replaces the program of the supervisor. Its pid, sockets and workers stay.
"""

import json
import os
import signal
import sys
from contextlib import ExitStack, suppress

from tailsrv import __version__
from tailsrv.linux import systemd
from tailsrv.linux.event_loop import Timers
from tailsrv.linux.files import memory_file_with
from tailsrv.linux.signals import Wakeup, block_all, unblock_all
from tailsrv.log import fields, logger
from tailsrv.supervisor import upgrade_state

VARIABLE = "TAILSRV_UPGRADE"
CHECK = "check"
# Seconds that a check may last.
CHECK_TIMEOUT = 30.0


def command() -> tuple[str, list[str]]:
    """Return the executable and the arguments that this process was started with."""
    return sys.executable, sys.orig_argv


def environment(value: str) -> dict[str, str]:
    """Return the environment of this process with TAILSRV_UPGRADE set to `value`."""
    return {**os.environ, VARIABLE: value}


def read_state() -> upgrade_state.UpgradeState | None:
    """Return the state to continue from, None if this process was not started by an upgrade.

    Removes TAILSRV_UPGRADE from the environment. Raises StateError if the state cannot be read.
    """
    value = os.environ.pop(VARIABLE, "")
    if not value.isdigit():
        return None
    with open(int(value), "rb") as file:
        return upgrade_state.decode(file.read())


def is_upgrade() -> bool:
    """Return whether this process was started by an upgrade, or by the check before one.

    Such a process creates no listeners: it gets them from the state, or needs none for the check.
    """
    return is_check() or os.environ.get(VARIABLE, "").isdigit()


def is_check() -> bool:
    """Return whether this process was started by the check before an upgrade."""
    return os.environ.get(VARIABLE) == CHECK


def _read_and_close(fd: int) -> str:
    """Return the contents of an anonymous file, and close it."""
    os.lseek(fd, 0, os.SEEK_SET)
    with open(fd, encoding="utf-8", errors="replace") as file:
        return file.read()


def _closing(fd: int, stack: ExitStack) -> int:
    """Let `stack` close `fd`, and return `fd`."""
    stack.callback(os.close, fd)
    return fd


class Check:
    """A child that runs the installed program, to find out whether it can take over from this one.

    `data` is the encoded state, which the child reads from its standard input. Its standard output
    and error are anonymous files. Raises OSError if the child cannot be started.
    """

    def __init__(self, data: bytes) -> None:
        executable, arguments = command()
        with ExitStack() as on_failure:
            stdin, self._stdout, self._stderr = (
                _closing(memory_file_with(content), on_failure) for content in (data, b"", b"")
            )
            files = [
                (os.POSIX_SPAWN_DUP2, fd, number)
                for number, fd in enumerate((stdin, self._stdout, self._stderr))
            ]
            # Block all signals in the child: one that is sent to all processes of the service must
            # not fail the upgrade. Only SIGKILL ends the check.
            blocked_signals = signal.valid_signals()
            self.pid = os.posix_spawn(
                executable,
                arguments,
                environment(CHECK),
                file_actions=files,
                setsigmask=blocked_signals,
                setsigdef=(signal.SIGPIPE,),
            )
            on_failure.pop_all()
        os.close(stdin)

    def close(self) -> None:
        """Close the files that the child writes to."""
        os.close(self._stdout)
        os.close(self._stderr)

    def kill(self) -> None:
        """Kill the child, which must not have been reaped yet."""
        os.kill(self.pid, signal.SIGKILL)

    def result(self, status: int) -> tuple[str | None, str]:
        """Return the installed version, or None and the reason why it cannot take over.

        `status` is the wait status of the child. Closes the files, so this can be called only once.
        """
        try:
            output, errors = _read_and_close(self._stdout), _read_and_close(self._stderr)
        except (OSError, TypeError) as error:
            # If read(2) fails with EAGAIN, the interpreter raises TypeError.
            return None, f"cannot read the output of the installed program: {reason_of(error)}"
        try:
            if status == 0:
                return str(json.loads(output)["version"]), ""
        except (ValueError, KeyError, TypeError):
            pass
        lines = (
            errors.strip().splitlines()
            or output.strip().splitlines()
            or ["the installed program did not answer"]
        )
        return None, lines[-1]


def execute(handed_on: upgrade_state.UpgradeState, wakeup: Wakeup, again: bool) -> None:
    """Replace this program with the installed one, which continues from `handed_on`.

    Signals that `wakeup` has caught, but that were not handled, are sent again, so that the new
    program handles them. With `again`, it also gets a request for another upgrade.

    Never returns. Raises an exception if the program could not be replaced, usually OSError; this
    process then continues as before.
    """
    fd = memory_file_with(upgrade_state.encode(handed_on))
    descriptors = [fd, *handed_on.descriptors()]
    executable, arguments = command()
    # Signals from now on are for the new program. The signal mask and pending signals are kept by
    # execve(2).
    block_all()
    try:
        for descriptor in descriptors:
            os.set_inheritable(descriptor, True)
        for number in [*wakeup.read(), *([signal.SIGHUP] if again else [])]:
            os.kill(os.getpid(), number)
        os.execve(executable, arguments, environment(str(fd)))  # noqa: S606 our own command
    finally:
        # Reached only if execve(2), or anything before it, has failed.
        unblock_all()
        for descriptor in descriptors:
            with suppress(OSError):
                os.set_inheritable(descriptor, False)
        os.close(fd)


def reason_of(error: Exception) -> str:
    """Return the message of `error`: the kernel's text for an OSError, else the exception."""
    return (isinstance(error, OSError) and error.strerror) or repr(error)


def keep_private(descriptors: list[int]) -> None:
    """Set close-on-exec on the descriptors that were inherited through exec(2)."""
    for descriptor in descriptors:
        os.set_inheritable(descriptor, False)


class Upgrader:
    """Runs one upgrade at a time: first the check, then exec.

    Any number of requests during an upgrade lead to one more upgrade after it. Both steps need the
    supervisor's state: when needs_state() says so, the supervisor passes it to advance().

    Args:
        timers: The timers of the supervisor's loop.
        wakeup: The pipe that reports signals.
        lifecycle: Notifies the service manager.
        busy: Whether this process was itself started by an upgrade, which lasts until the workers
            have been replaced and `finish` is called.

    """

    def __init__(
        self,
        timers: Timers,
        wakeup: Wakeup,
        lifecycle: systemd.Lifecycle,
        busy: bool,
    ) -> None:
        self._timers, self._wakeup, self._lifecycle = timers, wakeup, lifecycle
        # Whether a check is to start.
        self._check_due = False
        self._check: Check | None = None
        # The version that has passed the check, to be exec'd at the end of this turn.
        self._checked_version: str | None = None
        # Whether another upgrade is to follow this one.
        self._requested = False
        # Whether a request has arrived since the check began. The installed version may have
        # changed since then, so the check must be repeated.
        self._stale = False
        # Whether an upgrade is under way.
        self._busy = busy

    def request(self) -> None:
        """Start an upgrade, or let one follow the upgrade that is under way."""
        if self._busy:
            self._requested = self._stale = True
            return
        self._busy = self._check_due = True
        self._lifecycle.reloading()

    def needs_state(self) -> bool:
        """Return whether the next step of an upgrade can be done now."""
        return self._check_due or self._checked_version is not None

    def has_request(self) -> bool:
        """Return whether another upgrade is to follow."""
        return self._requested

    def advance(self, state: upgrade_state.UpgradeState, now: float) -> None:
        """Start the check, or replace this program with the version that has passed it.

        Call this only when every signal that has been read is handled: exec would lose the others.
        Raises an exception if the step has failed, usually OSError. Call fail() then.
        """
        version, self._checked_version = self._checked_version, None
        if version is None or self._stale:
            self._start_check(state, now)
            return
        logger.info("upgrade: %s", fields(old=__version__, new=version))
        execute(state, self._wakeup, self._requested)

    def _start_check(self, state: upgrade_state.UpgradeState, now: float) -> None:
        self._check_due = self._stale = False
        self._check = Check(upgrade_state.encode(state))
        self._timers.set(self.kill_check, now + CHECK_TIMEOUT)
        logger.info("upgrade: checking whether the installed program starts")

    def kill_check(self) -> None:
        """Kill the check that is under way, if there is one. Its exit then fails the upgrade."""
        if self._check is not None:
            self._check.kill()

    def cancel(self) -> None:
        """Cancel the upgrade, because the server is ending."""
        self._check_due, self._checked_version = False, None
        self.kill_check()
        self._timers.cancel(self.kill_check)

    def close_in_child(self) -> None:
        """Close the files of the check in a forked child."""
        if self._check is not None:
            self._check.close()

    def handle_exit(self, pid: int, status: int, ending: bool) -> bool:
        """Return whether `pid` was the child of the check. If so, record the result of the check.

        The result is ignored while the server is `ending`. `status` is the child's wait status.
        """
        if self._check is None or pid != self._check.pid:
            return False
        version, reason = self._check.result(status)
        self._check = None
        self._timers.cancel(self.kill_check)
        if ending:
            return True
        if version is None:
            self.fail(reason)
        self._checked_version = version
        return True

    def finish(self) -> None:
        """Record that the upgrade has succeeded or failed, and start the next one if requested."""
        self._busy = False
        self._lifecycle.ready()
        if self._requested:
            self._requested = False
            self.request()

    def fail(self, reason: str) -> None:
        """Log why the upgrade has failed, and end it."""
        self._check_due, self._checked_version = False, None
        logger.error(
            "upgrade failed, the running version continues to serve: %s", fields(reason=reason)
        )
        self.finish()
