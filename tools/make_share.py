"""Generates the manual pages and shell completions in share/ from the parsers.

Run it after a change of the parsers, the version or the date of its release. A test compares the
files. It needs the extra `test`, with the Python that `target-version` in pyproject.toml names.
"""

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

import shtab
from argparse_manpage.manpage import Manpage

from tailsrv import __version__, arguments

ROOT = Path(__file__).resolve().parents[1]

# One parser for each command that the package installs. Its `prog` gives the files their names.
PARSERS: tuple[Callable[[], argparse.ArgumentParser], ...] = (
    arguments.make_parser,
    arguments.make_health_parser,
    arguments.make_tscat_parser,
    arguments.make_tssync_parser,
)

# A line of an epilog that starts a section of the manual page, such as `signals: TERM ...` or
# `exit status, as plugins have it: 0 OK ...`.
HEADED = re.compile(
    r"(?P<heading>protocol|signals|exit status|files|environment|examples?)"
    r"(?:, (?P<remark>[^:]*))?: +(?P<text>.*)"
)
# The separator of items that get a line each: `0 ended, 1 cannot serve`, `TERM ends, HUP upgrades`.
ITEM = re.compile(r", (?=(?:\d|[A-Z]+) )")
# A command, which follows a colon and two spaces.
SHOWN = re.compile(r"(?P<text>.*:)  (?P<command>\S.*)")


def sections(epilog: str) -> dict[str, list[str]]:
    """Return the paragraphs of an epilog by section; those before the first have an empty key."""
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
    """Return the manual page of the command that `parser` belongs to, as man(7) source.

    `others` are the names of the other commands, for the section SEE ALSO.
    """
    # The default formatter wraps lines at $COLUMNS.
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    description, epilog = parser.description or "", sections(parser.epilog or "")
    # Both are added below, with their lines kept apart. Manpage would join them in a section
    # COMMENTS.
    parser.description = parser.epilog = None
    page = Manpage(parser)
    page.description = re.split(r"[:.]", description[:1].lower() + description[1:])[0]
    page.source = f"tailsrv {__version__}"
    page.manual = "User Commands"
    # Manpage sets today's date.
    page.date = release_date()

    def paragraphs(texts: list[str]) -> str:
        return "\n.PP\n".join(paragraph(text) for text in texts)

    def paragraph(text: str) -> str:
        if shown := SHOWN.fullmatch(text):
            command = paragraph(shown["command"])
            return f"{paragraph(shown['text'])}\n.PP\n.RS 4\n.EX\n{command}\n.EE\n.RE"
        # A line that begins with a dot would be a request of man(7); \& in front prevents that.
        return "\n.br\n".join(r"\&" + page.format_text(line) for line in text.splitlines())

    # Manpage's own synopsis has hyphens instead of minus signs, and breaks lines between an option
    # and its value.
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
    # mandoc recognizes a date only if its hyphens are not escaped.
    return str(page).replace(page.date.replace("-", r"\-"), page.date, 1)


def release_date() -> str:
    """Return the date of this version in the changelog."""
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    return changelog.partition(f"\n## [{__version__}] - ")[2][:10]


def completion(parser: argparse.ArgumentParser, shell: str) -> str:
    """Return the script that completes the command's options and file names in `shell`."""
    for action in parser._actions:
        if action.nargs == argparse.ONE_OR_MORE:
            # shtab would treat all arguments after this one as further values of it.
            action.nargs = None
        if action.metavar == "FILE":
            # shtab reads this attribute.
            action.complete = shtab.FILE  # type: ignore[attr-defined]
    return str(shtab.complete(parser, shell)).rstrip() + "\n"


def shared_files() -> dict[str, str]:
    """Return the contents of the generated files by path; the paths begin with `share/`."""
    names = [make().prog for make in PARSERS]
    files = {}
    for make, name in zip(PARSERS, names, strict=True):
        files[f"share/man/man1/{name}.1"] = manual_page(
            make(), [other for other in names if other != name]
        )
        files[f"share/bash-completion/completions/{name}"] = completion(make(), "bash")
        files[f"share/zsh/site-functions/_{name}"] = completion(make(), "zsh")
    return files


def main() -> None:
    """Write the files below the folder that is given, by default that of the checkout."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    for path, text in shared_files().items():
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
