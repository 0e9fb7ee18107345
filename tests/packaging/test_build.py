"""The manual pages and completions that a build makes from the parsers, in an sdist's wheel."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from argparse import ArgumentParser
from pathlib import Path

import pytest

import tailsrv
from support.checkout import ROOT
from support.tools import missing
from tailsrv.arguments import make_health_parser, make_parser, make_tscat_parser, make_tssync_parser

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PARSERS = [make_parser(), make_health_parser(), make_tscat_parser(), make_tssync_parser()]

# A time at which the local date is a day ahead of UTC, and a very narrow terminal.
ENVIRONMENT = {"SOURCE_DATE_EPOCH": "1700000000", "TZ": "XXX-9", "COLUMNS": "20"}
DATE = "2023-11-14"

pytestmark = [pytest.mark.build, pytest.mark.slow]


def run(*command: str | Path, **more: str) -> str:
    result = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, **more}
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def requirements(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in which the build's requirements are installed."""
    folder = tmp_path_factory.mktemp("requirements")
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--target",
        str(folder),
        *PROJECT["build-system"]["requires"],
    ]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if result.returncode:
        pytest.skip(f"the build's requirements cannot be installed: {result.stderr.strip()[-300:]}")
    return folder


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the checkout, because a build writes files into it."""
    copy = tmp_path_factory.mktemp("sources") / "tailsrv"
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__"),
    )
    return copy


def call_backend(hook: str, sources: Path, requirements: Path) -> Path:
    """Call `hook` of the build backend, and return the path of the file that it made."""
    out = sources.parent / hook
    script = (
        "import sys; from setuptools import build_meta; "
        "print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
    )
    command = f'cd "$1" && exec "$2" -c "{script}" "$3" "$4"'
    printed = run(
        "sh",
        "-c",
        command,
        "sh",
        sources,
        sys.executable,
        hook,
        out,
        PYTHONPATH=str(requirements),
        **ENVIRONMENT,
    )
    return out / printed.splitlines()[-1]


@pytest.fixture(scope="module")
def share(sources: Path, requirements: Path) -> Path:
    """Return the folder PREFIX/share of an installation from the source distribution."""
    sdist = call_backend("build_sdist", sources, requirements)
    out = sources.parent / "wheel"
    # pip builds in isolation, with only the declared requirements installed.
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", out, sdist, **ENVIRONMENT)
    (wheel,) = out.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(out)
    return out / f"tailsrv-{tailsrv.__version__}.data/data/share"


@pytest.fixture(params=PARSERS, ids=lambda parser: str(parser.prog))
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
        if action.dest != "help"
    ]
    return [parser.description or "", parser.epilog or "", *helps]


def words(*texts: str) -> set[str]:
    return set(re.findall(r"[\w-]+", " ".join(texts).lower()))


def read_page(page: Path) -> str:
    """Return what a terminal of 80 columns shows of a manual page."""
    if reason := missing("mandoc"):
        pytest.skip(reason)
    return re.sub(r".\x08", "", run("mandoc", "-T", "utf8", "-O", "width=80", page))


def test_parsers_need_only_the_standard_library() -> None:
    """The parsers can be imported without the server's dependencies."""
    run(
        sys.executable,
        "-I",
        "-S",
        "-c",
        f"import sys; sys.path[:0] = [{str(ROOT)!r}]; import tailsrv.arguments",
    )


def test_every_command_has_its_files(share: Path) -> None:
    """The wheel has a manual page and completions for each command, and no other files."""
    commands = {*PROJECT["project"]["scripts"], *(parser.prog for parser in PARSERS)}
    files = {str(path.relative_to(share)) for path in share.rglob("*") if path.is_file()}
    patterns = ["man/man1/{}.1", "bash-completion/completions/{}", "zsh/site-functions/_{}"]
    assert files == {pattern.format(command) for pattern in patterns for command in commands}


def test_every_module_is_installed(share: Path) -> None:
    """The wheel has each module of the checkout, subpackages included, and no other module."""
    installed = share.parent.parent.parent
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "tailsrv").rglob("*.py")}
    assert {str(path.relative_to(installed)) for path in installed.rglob("*.py")} == modules


