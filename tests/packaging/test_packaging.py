"""What a user installs and reads: metadata, commands, and documents that fit the program."""

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
from support.checkout import ROOT
from tailsrv.arguments import make_parser
from tailsrv.config import DEFAULT_GRACE, ExitStatus

README = (ROOT / "README.md").read_text()
PAGES = sorted(
    str(page.relative_to(ROOT))
    for pages in ("*.md", "docs/*.md", "contrib/*/*.md")
    for page in ROOT.glob(pages)
)
CHANGELOG = (ROOT / "CHANGELOG.md").read_text()


def project() -> dict[str, Any]:
    table: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return table


def read(page: str) -> str:
    return (ROOT / page).read_text()


def section(page: str, heading: str) -> str:
    """Return the text below that heading of the second level."""
    found = read(page).partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    assert found, f"{page} has no {heading}"
    return found


def rows(text: str) -> set[str]:
    """Return the rows of the tables in `text`, without the lines below their headings."""
    return {
        line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| ---")
    }


def blocks(language: str) -> dict[str, str]:
    """Return the pages' fenced blocks in that language, by page and number."""
    pattern = re.compile(rf"^```{language}\n(.*?)^```$", re.MULTILINE | re.DOTALL)
    return {
        f"{page} {number}": block
        for page in PAGES
        for number, block in enumerate(pattern.findall(read(page)))
    }


def prose(page: str) -> str:
    """Return the page without its fenced blocks, which contain no headings or links."""
    return re.sub(r"^ *```.*?^ *```$", "", read(page), flags=re.MULTILINE | re.DOTALL)


def anchors(page: str) -> set[str]:
    """Return the anchors of the page's headings, as GitHub and GitLab form them."""
    headings = re.findall(r"^#+ (.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def links(page: str) -> list[str]:
    """Return the targets of the page's links within the project."""
    targets = re.findall(r"\]\(([^)\s]+)\)", re.sub(r"`[^`\n]*`", "", prose(page)))
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def marked(mark: str) -> str:
    """Return the command in the README's block after that mark, as `.ci/run` finds it."""
    found = re.findall(rf"^<!-- {mark} -->\n```sh\n(.*)\n```$", README, re.MULTILINE)
    assert len(found) == 1, f"{mark} must mark one block of one line"
    return str(found[0])


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True, timeout=30).stdout


def test_version_is_that_of_the_installed_package() -> None:
    """The installed package has the version that the code has."""
    assert importlib.metadata.version("tailsrv") == tailsrv.__version__


def test_both_ways_to_start_agree() -> None:
    """The console script and `python -m tailsrv` print the same version."""
    script = Path(sysconfig.get_path("scripts")) / "tailsrv"
    assert (
        run(str(script), "--version")
        == run(sys.executable, "-m", "tailsrv", "--version")
        == f"tailsrv {tailsrv.__version__}\n"
    )


@pytest.mark.parametrize(
    ("command", "module"),
    [
        ("tailsrv", "__main__"),
        ("tailsrv-health", "health.main"),
        ("tscat", "client.tscat"),
        ("tssync", "client.tssync"),
    ],
)
def test_console_script_is_declared(command: str, module: str) -> None:
    """The installed package has each command, and each prints its version."""
    scripts = importlib.metadata.distribution("tailsrv").entry_points.select(
        group="console_scripts"
    )
    assert (command, f"tailsrv.{module}:main") in [
        (script.name, script.value) for script in scripts
    ]
    assert (
        run(str(Path(sysconfig.get_path("scripts")) / command), "--version")
        == f"{command} {tailsrv.__version__}\n"
    )


def test_supported_pythons_agree() -> None:
    """requires-python and the tools' targets are the oldest Python in the classifiers."""
    pythons = re.findall(r"Python :: 3\.(\d+)", "\n".join(project()["classifiers"]))
    assert project()["requires-python"] == f">=3.{min(map(int, pythons))}"
    assert importlib.metadata.metadata("tailsrv")["Requires-Python"] == project()["requires-python"]
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]
    assert tools["ruff"]["target-version"] == f"py3{min(map(int, pythons))}"
    assert tools["mypy"]["python_version"] == f"3.{min(map(int, pythons))}"


def test_classified_pythons_are_checked() -> None:
    """`.ci/run` checks each Python that the classifiers name, and no other."""
    pythons = re.findall(r"Python :: (3\.\d+)", "\n".join(project()["classifiers"]))
    assert re.findall(
        r"^for version in (.*); do$", (ROOT / ".ci/run").read_text(), re.MULTILINE
    ) == [" ".join(pythons)]


def test_runtime_dependencies_are_three() -> None:
    """The program needs inotify_simple, setproctitle and psutil, and nothing else."""
    names = {re.split(r"[^\w-]", requirement)[0] for requirement in project()["dependencies"]}
    assert names == {"inotify_simple", "setproctitle", "psutil"}


