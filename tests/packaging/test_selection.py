"""The tests that a plain run of pytest leaves out and reports, tried on a small project."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from support.checkout import ROOT
from support.selection import LEFT_OUT, first_reason, parallel_processes, skipped_lines
from support.tools import NOT_INSTALLED

FILES = {
    "test_fast.py": """
        def test_plain(): pass
        @pytest.mark.thorough
        def test_thorough(): pass
        @pytest.mark.sample(2)
        @pytest.mark.parametrize("case", "abcd")
        def test_cases(case): pass
        """,
    "test_booted.py": """
        pytestmark = pytest.mark.machine
        def test_one(): pass
        @pytest.mark.thorough
        def test_two(): pass
        """,
    "test_tools.py": """
        def test_there():
            assert missing("sh") == ""
        def test_not_there():
            pytest.skip(missing("sh", "no-such-tool"))
        """,
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """Return the folder of a small project with the same rules."""
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\ntestpaths = tests\n"
        "addopts = --strict-markers -p no:cacheprovider -p xdist.plugin\n"
    )
    (tests := tmp_path / "tests").mkdir()
    (tests / "conftest.py").write_text('pytest_plugins = ["support.selection"]\n')
    for name, text in FILES.items():
        lines = [line.removeprefix(8 * " ") for line in text.splitlines()]
        (tests / name).write_text(
            "import pytest\nfrom support.tools import missing\n" + "\n".join(lines)
        )
    return tmp_path


def run(project: Path, *arguments: str) -> str:
    """Return what pytest prints in `project`."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")
    }
    environment = {
        **inherited,
        "PYTHONPATH": str(ROOT / "tests"),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1",
    }
    command = [sys.executable, "-m", "pytest", "-v", *arguments]
    return subprocess.run(
        command, cwd=project, env=environment, capture_output=True, text=True, timeout=120
    ).stdout


def passed(output: str) -> set[str]:
    """Return the names of passed tests in the output of `pytest -v`, with or without xdist."""
    return {
        name
        for line in output.splitlines()
        if " PASSED " in line
        for name in re.findall(r"::(test_[\w[\]]+)", line)
    }


@pytest.mark.slow
def test_plain_run(project: Path) -> None:
    """A plain run leaves out marked tests, and prints the command that runs only those."""
    output = run(project)
    assert passed(output) == {"test_plain", "test_there", "test_cases[a]", "test_cases[b]"}
    assert f"left out: 3 thorough: they {LEFT_OUT['thorough']}\n" in output
    assert f"left out: 2 machine: they {LEFT_OUT['machine']}\n" in output
    assert f"skipped, {NOT_INSTALLED}no-such-tool (1): apt-get install no-such-tool\n" in output
    (command,) = re.findall("^to run them: (.*)$", output, re.MULTILINE)
    assert command == f"{sys.executable} -m pytest -v -m 'machine or thorough'"
    output = run(project, *shlex.split(command)[3:])
    assert passed(output) == {
        "test_thorough",
        "test_one",
        "test_two",
        "test_cases[c]",
        "test_cases[d]",
    }
    assert "left out: " not in output


@pytest.mark.thorough
@pytest.mark.slow
def test_named_file_in_several_processes(project: Path) -> None:
    """Tests of a named file all run, and several processes count a left-out test once."""
    output = run(project, "-n", "2", "tests/test_booted.py::test_two", "tests")
    assert passed(output) == {
        "test_plain",
        "test_there",
        "test_two",
        "test_one",
        "test_cases[a]",
        "test_cases[b]",
    }
    assert f"left out: 3 thorough: they {LEFT_OUT['thorough']}\n" in output
    assert "left out: 2 machine: " not in output


@pytest.mark.parametrize(
    ("markers", "expected"),
    [
        ([], None),
        (["slow", "parametrize"], None),
        (["slow", "thorough"], "thorough"),
        (["thorough", "machine"], "machine"),
    ],
)
def test_first_reason(markers: list[str], expected: str | None) -> None:
    """A test with several markers is counted under what it needs, not under `thorough`."""
    assert first_reason(markers) == expected


def test_ci_runs_everything() -> None:
    """`.ci/run` runs each marker that a plain run leaves out."""
    script = (ROOT / ".ci/run").read_text()
    expressions = re.findall(r'(?:pytest.* -m |\bmarkers=")([^"\n]*)', script)
    assert set(LEFT_OUT) <= set(re.findall(r"\w+", " ".join(expressions)))


def test_skipped_lines() -> None:
    """Reasons are counted, the most frequent first; for a missing tool, its package is named."""
    reasons = [
        "needs root, to mount",
        "no IPv6",
        "no machine: not root",
        f"no hosts: {NOT_INSTALLED}ip, strace",
        f"{NOT_INSTALLED}strace",
    ]
    assert skipped_lines(reasons) == [
        "skipped: 2: needs root",
        "skipped: 1: no IPv6",
        "skipped, not installed: ip (1), strace (2): apt-get install iproute2 strace",
    ]
    assert skipped_lines([]) == []


@pytest.mark.parametrize(
    ("arguments", "processors", "expected"),
    [
        (["tests"], 1, 4),
        (["tests"], 2, 4),
        (["tests"], 4, 8),
        (["tests"], 64, 16),
        (["test_a.py"], 8, 0),
        (["test_a.py::test_one", "test_a.py::test_two"], 8, 0),
        (["test_a.py", "test_b.py"], 8, 2),
        ([f"test_{number}.py" for number in range(9)], 2, 4),
    ],
)
def test_parallel_processes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    processors: int,
    expected: int,
) -> None:
    """A full run uses more processes than processors; a single file runs without xdist."""
    (tmp_path / "tests").mkdir()
    monkeypatch.chdir(tmp_path)
    assert parallel_processes(arguments, processors) == expected