def test_new_subpackage_is_installed(tmp_path: Path, requirements: Path) -> None:
    """A new subpackage is installed without an entry in a list."""
    copy = tmp_path / "sources" / "tailsrv"
    shutil.copytree(
        ROOT,
        copy,
        ignore=shutil.ignore_patterns(
            ".*", "build", "dist", "*.egg-info", "__pycache__", "tests", "contrib", "docs"
        ),
    )
    (copy / "tailsrv" / "subpackage").mkdir()
    (copy / "tailsrv" / "subpackage" / "__init__.py").touch()
    wheel = call_backend("build_wheel", copy, requirements)
    assert "tailsrv/subpackage/__init__.py" in zipfile.ZipFile(wheel).namelist()


def test_build_in_a_checkout_writes_only_ignored_files(
    share: Path, sources: Path, requirements: Path
) -> None:
    """A wheel built in a checkout has the same files, and only ignored folders are written."""
    before = {path.name for path in sources.iterdir()}
    wheel = call_backend("build_wheel", sources, requirements)
    names = [
        name.partition("/share/")[2]
        for name in zipfile.ZipFile(wheel).namelist()
        if "/share/" in name
    ]
    assert sorted(names) == sorted(
        str(path.relative_to(share)) for path in share.rglob("*") if path.is_file()
    )
    assert {path.name for path in sources.iterdir()} - before <= {
        "build",
        "tailsrv.egg-info",
        "__pycache__",
    }


def test_editable_install_needs_no_files(sources: Path, requirements: Path) -> None:
    """An editable wheel is built without manual pages and completions."""
    wheel = call_backend("build_editable", sources, requirements)
    assert not [name for name in zipfile.ZipFile(wheel).namelist() if "/share/" in name]


def test_page_explains_every_option(share: Path, parser: ArgumentParser) -> None:
    """The manual page has a paragraph for each option except --help."""
    page = (share / f"man/man1/{parser.prog}.1").read_text()
    described = set(re.findall(r"\\fB(-.*?)\\fR", page.replace(r"\-", "-")))
    assert described == options(parser) - {"-h", "--help"}


def test_page_has_its_sections(share: Path, parser: ArgumentParser) -> None:
    """The manual page has the usual sections, and its first line has date and version."""
    page = (share / f"man/man1/{parser.prog}.1").read_text()
    sections = re.findall(r"^\.SH (.*)", page, re.MULTILINE)
    assert [name for name in sections if name not in ("SIGNALS", "EXAMPLES")] == [
        "NAME",
        "SYNOPSIS",
        "DESCRIPTION",
        "OPTIONS",
        "EXIT STATUS",
        "SEE ALSO",
    ]
    assert f'"{DATE}" "tailsrv {tailsrv.__version__}"' in page.splitlines()[0]


def test_page_is_valid(share: Path, parser: ArgumentParser) -> None:
    """The manual page passes mandoc's lint, fits 80 columns and has the words of the parser."""
    page = share / f"man/man1/{parser.prog}.1"
    text = read_page(page)
    run("mandoc", "-T", "lint", "-W", "warning", page)
    assert max(map(len, text.splitlines())) <= 80
    assert words(*texts(parser)) <= words(text)


def complete_in_bash(share: Path, command: str, *typed: str, folder: Path) -> list[str]:
    """Return the completions that bash offers for the last of the words."""
    script = """
        source "$1"; shift; COMP_WORDS=("$@") COMP_CWORD=$(($# - 1))
        function=$(complete -p "$1" | sed 's/.* -F \\([^ ]*\\) .*/\\1/')
        "$function" "$1" "${@: -1}" "${@: -2:1}"; printf '%s\\n' "${COMPREPLY[@]}"
    """
    source = share / "bash-completion/completions" / command
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
def test_bash_completes(
    share: Path, tmp_path: Path, command: str, typed: list[str], offered: list[str]
) -> None:
    """Bash completes options, choices, and file names where a file is expected."""
    (tmp_path / "app.log").touch()
    assert complete_in_bash(share, command, *typed, folder=tmp_path) == offered


ZSH = r"""
zmodload zsh/zpty || exit
zpty shell zsh -f -i
zpty -w shell "PS1=; fpath=(${(q)1} \$fpath); autoload -Uz compinit; compinit -u -D; print re''ady"
zpty -r shell out '*ready*'
zpty -w -n shell "$2"$'\t'
zpty -r shell out "*$3*" && print completed
"""


@pytest.mark.parametrize(
    ("typed", "shown"),
    [
        ("tailsrv --fol", "--follow-name"),
        ("tailsrv -w 2 ap", "app.log"),
        ("tailsrv-health --format pro", "prometheus"),
        ("tssync a:1 ap", "app.log"),
    ],
)
def test_zsh_completes(share: Path, tmp_path: Path, typed: str, shown: str) -> None:
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
        share / "zsh/site-functions",
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
