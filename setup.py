"""Makes the manual pages and the shells' completions from the parsers, at build time; all else is in pyproject.toml."""

import argparse
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.build import build

ROOT = Path(__file__).resolve().parent
# a build backend does not have the project itself on its path
sys.path.insert(0, str(ROOT))

from tailsrv import __version__, arguments  # noqa: E402 - found only now

# One parser for each command that the package installs; its prog names the files.
PARSERS: tuple[Callable[[], argparse.ArgumentParser], ...] = (
    arguments.make_parser,
    arguments.make_health_parser,
    arguments.make_tscat_parser,
    arguments.make_tssync_parser,
)

# A line of an epilog that opens a section of the manual page: `signals: TERM ...`, `exit status, as plugins have it: 0 OK ...`
HEADED = re.compile(
    r"(?P<heading>protocol|signals|exit status|files|environment|examples?)(?:, (?P<remark>[^:]*))?: +(?P<text>.*)"
)
# `0 ended, 1 cannot serve`, `TERM ends, HUP upgrades`: a line each
ITEM = re.compile(r", (?=(?:\d|[A-Z]+) )")
# a command behind a colon and two spaces
SHOWN = re.compile(r"(?P<text>.*:)  (?P<command>\S.*)")


def sections(epilog: str) -> dict[str, list[str]]:
    """Return an epilog's paragraphs by the section that they belong to; ``: no section."""
    heading, found = "", dict[str, list[str]]()
    for line in filter(None, map(str.strip, epilog.splitlines())):
        headed = HEADED.fullmatch(line)
        heading = headed["heading"] if headed else heading
        remark = [headed["remark"] + ":"] if headed and headed["remark"] else []
        found.setdefault(heading, []).append(
            "\n".join(remark + ITEM.split(headed["text"])) if headed else line
        )
    return found


def manual_page(parser: argparse.ArgumentParser, others: list[str]) -> str:
    """Return the manual page of a command, in man(7)."""
    # late: a source distribution and an editable wheel are made without it
    from argparse_manpage.manpage import Manpage

    # the other one wraps at whatever COLUMNS is
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    description, epilog = parser.description or "", sections(parser.epilog or "")
    # what follows says them, a line each; COMMENTS would run them together
    parser.description = parser.epilog = None
    page = Manpage(parser)
    page.description = re.split(r"[:.]", description[:1].lower() + description[1:])[0]
    page.source = f"tailsrv {__version__}"
    page.manual = "User Commands"
    # The tool's own date depends on the time zone, too.
    page.date = time.strftime(
        "%Y-%m-%d", time.gmtime(int(os.environ.get("SOURCE_DATE_EPOCH", time.time())))
    )

    def paragraphs(texts: list[str]) -> str:
        return "\n.PP\n".join(paragraph(text) for text in texts)

    def paragraph(text: str) -> str:
        if shown := SHOWN.fullmatch(text):
            return f"{paragraph(shown['text'])}\n.PP\n.RS 4\n.EX\n{paragraph(shown['command'])}\n.EE\n.RE"
        # \&: a dot in front would be a request
        return "\n.br\n".join(r"\&" + page.format_text(line) for line in text.splitlines())

    # The tool's own synopsis has hyphens that are not minus signs, and breaks between an option and its value.
    usage = re.findall(r"\[.*?\]|\S+", " ".join(page.synopsis[1:]))
    words = "\n".join(page.format_text(word).replace(" ", r"\ ") for word in usage)
    page.add_section("synopsis", "=", f".SY {page.format_text(parser.prog)}\n{words}\n.YS")
    page.add_section("description", "=", paragraphs([description, *epilog.pop("", [])]))
    for heading, lines in epilog.items():
        page.add_section(heading, "=", paragraphs(lines))
    see = [*others, "tail"]
    page.add_section(
        "see also", "=", ",\n".join(rf"\fB{page.format_text(name)}\fR(1)" for name in see)
    )
    # mandoc knows a date by its plain hyphens
    return str(page).replace(page.date.replace("-", r"\-"), page.date, 1)


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script that completes a command's options and file names in that shell."""
    # late: a source distribution and an editable wheel are made without it
    import shtab

    for action in parser._actions:
        if action.nargs == argparse.ONE_OR_MORE:
            # the tool would take what comes behind for more of them
            action.nargs = None
        if action.metavar == "FILE":
            action.complete = shtab.FILE  # type: ignore[attr-defined]  # how shtab is told
    return str(shtab.complete(parser, shell)).rstrip() + "\n"


def shared_files() -> dict[str, str]:
    """Return what goes under PREFIX/share, by path."""
    names = [make().prog for make in PARSERS]
    files = {}
    for make, name in zip(PARSERS, names, strict=True):
        files[f"share/man/man1/{name}.1"] = manual_page(
            make(), [other for other in names if other != name]
        )
        files[f"share/bash-completion/completions/{name}"] = completion(make(), "bash")
        files[f"share/zsh/site-functions/_{name}"] = completion(make(), "zsh")
    return files


class BuildShared(Command):
    """A step of `build`: writes the files into the build folder, and has them installed as data files."""

    description = "make manual pages and shell completions"
    user_options: list[tuple[str, str | None, str]] = []  # noqa: RUF012 - setuptools has it so
    # set by setuptools; an editable wheel installs no data files
    editable_mode = False

    def initialize_options(self) -> None:
        # not said: finalize_options asks `build`
        self.build_base: str | None = None

    def finalize_options(self) -> None:
        self.set_undefined_options("build", ("build_base", "build_base"))

    def run(self) -> None:
        if self.editable_mode:
            return
        assert self.build_base is not None
        for path, text in shared_files().items():
            file = Path(self.build_base, path)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text, encoding="utf-8")
            self.distribution.data_files = [
                *(self.distribution.data_files or []),
                (str(Path(path).parent), [str(file)]),
            ]


class Build(build):
    """The usual build, and ours behind it."""

    sub_commands = [*build.sub_commands, ("build_shared", None)]  # noqa: RUF012 - setuptools has it so


setup(cmdclass={"build": Build, "build_shared": BuildShared})
