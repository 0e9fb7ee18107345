"""Which tests a plain run of pytest leaves out, and the summary of the tests that did not run."""

import os
import re
import shlex
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import pytest

from support.tools import NOT_INSTALLED, packages

# The only list of the markers that a plain run leaves out, each with what its tests need. A -m
# option replaces it. From a file that is named on the command line, nothing is left out.
LEFT_OUT = {
    "machine": "boot a small Debian in systemd-nspawn; need root, debootstrap and minutes",
    "hosts": "make hosts of network namespaces; need root, iproute2 and HAProxy",
    "build": "build and install the project with pip; need the package index and half a minute",
    "faults": "make system calls of a running server fail; need strace and two minutes",
    "thorough": "try every case where other tests try a few; need two minutes",
}

# Each pytest process passes on what it has left out to the process that prints the summary.
_left_out = pytest.StashKey[dict[str, int]]()
_cases = pytest.StashKey[Counter[tuple[Path, str]]]()


def named_files(arguments: Iterable[str]) -> set[Path]:
    """Return the files that pytest's arguments name, with or without a test after the name."""
    paths = (Path(argument.partition("::")[0]) for argument in arguments)
    return {path.resolve() for path in paths if not path.is_dir()}


def parallel_processes(arguments: Iterable[str], processors: int) -> int:
    """Return the number of processes for the tests that the arguments name; 0 means this process.

    Most tests mostly wait for another process, so there are more processes than processors. The
    tests of one file run in one process, one after another, so one file needs no second process.
    """
    files = named_files(arguments)
    most = min(max(4, 2 * processors), 16)
    return min(len(files), most) if len(files) > 1 else 0 if files else most


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Define what `-n auto` means, unless the variable of xdist does."""
    if "PYTEST_XDIST_AUTO_NUM_WORKERS" in os.environ:
        return None
    return parallel_processes(config.args, len(os.sched_getaffinity(0)))


def pytest_configure(config: pytest.Config) -> None:
    """Register the markers."""
    for name, what in LEFT_OUT.items():
        config.addinivalue_line("markers", f"{name}: left out of a plain run: tests that {what}")
    config.addinivalue_line(
        "markers", "sample(count): a plain run has the first `count` cases, the others are thorough"
    )
    config.stash[_left_out] = {}
    config.stash[_cases] = Counter()


def pytest_itemcollected(item: pytest.Item) -> None:
    """Mark the cases that are not part of the sample."""
    if (sample := item.get_closest_marker("sample")) is not None:
        cases, test = item.config.stash[_cases], (item.path, item.name.partition("[")[0])
        cases[test] += 1
        if cases[test] > sample.args[0]:
            item.add_marker("thorough")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what a plain run leaves out, and count it by marker."""
    if config.option.markexpr:
        return
    named = named_files(config.args)
    why = [
        None if item.path in named else first_reason(marker.name for marker in item.iter_markers())
        for item in items
    ]
    config.stash[_left_out] = dict(Counter(filter(None, why)))
    config.hook.pytest_deselected(
        items=[item for item, marker in zip(items, why, strict=True) if marker]
    )
    items[:] = [item for item, marker in zip(items, why, strict=True) if not marker]


def first_reason(markers: Iterable[str]) -> str | None:
    """Return the first of `markers` that is in LEFT_OUT, None if a plain run includes the test."""
    found = set(markers)
    return next((name for name in LEFT_OUT if name in found), None)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Pass on what has been left out, if this is one of several test processes."""
    output = getattr(session.config, "workeroutput", None)
    if output is not None:
        output["left_out"] = session.config.stash[_left_out]


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """Store what a test process has left out; each of them has collected all tests."""
    left_out = getattr(node, "workeroutput", {}).get("left_out")
    if left_out:
        node.config.stash[_left_out] = left_out  # type: ignore[attr-defined]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    """Print which tests did not run, and the command that runs them."""
    skipped = (report.longrepr for report in terminalreporter.stats.get("skipped", []))
    reasons = [
        str(where[2]).removeprefix("Skipped: ") for where in skipped if isinstance(where, tuple)
    ]
    lines = [
        *left_out_lines(config.stash[_left_out], config.invocation_params.args),
        *skipped_lines(reasons),
    ]
    if lines:
        terminalreporter.section("not run")
        for line in lines:
            terminalreporter.line(line)


def left_out_lines(left_out: dict[str, int], arguments: Iterable[str]) -> list[str]:
    """Return the lines about the tests, by marker, that a run with `arguments` leaves out."""
    if not left_out:
        return []
    names = [name for name in LEFT_OUT if name in left_out]
    command = shlex.join([python(), "-m", "pytest", *arguments, "-m", " or ".join(names)])
    lines = [f"left out: {left_out[name]} {name}: they {LEFT_OUT[name]}" for name in names]
    return [*lines, f"to run them: {command}"]


def python() -> str:
    """Return this interpreter as a user would type it here."""
    here = f"{Path.cwd()}{os.sep}"
    return sys.executable.removeprefix(here)


def skipped_lines(reasons: Iterable[str]) -> list[str]:
    """Return the lines about the tests that were skipped for `reasons`."""
    tools, others = Counter[str](), Counter[str]()
    for reason in reasons:
        if NOT_INSTALLED in reason:
            tools.update(re.split(", ", reason.partition(NOT_INSTALLED)[2]))
        else:
            others[
                "needs root"
                if re.search(r"\b(only|takes|needs|requires|not) root\b", reason)
                else reason
            ] += 1
    lines = [f"skipped: {count}: {reason}" for reason, count in others.most_common()]
    if tools:
        counts = ", ".join(f"{tool} ({count})" for tool, count in sorted(tools.items()))
        lines.append(
            f"skipped, not installed: {counts}: apt-get install {' '.join(packages(*tools))}"
        )
    return lines