def test_readme_test_command_uses_the_test_extra() -> None:
    """The README's test command creates its environment with $PYTHON and runs pytest in it."""
    command = marked("test-command")
    assert command.startswith("${PYTHON:-python3} -m venv ")
    assert "'.[test]'" in command
    assert command.endswith("-m pytest")


def test_readme_start_command_serves() -> None:
    """The README's first command starts the server with options that the program accepts."""
    command = marked("run-command").rpartition(" && ")[2].split()
    assert command[0] == ".venv/bin/tailsrv"
    assert make_parser().parse_args(command[1:]).path == "app.log"


@pytest.mark.parametrize(
    "option", sorted(set(re.findall(r"--[a-z][a-z-]+", make_parser().format_help())))
)
def test_readme_explains_every_option(option: str) -> None:
    """Each long option of the program is in the README's table."""
    assert re.search(rf"^\| .*`{option}[ `]", section("README.md", "Options"), re.MULTILINE)


def test_readme_names_only_existing_options() -> None:
    """Each long option in the README's table is an option of the program."""
    named = set(re.findall(r"^\| .*?`(--[a-z-]+)", section("README.md", "Options"), re.MULTILINE))
    assert named <= set(re.findall(r"--[a-z-]+", make_parser().format_help()))


def test_readme_says_the_default_grace() -> None:
    """The README has the program's default for --grace."""
    assert re.search(
        rf"^\| `--grace SECONDS` .*; {DEFAULT_GRACE:g} by default \|$", README, re.MULTILINE
    )


@pytest.mark.parametrize("status", ExitStatus)
def test_manual_explains_every_exit_status(status: ExitStatus) -> None:
    """Each exit status is in the manual's table."""
    assert f"\n| {status.value} | " in section("docs/using.md", "Exit statuses")


def test_readme_has_no_figures_of_its_own() -> None:
    """Each row of the README's performance table is a row of the manual's."""
    table = rows(section("README.md", "Performance"))
    assert table
    assert table <= rows(read("docs/performance.md"))


def test_readme_is_short() -> None:
    """The README has at most 180 lines; longer texts belong in the manual."""
    assert len(README.splitlines()) <= 180


def test_manual_lists_its_pages() -> None:
    """The manual's table of contents links to each of its pages."""
    assert {str(page.name) for page in (ROOT / "docs").glob("*.md")} - {"README.md"} <= set(
        links("docs/README.md")
    )


def test_examples_are_of_this_version() -> None:
    """The output that the manual shows is of this version."""
    shown = re.findall(r"version\W+(\d+\.\d+\.\d+)", read("docs/health.md"))
    assert shown
    assert set(shown) == {tailsrv.__version__}


@pytest.mark.parametrize("page", PAGES)
def test_links_have_targets(page: str) -> None:
    """Each link within the project leads to an existing file and heading."""
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), link
        assert not anchor or anchor in anchors(str(target.resolve().relative_to(ROOT))), link


@pytest.mark.parametrize("page", PAGES)
def test_headings_have_distinct_anchors(page: str) -> None:
    """No page has two headings with the same anchor."""
    headings = re.findall(r"^##+ (.*)$", prose(page), re.MULTILINE)
    # In the changelog, each version has the same headings.
    if page != "CHANGELOG.md":
        assert len(headings) == len(anchors(page)) - 1


@pytest.mark.parametrize("program", blocks("python").values(), ids=blocks("python"))
def test_python_examples_are_valid(program: str) -> None:
    """The Python examples in the pages are valid Python."""
    ast.parse(program)


@pytest.mark.parametrize("commands", blocks("sh").values(), ids=blocks("sh"))
def test_shell_examples_are_valid(commands: str) -> None:
    """The shell commands in the pages are valid bash."""
    run("bash", "-n", "-c", commands)


@pytest.mark.parametrize("page", PAGES)
def test_what_root_installs_can_be_run_by_others(page: str) -> None:
    """Each installation into /opt sets a umask that lets the service's user run the program."""
    spans = re.findall(r"`([^`]+)`", read(page).replace("```", "`"))
    installs = [
        span.removeprefix("sh\n") for span in spans if "/opt/tailsrv/bin/pip install" in span
    ]
    assert [commands for commands in installs if not re.match(r"umask 022[;\n]", commands)] == []
    if page in ("docs/operations.md", "contrib/relay/README.md"):
        assert installs


def test_changelog_has_the_version() -> None:
    """The changelog has unreleased changes first, and then this version; versions have dates."""
    entries = re.findall(r"^## \[(.*?)\](?: - (\d{4}-\d\d-\d\d))?$", CHANGELOG, re.MULTILINE)
    assert entries[0] == ("Unreleased", "")
    assert entries[1][0] == tailsrv.__version__
    assert all(date for _, date in entries[1:])


def test_licence_is_in_the_package() -> None:
    """The installed package has its licence."""
    files = importlib.metadata.files("tailsrv")
    assert files is not None
    assert "UNLICENSE" in [file.name for file in files]
