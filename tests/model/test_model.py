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
from model.log_world import LogWorld
from model.world import WORKERS, World

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

# The maximum of deaths of the supervisor in one example.
MAX_DEATHS = 3

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

# Whether the server has a supervisor.
supervised = precondition(lambda self: not self.orphaned)
orphaned = precondition(lambda self: self.orphaned)


class ClientRules(World, RuleBasedStateMachine):
    """The rules for clients and workers, and the end of an example."""

    clients: Bundle[ModelClient] = Bundle("clients")

    def __init__(self) -> None:
        super().__init__()
        self.before = sys.exc_info()[1]

    connect = rule(
        target=clients,
        header=headers,
        at_once=st.sampled_from([64, 64, 64, 0, 1, 2]),
        narrow=st.booleans(),
    )(World.connect)  # type: ignore[assignment]
    send = rule(client=clients, count=st.integers(1, 8))(World.send)
    read = rule(client=clients, count=counts)(World.read)
    leave = precondition(lambda self: len(self.living) > 2)(
        rule(client=consumes(clients), how=st.sampled_from(["close", "reset", "vanish"]))(
            World.leave
        )
    )
    settle = supervised(rule(client=clients)(World.settle))
    append = if_there(rule(count=counts)(World.append))
    stop = precondition(lambda self: self.file is not None and not self.stopping)(
        rule()(World.stop)
    )

    def teardown(self) -> None:
        """Check the end of the example, unless a step has failed."""
        try:
            error = sys.exc_info()[1]
            if hasattr(self, "port") and error is self.before:
                self.finish()
            elif hasattr(self, "port") and error is not None:
                error.add_note(self.describe())
        except Exception as failure:
            failure.add_note(self.describe())
            raise
        finally:
            self.close()


kill_rule = rule(
    slot=st.integers(0, WORKERS - 1),
    number=st.sampled_from(["SIGKILL", "SIGKILL", "SIGTERM"]),
    known=st.booleans(),
)
if_may_kill = precondition(lambda self: self.kills < MAX_KILLS and not self.orphaned)

death_rule = rule(
    how=st.sampled_from(["SIGKILL", "SIGKILL", "SIGSEGV", "SIGABRT", "SIGSTOP"]),
    settled=st.booleans(),
)
if_may_die = precondition(lambda self: self.deaths < MAX_DEATHS and not self.orphaned)
orphan_rule = rule(index=st.integers(0, 2), number=st.sampled_from(["SIGKILL", "SIGSEGV"]))
takeover_rule = rule(
    workers=st.sampled_from([WORKERS, WORKERS, 1, 3]),
    more=st.sampled_from([[], [], ["-v"], ["--grace", "30"], ["--max-clients", "1000"]]),
    failing=st.lists(st.integers(50, 600), max_size=2),
)


class Model(ClientRules):
    """The rules for one file: all actions, in any order."""

    @initialize(
        target=ClientRules.clients,
        linger=st.booleans(),
        size=st.one_of(st.none(), *[numbers] * 5),
    )
    def begin(self, linger: bool, size: int | None) -> MultipleResults[ModelClient]:
        """Start the server, and two clients that want the whole file and all appends."""
        self.start(linger, size)
        return multiple(World.connect(self, b"0\n"), World.connect(self, b"-0\n"))

    connect_badly = rule(target=ClientRules.clients, header=bad_headers)(  # type: ignore[assignment]
        World.connect_badly
    )
    send_junk = rule(client=ClientRules.clients, count=st.integers(1, 500))(World.send_junk)
    half_close = rule(client=ClientRules.clients)(World.half_close)

    create = precondition(lambda self: self.file is None)(rule()(World.create))
    truncate = if_there(rule(count=numbers)(World.truncate))
    overwrite = if_there(rule(before_end=numbers, count=st.integers(1, 6000))(World.overwrite))
    move = precondition(
        lambda self: (
            self.file is not None
            and self.linger
            and not self.moved
            and (self.served or not self.orphaned)
        )
    )(rule(how=st.sampled_from(["rename", "unlink", "replace"]))(World.move))
    kill = if_may_kill(kill_rule(World.kill))
    upgrade = precondition(lambda self: self.upgrades < 1 and not self.orphaned)(
        rule()(World.upgrade)
    )
    go_on = precondition(lambda self: self.stopping)(rule()(World.go_on))
    supervisor_dies = if_may_die(death_rule(World.supervisor_dies))
    kill_orphan = orphaned(orphan_rule(World.kill_orphan))
    takeover = orphaned(takeover_rule(World.takeover))


several = st.lists(counts, min_size=1, max_size=3)
ways = st.sampled_from(["rename", "rename", "replace"])
if_here = precondition(
    lambda self: self.file is not None and self.here and (self.served or not self.orphaned)
)


