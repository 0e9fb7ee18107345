"""Tests of the minimum time between two rotations."""

from tailsrv.config import Timing
from tailsrv.supervisor.rotation_pace import RotationPace

TIMING = Timing()


def test_first_rotations_do_not_wait() -> None:
    """The first two rotations do not wait."""
    pace = RotationPace(TIMING)
    for now in (100.0, 100.1):
        assert pace.pause(now) == 0
        pace.begin(now)


def test_rotations_in_quick_succession() -> None:
    """If rotations follow each other at once, the pause doubles up to its maximum."""
    pace, now, pauses = RotationPace(TIMING), 100.0, []
    for _ in range(100):
        pauses.append(round(pace.pause(now), 6))
        now += pace.pause(now)
        assert pace.pause(now) == 0
        pace.begin(now)
    assert pauses == sorted(pauses)
    assert pauses[-1] == TIMING.max_delay
    assert now > 400


def test_rotations_far_apart() -> None:
    """A file that was served long enough resets the pause."""
    pace, now = RotationPace(TIMING), 100.0
    for _ in range(10):
        now += pace.pause(now)
        pace.begin(now)
    now += pace.pause(now) + TIMING.long_life
    pace.begin(now)
    assert pace.pause(now) == 0


def test_duration_of_a_rotation_does_not_count() -> None:
    """The duration of a rotation does not count as time for which the file was served."""
    pace, now = RotationPace(TIMING), 100.0
    for _ in range(10):
        now += pace.pause(now)
        pace.begin(now)
        now += 2 * TIMING.long_life
        pace.end(now)
    assert pace.pause(now) == TIMING.max_delay
