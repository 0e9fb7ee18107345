"""What a user gets: metadata, commands, and documents that say what the program does."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import sysconfig
import tomllib
from pathlib import Path
from typing import Any

import pytest

import tailsrv
from tailsrv.arguments import make_parser
from tailsrv.config import DEFAULT_GRACE, ExitStatus

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def blocks(language: str) -> list[str]:
    """Return the README's fenced blocks in that language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def marked(mark: str) -> str:
    """Return the one command of the README's block behind that mark, as `.ci/run` finds it."""
    found = re.findall(rf"^<!-- {mark} -->\n```sh\n(.*)\n```$", README, re.MULTILINE)
    assert len(found) == 1, f"{mark} must mark one block of one line"
    return str(found[0])


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


def test_version_is_that_of_the_installed_package() -> None:
    """The installed package says the version that the code says."""
    assert importlib.metadata.version("tailsrv") == tailsrv.__version__


def test_both_ways_to_start_agree() -> None:
    """The console script and `python -m tailsrv` are the same program."""
    script = Path(sysconfig.get_path("scripts")) / "tailsrv"
    assert run(str(script), "--version") == run(sys.executable, "-m", "tailsrv", "--version") == f"tailsrv {tailsrv.__version__}\n"


@pytest.mark.parametrize(
    ("command", "module"), [("tailsrv", "cli"), ("tailsrv-health", "health"), ("tscat", "tscat"), ("tssync", "tssync")]
)
def test_console_script_is_declared(command: str, module: str) -> None:
    """The installed package brings its commands, and each is there and says its version."""
    scripts = importlib.metadata.distribution("tailsrv").entry_points.select(group="console_scripts")
    assert (command, f"tailsrv.{module}:main") in [(script.name, script.value) for script in scripts]
    assert run(str(Path(sysconfig.get_path("scripts")) / command), "--version") == f"{command} {tailsrv.__version__}\n"


def test_supported_pythons_are_said_once() -> None:
    """requires-python begins where the classifiers begin, and so do the tools' targets."""
    pythons = re.findall(r"Python :: 3\.(\d+)", "\n".join(project()["classifiers"]))
    assert project()["requires-python"] == f">=3.{min(map(int, pythons))}"
    assert importlib.metadata.metadata("tailsrv")["Requires-Python"] == project()["requires-python"]
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tools["ruff"]["target-version"] == f"py3{min(map(int, pythons))}"
    assert tools["mypy"]["python_version"] == f"3.{min(map(int, pythons))}"


def test_classified_pythons_are_checked() -> None:
    """Every Python that the classifiers name is one that `.ci/run` looks for."""
    pythons = re.findall(r"Python :: (3\.\d+)", "\n".join(project()["classifiers"]))
    assert re.findall(r"^for version in (.*); do$", (ROOT / ".ci/run").read_text(), re.MULTILINE) == [" ".join(pythons)]


def test_runtime_dependencies_are_three() -> None:
    """The program needs inotify_simple, setproctitle and psutil, and nothing else."""
    names = {re.split(r"[^\w-]", requirement)[0] for requirement in project()["dependencies"]}
    assert names == {"inotify_simple", "setproctitle", "psutil"}


def test_readme_test_command_uses_the_test_extra() -> None:
    """The README's test command makes its environment with $PYTHON and runs pytest in it."""
    command = marked("test-command")
    assert command.startswith("${PYTHON:-python3} -m venv ")
    assert "'.[test]'" in command
    assert command.endswith("-m pytest")


def test_readme_start_command_serves() -> None:
    """The README's first command ends in starting the server, with options that the program knows."""
    command = marked("run-command").rpartition(" && ")[2].split()
    assert command[0] == ".venv/bin/tailsrv"
    assert make_parser().parse_args(command[1:]).path == "app.log"


@pytest.mark.parametrize("option", sorted(set(re.findall(r"--[a-z][a-z-]+", make_parser().format_help()))))
def test_readme_explains_every_option(option: str) -> None:
    """Every long option that the program takes is in the README's table."""
    assert re.search(rf"^\| .*`{option}[ `]", README, re.MULTILINE)


def test_readme_names_no_option_that_is_not_there() -> None:
    """Every long option in the README's table is one that the program takes."""
    table = README.partition("\n## Options\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| .*?`(--[a-z-]+)", table, re.MULTILINE)) <= set(re.findall(r"--[a-z-]+", make_parser().format_help()))


def test_readme_says_the_default_grace() -> None:
    """The README's default for --grace is the program's."""
    assert re.search(rf"^\| `--grace SECONDS` .*; {DEFAULT_GRACE:g} by default \|$", README, re.MULTILINE)


@pytest.mark.parametrize("status", ExitStatus)
def test_readme_explains_every_exit_status(status: ExitStatus) -> None:
    """Every exit status is in the README's table."""
    table = README.partition("\n## Exit statuses\n")[2].partition("\n## ")[0]
    assert f"\n| {status.value} | " in table


def test_readme_python_is_python() -> None:
    """The README's Python client compiles."""
    clients = blocks("python")
    assert clients
    for client in clients:
        ast.parse(client)


def test_readme_shell_is_shell() -> None:
    """Bash can read the README's commands."""
    commands = blocks("sh")
    assert commands
    for command in commands:
        run("bash", "-n", "-c", command)


def test_changelog_has_the_version() -> None:
    """The changelog speaks of this version, or of what is not released yet."""
    assert re.search(rf"^## \[(Unreleased|{re.escape(tailsrv.__version__)})\]", CHANGELOG, re.MULTILINE)


def test_licence_is_in_the_package() -> None:
    """The installed package brings its licence."""
    files = importlib.metadata.files("tailsrv")
    assert files is not None
    assert "UNLICENSE" in [file.name for file in files]