class LogModel(LogWorld, ClientRules):
    """The rules for the log of a path: the file is rotated, truncated and deleted as well."""

    @initialize(
        target=ClientRules.clients,
        naming=st.sampled_from(["numbered", "dated", "link"]),
        size=st.one_of(numbers, numbers, st.none(), numbers),
        saved=st.sampled_from([True, True, False]),
    )
    def begin(self, naming: str, size: int | None, saved: bool) -> MultipleResults[ModelClient]:
        """Start the server, and two clients that want the whole log and all appends."""
        self.begin_log(naming, size, saved)
        return multiple(World.connect(self, b"0\n"), World.connect(self, b"-0\n"))

    create = precondition(lambda self: self.file is None)(rule()(LogWorld.create))

    rotate = if_here(rule(how=ways, counts=several, keep=st.booleans())(LogWorld.rotate))
    move_away = if_here(rule(how=st.sampled_from(["rename", "unlink"]))(LogWorld.move_away))
    create_next = precondition(lambda self: not self.here and self.next is None)(
        rule()(LogWorld.create_next)
    )
    move_back = precondition(lambda self: not self.here and self.current.path is not None)(
        rule()(LogWorld.move_back)
    )
    hesitate = supervised(if_here(rule(count=counts, upgrade=st.booleans())(LogWorld.hesitate)))
    switch = precondition(lambda self: self.next is not None)(
        rule(keep=st.booleans())(LogWorld.switch)
    )
    append_late = supervised(if_here(rule(count=st.integers(1, 2000))(LogWorld.append_late)))
    race = supervised(
        if_here(
            rule(count=counts, event=st.sampled_from(["none", "SIGKILL", "SIGCONT"]))(LogWorld.race)
        )
    )
    cut = supervised(if_here(rule(count=st.integers(1, 400_000))(LogWorld.cut)))
    die_agreed = if_may_die(
        if_here(
            rule(
                count=counts,
                late=st.integers(0, 1000),
                alone=st.one_of(st.integers(0, 2), st.none()),
            )(LogWorld.die_agreed)
        )
    )
    cut_orphaned = orphaned(if_here(rule(count=st.integers(1, 400_000))(LogWorld.cut_orphaned)))
    delete = if_here(rule(count=st.integers(1, 2))(LogWorld.delete))

    restart = precondition(
        lambda self: (
            self.file is not None
            and self.here
            and self.saved
            and self.restarts < 2
            and not self.orphaned
        )
    )(
        rule(
            crash=st.booleans(),
            first=st.sampled_from(["", "late", "cut"]),
            before=st.lists(counts, max_size=2),
            away=st.booleans(),
            down=st.lists(counts, max_size=3),
            delete=st.integers(0, 2),
            reuse=st.booleans(),
            orphaned=st.booleans(),
        )(LogWorld.restart)
    )
    stop_supervisor = precondition(
        lambda self: self.file is not None and not self.stopping and not self.orphaned
    )(rule()(LogWorld.stop_supervisor))
    go_on = precondition(lambda self: self.stopping)(rule()(LogWorld.go_on))
    kill = if_may_kill(kill_rule(LogWorld.kill))
    upgrade = precondition(
        lambda self: self.file is not None and self.upgrades < 1 and not self.orphaned
    )(rule()(LogWorld.upgrade))
    supervisor_dies = if_may_die(death_rule(LogWorld.supervisor_dies))
    kill_orphan = orphaned(orphan_rule(LogWorld.kill_orphan))
    takeover = orphaned(takeover_rule(LogWorld.takeover))


def numbers_of_examples(few: int, many: int, asked_for: int) -> list[object]:
    """Return how many examples to try, as parameters of a test.

    It is the requested number, if there is one; otherwise `few`, and in a thorough run also `many`.
    """
    return [asked_for] if asked_for else [few, pytest.param(many, marks=pytest.mark.thorough)]


@pytest.mark.parametrize("examples", numbers_of_examples(6, 60, EXAMPLES))
def test_model(examples: int) -> None:
    """Whatever clients, file and processes do, clients receive exactly the requested bytes."""
    run_state_machine_as_test(Model, settings=settings(OPTIONS, max_examples=examples))


@pytest.mark.parametrize("examples", numbers_of_examples(5, 8, EXAMPLES))
def test_model_of_the_log(examples: int) -> None:
    """Whatever else happens to the path, the clients receive exactly the log."""
    # A failing example often waits for 20 seconds, so finding a shorter one takes minutes.
    phases = [Phase.generate, Phase.shrink] if EXAMPLES else [Phase.generate]
    options = settings(OPTIONS, max_examples=examples, phases=phases, report_multiple_bugs=False)
    run_state_machine_as_test(LogModel, settings=options)


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
