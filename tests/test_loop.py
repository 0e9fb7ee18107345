"""The event loop: descriptors that are left alone for a while. The clock is a number, the descriptors are real."""

import socket

from tailsrv.linux.event_loop import Loop


def test_stalled_descriptors_are_left_alone_for_a_while() -> None:
    """A descriptor that stays readable is not reported while it is stalled, and is again when that is over."""
    now = 0.0
    loop = Loop(lambda: now)
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
        loop.turn()  # ends the stall
        loop.turn()
        assert seen == [0.0, 5.0]
        assert loop.timeout() is None


def test_stalled_descriptors_may_go() -> None:
    """A descriptor that is unregistered while it is stalled is not touched when that is over."""
    now = 0.0
    loop = Loop(lambda: now)
    near, far = socket.socketpair()
    with far, near:
        loop.register(near.fileno(), lambda: None)
        loop.stall(near.fileno(), 5.0)
        loop.unregister(near.fileno())
        near.close()
        now = 5.0
        loop.turn()
        assert loop.timeout() is None
