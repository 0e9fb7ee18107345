"""Random actions of clients, file, workers and upgrades, with a check of every received byte.

Each example runs a real server. The model knows which bytes each client must receive or, where the
protocol leaves that open, which bytes it may receive. For an example that fails, hypothesis prints
the shortest one that it can find, as a script:

    from model.test_model import Model
    state = Model()
    ...

The examples are the same in each run, unless TAILSRV_MODEL_EXAMPLES sets the number of random ones.
TAILSRV_MODEL_STEPS sets their length.
"""

import os
import sys

import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    consumes,
    initialize,
    multiple,
    precondition,
    rule,
    run_state_machine_as_test,
)

from model.client import ModelClient
from model.world import WORKERS, FollowingWorld, World

pytestmark = pytest.mark.slow

EXAMPLES = int(os.environ.get("TAILSRV_MODEL_EXAMPLES", "0"))
STEPS = int(os.environ.get("TAILSRV_MODEL_STEPS", "60"))
OPTIONS = settings(
    max_examples=EXAMPLES or 60,
    stateful_step_count=STEPS,
    derandomize=not EXAMPLES,
    database=None,
    deadline=None,
    print_blob=False,
    suppress_health_check=list(HealthCheck),
)

# The maximum for one example: after more deaths, the supervisor delays successors.
MAX_KILLS = 4

counts = st.one_of(
    st.integers(1, 60), st.integers(1, 6000), st.sampled_from([70_000, 300_000, (1 << 20) + 5])
)
numbers = st.one_of(st.integers(0, 100), st.integers(0, 12_000), st.integers(0, 400_000))
forms = st.sampled_from(
    [b"%d\n", b"%d\n", b"-%d\n", b"-%d\n", b"-0%d\n", b"+%d\r\n", b" \t%d \n", b"?%d\n", b"?-%d\n"]
)
headers = st.builds(lambda form, number: form % number, forms, numbers)
bad_headers = st.sampled_from(
    [
        b"\n",
        b"-\n",
        b"abc\n",
        b"1_0\n",
        b"1e3\n",
        b"9223372036854775808\n",
        b"1" * 33,
        b"5 5\n",
        b"5\0\n",
    ]
)

if_there = precondition(lambda self: self.file is not None)


class Model(World, RuleBasedStateMachine):
    """The rules: all actions, in any order."""

    clients: Bundle[ModelClient] = Bundle("clients")

    def __init__(self) -> None:
        super().__init__()
        self.before = sys.exc_info()[1]

    @initialize(target=clients, linger=st.booleans(), size=st.one_of(st.none(), *[numbers] * 5))
    def begin(self, linger: bool, size: int | None) -> MultipleResults[ModelClient]:
        """Start the server, and two clients that want the whole file and all appends."""
        self.start(linger, size)
        return multiple(World.connect(self, b"0\n"), World.connect(self, b"-0\n"))

    connect = rule(
        target=clients,
        header=headers,
        at_once=st.sampled_from([64, 64, 64, 0, 1, 2]),
        narrow=st.booleans(),
    )(World.connect)  # type: ignore[assignment]
    connect_badly = rule(target=clients, header=bad_headers)(  # type: ignore[assignment]
        World.connect_badly
    )
    send = rule(client=clients, count=st.integers(1, 8))(World.send)
    send_junk = rule(client=clients, count=st.integers(1, 500))(World.send_junk)
    half_close = rule(client=clients)(World.half_close)
    read = rule(client=clients, count=counts)(World.read)
    leave = rule(client=consumes(clients), how=st.sampled_from(["close", "reset", "vanish"]))(
        World.leave
    )
    settle = rule(client=clients)(World.settle)

    create = precondition(lambda self: self.file is None)(rule()(World.create))
    append = if_there(rule(count=counts)(World.append))
    truncate = if_there(rule(count=numbers)(World.truncate))
    overwrite = if_there(rule(before_end=numbers, count=st.integers(1, 6000))(World.overwrite))
    move = precondition(lambda self: self.file is not None and self.linger and not self.moved)(
        rule(how=st.sampled_from(["rename", "unlink", "replace"]))(World.move)
    )

    stop = precondition(lambda self: self.file is not None and not self.stopping)(
        rule()(World.stop)
    )
    go_on = precondition(lambda self: self.stopping)(rule()(World.go_on))
    kill = precondition(lambda self: self.kills < MAX_KILLS)(
        rule(
            slot=st.integers(0, WORKERS - 1),
            number=st.sampled_from(["SIGKILL", "SIGKILL", "SIGTERM"]),
            known=st.booleans(),
        )(World.kill)
    )
    upgrade = precondition(lambda self: self.upgrades < 1)(rule()(World.upgrade))

    def teardown(self) -> None:
        """Check the end of the example, unless a step has failed."""
        try:
            if hasattr(self, "port") and sys.exc_info()[1] is self.before:
                self.finish()
        finally:
            self.close()


class Following(FollowingWorld, Model):
    """The same model with --follow-name."""

    rotate = precondition(lambda self: self.file is not None and self.rotations < 2)(
        rule(count=counts, at_once=st.booleans())(FollowingWorld.rotate)
    )


def numbers_of_examples(few: int, many: int, asked_for: int) -> list[object]:
    """Return how many examples to try, as parameters of a test.

    It is the requested number, if there is one; otherwise `few`, and in a thorough run also `many`.
    """
    return [asked_for] if asked_for else [few, pytest.param(many, marks=pytest.mark.thorough)]


@pytest.mark.parametrize("examples", numbers_of_examples(6, 60, EXAMPLES))
def test_model(examples: int) -> None:
    """Whatever clients, file and processes do, clients receive exactly the requested bytes."""
    run_state_machine_as_test(Model, settings=settings(OPTIONS, max_examples=examples))


@pytest.mark.thorough
@pytest.mark.parametrize("examples", numbers_of_examples(2, 8, EXAMPLES // 8))
def test_model_of_rotations(examples: int) -> None:
    """When the file is also rotated, clients receive exactly the requested bytes."""
    run_state_machine_as_test(Following, settings=settings(OPTIONS, max_examples=examples))


class Wrong(Model):
    """A model in which killing a worker is an error."""

    def finish(self) -> None:
        """Fail in those examples in which a worker was killed."""
        super().finish()
        assert not self.kills, "there was a kill"


@pytest.mark.thorough
def test_what_is_printed_is_a_script() -> None:
    """The printed steps of a failing example are a script that repeats the failure."""
    quick = settings(
        OPTIONS, phases=[Phase.generate], report_multiple_bugs=False, stateful_step_count=10
    )
    with pytest.raises(AssertionError, match="there was a kill") as failure:
        run_state_machine_as_test(Wrong, settings=quick)
    script = "\n".join(failure.value.__notes__).partition("state = ")
    with pytest.raises(AssertionError, match="there was a kill"):
        exec("".join(script[1:]), {"Wrong": Wrong})
