"""The least time between two rotations."""

from tailsrv.config import Timing
from tailsrv.supervisor.rotation_pace import RotationPace

TIMING = Timing()


def test_first_rotations_wait_for_nothing() -> None:
    """One rotation may come at any time, and a second one soon after it."""
    pace = RotationPace(TIMING)
    for now in (100.0, 100.1):
        assert pace.pause(now) == 0
        pace.begin(now)


def test_rotations_in_quick_succession() -> None:
    """Where one follows another at once, the pause doubles up to its maximum: 100 of them take minutes."""
    pace, now, pauses = RotationPace(TIMING), 100.0, []
    for _ in range(100):
        pauses.append(round(pace.pause(now), 6))
        now += pace.pause(now)
        assert pace.pause(now) == 0
        pace.begin(now)
    assert pauses == sorted(pauses)
    assert pauses[-1] == TIMING.max_delay
    assert now > 400


def test_rotations_at_leisure() -> None:
    """A file that lived long enough ends the row, whatever pause there was before it."""
    pace, now = RotationPace(TIMING), 100.0
    for _ in range(10):
        now += pace.pause(now)
        pace.begin(now)
    now += pace.pause(now) + TIMING.long_life
    pace.begin(now)
    assert pace.pause(now) == 0


def test_time_that_a_rotation_takes_is_not_life() -> None:
    """Files that are replaced as soon as they are served have a pause between them, however long each rotation takes."""
    pace, now = RotationPace(TIMING), 100.0
    for _ in range(10):
        now += pace.pause(now)
        pace.begin(now)
        now += 2 * TIMING.long_life
        pace.end(now)
    assert pace.pause(now) == TIMING.max_delay
