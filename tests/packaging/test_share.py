"""The manual pages and completions in share/, which tools/make_share.py makes from the parsers."""

import os
import re
import subprocess
import tomllib
from argparse import SUPPRESS, ArgumentParser
from pathlib import Path

import pytest
from make_share import PARSERS, release_date, shared_files

import tailsrv
from support.checkout import ROOT
from support.tools import missing

SHARE = ROOT / "share"


def run(*command: str | Path) -> str:
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(params=[make() for make in PARSERS], ids=lambda parser: str(parser.prog))
def parser(request: pytest.FixtureRequest) -> ArgumentParser:
    assert isinstance(request.param, ArgumentParser)
    return request.param


def options(parser: ArgumentParser) -> set[str]:
    return set(
        re.findall(
            r"(?<![\w-])--?[a-z][a-z-]*",
            parser.format_help().partition("\n\n")[2].partition("options:")[2],
        )
    )


def texts(parser: ArgumentParser) -> list[str]:
    """Return the description, epilog and help texts of the parser."""
    helps = [
        (action.help or "") % {**vars(action), "prog": parser.prog}
        for action in parser._actions
        if action.dest != "help" and action.help != SUPPRESS
    ]
    return [parser.description or "", parser.epilog or "", *helps]


def words(*texts: str) -> set[str]:
    return set(re.findall(r"[\w-]+", " ".join(texts).lower()))


def read_page(page: Path) -> str:
    """Return what a terminal of 80 columns shows of a manual page."""
    if reason := missing("mandoc"):
        pytest.skip(reason)
    return re.sub(r".\x08", "", run("mandoc", "-T", "utf8", "-O", "width=80", page))


def test_every_command_has_its_files() -> None:
    """There is a manual page and a completion for each shell for each command."""
    commands = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    patterns = [
        "share/man/man1/{}.1",
        "share/bash-completion/completions/{}",
        "share/zsh/site-functions/_{}",
    ]
    assert shared_files().keys() == {
        pattern.format(command) for pattern in patterns for command in commands
    }


def test_files_are_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    """The folder has what the script generates on a narrow terminal, and no other files."""
    monkeypatch.setenv("COLUMNS", "20")
    made = shared_files()
    files = [path for path in SHARE.rglob("*") if path.is_file()]
    assert {str(path.relative_to(ROOT)) for path in files} == made.keys()
    for path, text in made.items():
        assert (ROOT / path).read_text() == text, f"{path}: run tools/make_share.py"


def test_page_explains_every_option(parser: ArgumentParser) -> None:
    """The manual page has a paragraph for each option except --help."""
    page = (SHARE / f"man/man1/{parser.prog}.1").read_text()
    described = set(re.findall(r"\\fB(-.*?)\\fR", page.replace(r"\-", "-")))
    assert described == options(parser) - {"-h", "--help"}


def test_page_has_its_sections(parser: ArgumentParser) -> None:
    """The manual page has the usual sections, and its first line has date and version."""
    page = (SHARE / f"man/man1/{parser.prog}.1").read_text()
    sections = re.findall(r"^\.SH (.*)", page, re.MULTILINE)
    assert [name for name in sections if name not in ("SIGNALS", "EXAMPLES")] == [
        "NAME",
        "SYNOPSIS",
        "DESCRIPTION",
        "OPTIONS",
        "EXIT STATUS",
        "SEE ALSO",
    ]
    assert f'"{release_date()}" "tailsrv {tailsrv.__version__}"' in page.splitlines()[0]


def test_page_is_valid(parser: ArgumentParser) -> None:
    """The manual page passes mandoc's lint, fits 80 columns and has the words of the parser."""
    page = SHARE / f"man/man1/{parser.prog}.1"
    text = read_page(page)
    run("mandoc", "-T", "lint", "-W", "warning", page)
    assert max(map(len, text.splitlines())) <= 80
    assert words(*texts(parser)) <= words(text)


def complete_in_bash(command: str, *typed: str, folder: Path) -> list[str]:
    """Return the completions that bash offers for the last of the words."""
    script = """
        source "$1"; shift; COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
        function=$(complete -p "$1" | sed 's/.* -F \\([^ ]*\\) .*/\\1/')
        "$function" "$1" "${@: -1}" "${@: -2:1}"; printf '%s\\n' "${COMPREPLY[@]}"
    """
    source = SHARE / "bash-completion/completions" / command
    result = subprocess.run(
        ["bash", "-c", script, "bash", source, command, *typed],
        capture_output=True,
        text=True,
        timeout=30,
        cwd=folder,
    )
    return result.stdout.split()


@pytest.mark.parametrize(
    ("command", "typed", "offered"),
    [
        ("tailsrv", ["--fol"], ["--follow-name"]),
        ("tailsrv", ["app.log", "--ver"], ["--verbose", "--version"]),
        ("tailsrv", ["-w", "2", "ap"], ["app.log"]),
        ("tailsrv", ["--grace", "a"], []),
        ("tailsrv", ["app.log", ""], []),
        ("tailsrv-health", ["--format", "pro"], ["prometheus"]),
        ("tailsrv-health", [""], []),
        ("tscat", ["--un"], ["--until-idle"]),
        ("tssync", ["--on-mismatch", "r"], ["restart"]),
        ("tssync", ["localhost:1", "ap"], ["app.log"]),
    ],
)
def test_bash_completes(tmp_path: Path, command: str, typed: list[str], offered: list[str]) -> None:
    """Bash completes options, choices, and file names where a file is expected."""
    (tmp_path / "app.log").touch()
    assert complete_in_bash(command, *typed, folder=tmp_path) == offered


ZSH = r"""
zmodload zsh/zpty || exit
zpty shell zsh -f -i
zpty -w shell "PS1=; fpath=(${(q)1} \$fpath); autoload -Uz compinit; compinit -u -D; print re''ady"
zpty -r shell out '*ready*'
zpty -w -n shell "$2"$'\t'
zpty -r shell out "*$3*" && print completed
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("tailsrv --fol", "--follow-name"),
        ("tailsrv -w 2 ap", "app.log"),
        ("tailsrv-health --format pro", "prometheus"),
        ("tssync a:1 ap", "app.log"),
    ],
)
def test_zsh_completes(tmp_path: Path, typed: str, shown: str) -> None:
    """An interactive zsh finds the functions in its fpath and completes with them."""
    if reason := missing("zsh"):
        pytest.skip(reason)
    (tmp_path / "app.log").touch()
    command: list[str | Path] = [
        "zsh",
        "-f",
        "-c",
        ZSH,
        "zsh",
        SHARE / "zsh/site-functions",
        typed,
        shown,
    ]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=30,
        cwd=tmp_path,
        env={**os.environ, "TERM": "dumb"},
    )
    assert result.stdout.endswith("completed\n"), result
