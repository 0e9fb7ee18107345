"""Tests of the event loop and its timers, with a number as the clock."""

import socket
from collections.abc import Callable

from tailsrv.linux.event_loop import EventLoop, Timers


def recorder(done: list[str], name: str) -> Callable[[], None]:
    """Return an action that records that it ran."""
    return lambda: done.append(name)


def test_nothing_planned() -> None:
    """Without a timer there is no timeout, and the loop can sleep without limit."""
    timers = Timers()
    assert timers.timeout(0.0) is None
    timers.run(1e9)
    assert timers.timeout(1e9) is None


def test_timeout_is_to_the_next() -> None:
    """The timeout is the time to the earliest timer, and 0 if that is overdue."""
    timers = Timers()
    timers.set(recorder([], "late"), 20.0)
    timers.set(recorder([], "early"), 10.0)
    assert [timers.timeout(now) for now in (0.0, 9.0, 10.0, 11.0)] == [10.0, 1.0, 0.0, 0.0]


def test_run_does_what_is_due_once() -> None:
    """An action runs once, when it is due."""
    timers, done = Timers(), list[str]()
    timers.set(recorder(done, "a"), 10.0)
    timers.set(recorder(done, "b"), 20.0)
    timers.run(9.9)
    assert done == []
    timers.run(10.0)
    timers.run(10.0)
    assert done == ["a"]
    timers.run(30.0)
    timers.run(30.0)
    assert done == ["a", "b"]
    assert timers.timeout(30.0) is None


def test_set_replaces() -> None:
    """Setting a timer again for the same action replaces its time."""
    timers, done = Timers(), list[str]()
    action = recorder(done, "a")
    timers.set(action, 10.0)
    timers.set(action, 20.0)
    timers.run(15.0)
    assert done == []
    timers.set(action, 5.0)
    assert timers.timeout(15.0) == 0.0
    timers.run(15.0)
    timers.run(25.0)
    assert done == ["a"]


def test_cancel() -> None:
    """A cancelled action does not run, and cancelling an action without a timer is no error."""
    timers, done = Timers(), list[str]()
    action = recorder(done, "a")
    timers.cancel(action)
    timers.set(action, 10.0)
    assert action in timers
    timers.cancel(action)
    assert action not in timers
    timers.run(10.0)
    assert done == []


def test_bound_methods_are_one_action() -> None:
    """The same method of the same object is the same action, as the loops rely on."""
    timers, done = Timers(), list[str]()
    timers.set(done.clear, 10.0)
    assert done.clear in timers
    timers.cancel(done.clear)
    assert timers.timeout(0.0) is None


def test_action_that_sets_itself_again() -> None:
    """A timer that an action sets runs in the next call, due or not, so that every call ends."""
    timers, done = Timers(), list[str]()

    def again() -> None:
        done.append("again")
        timers.set(again, 0.0)

    timers.set(again, 0.0)
    timers.run(5.0)
    assert done == ["again"]
    timers.run(5.0)
    assert done == ["again", "again"]


def test_action_that_cancels_another() -> None:
    """An action that an earlier action of the same call has cancelled does not run."""
    timers, done = Timers(), list[str]()
    second = recorder(done, "second")

    def first() -> None:
        done.append("first")
        timers.cancel(second)

    timers.set(first, 1.0)
    timers.set(second, 1.0)
    timers.run(1.0)
    assert done == ["first"]


def test_stalled_descriptor_is_not_reported() -> None:
    """A readable descriptor is not reported while it is stalled, and is reported afterwards."""
    now = 0.0
    loop = EventLoop(lambda: now)
    near, far = socket.socketpair()
    with near, far:
        seen: list[float] = []
        loop.register(near.fileno(), lambda: seen.append(now))
        far.send(b"x")
        loop.turn()
        loop.stall(near.fileno(), 5.0)
        assert loop.timeout() == 5.0
        loop.wait(0)
        assert seen == [0.0]
        now = 5.0
        # This turn ends the stall; the next one reports the descriptor.
        loop.turn()
        loop.turn()
        assert seen == [0.0, 5.0]
        assert loop.timeout() is None


def test_stalled_descriptor_is_unregistered() -> None:
    """A descriptor that is unregistered while it is stalled is not registered again afterwards."""
    now = 0.0
    loop = EventLoop(lambda: now)
    near, far = socket.socketpair()
    with far, near:
        loop.register(near.fileno(), lambda: None)
        loop.stall(near.fileno(), 5.0)
        loop.unregister(near.fileno())
        near.close()
        now = 5.0
        loop.turn()
        assert loop.timeout() is None
