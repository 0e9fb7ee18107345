"""Tests of the decision which files are the segments of the log."""

from dataclasses import dataclass, field

import pytest

from tailsrv.supervisor.segment_chain import (
    Chain,
    File,
    dated,
    decide,
    files_between,
    following,
    rotated,
)
from tailsrv.supervisor.state_file import HEAD, Fingerprint, SavedSegment

DEVICE = 7


@pytest.mark.parametrize(
    ("base", "name", "expected"),
    [
        ("log", "log.1", ((-1,), False)),
        ("log", "log.12", ((-12,), False)),
        ("log", "log.1.gz", ((-1,), True)),
        ("log", "log.1.zst", ((-1,), True)),
        ("log", "log-20260101", ((20260101,), False)),
        ("log", "log-20260101.bz2", ((20260101,), True)),
        ("log", "log.2026-01-01", ((2026, 1, 1), False)),
        ("log", "log-202601", ((202601,), False)),
        ("log", "log-20260101-1712345678", ((20260101, 1712345678), False)),
        ("log", "log.2026-01-01T10:20:30Z", ((2026, 1, 1, 10, 20, 30), False)),
        ("log", "log.1234567890", ((1234567890,), False)),
        ("app.log", "app.log.1", ((-1,), False)),
        ("app.log", "app-20260101.log", ((20260101,), False)),
        ("app.log", "app.1.log", ((-1,), False)),
        ("app.log", "app-20260101.log.gz", ((20260101,), True)),
        ("app.log", "app.1.log.xz", ((-1,), True)),
        (".log", ".log.1", ((-1,), False)),
        ("current", "@400000006a5b2c3d12345678.s", ((0x400000006A5B2C3D12345678,), False)),
        ("current", "@400000006a5b2c3d12345678.u", ((0x400000006A5B2C3D12345678,), False)),
        # The target of a symbolic link that rotatelogs keeps.
        ("log.1234567890", "log.1234567000", ((1234567000,), False)),
        ("app-2026-01-02.log", "app-2026-01-01.log", ((2026, 1, 1), False)),
        ("app-2026-01-02.log", "app-2026-01-01.log.gz", ((2026, 1, 1), True)),
    ],
)
def test_rotated(base: str, name: str, expected: tuple[tuple[int, ...], bool]) -> None:
    """These are names of rotated files."""
    assert rotated(name, base) == expected


# Logs of another instance, port or component, backups, and other files of the same program.
OTHERS = {
    "log": "log log.state log.lock log.bak log.bak~ log.swp .log.swp log.1~ log.1.tmp log.gz log."
    " log- log1 log2026 log-1 log-8080 log_2 log.1.2 log.x.1 logs.1 blog.1 log..1 log.-1 log.1\n"
    " log.\N{ARABIC-INDIC DIGIT ONE} @400000006a5b2c3d12345678.s",
    "app.log": "app-2.log app-8080.log app.error.log app.1 app.log.log apps.1.log",
    "current": "@400000006a5b2c3d.s state",
    "log.2": "log.1",
    "log.1234567890": "blog.1234567890 log.1234567890",
}


@pytest.mark.parametrize("base", OTHERS)
def test_not_rotated(base: str) -> None:
    """These files do not belong to the log."""
    assert [name for name in OTHERS[base].split(" ") if rotated(name, base)] == []


def file(name: str, inode: int, size: int = 10, modified: int = 0) -> File:
    """Return a file in a listing. Its modification time is by default its inode number."""
    numbers, compressed = rotated(name, "log") or ((), False)
    return File("/" + name, (DEVICE, inode), size, modified or inode, numbers, compressed)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ([file("log.1", 5), file("log", 6)], ""),
        ([file("log.2", 5), file("log.1", 6), file("log", 7)], "log.1"),
        ([file("log.3", 5), file("log.2", 6), file("log.1", 7), file("log", 8)], "log.2 log.1"),
        # The names do not decide, rotatelogs -n uses them in turn.
        (
            [file("log.2", 6), file("log.1", 7), file("log.3", 8), file("log", 9)],
            "log.2 log.1 log.3",
        ),
        # Modified at the same moment: a higher number is older, a later date is newer.
        ([file("log.10", 6, 1, 9), file("log.9", 7, 1, 9), file("log", 8)], "log.10 log.9"),
        (
            [file("log-20260102", 6, 1, 9), file("log-20260101", 7, 1, 9), file("log", 8)],
            "log-20260101 log-20260102",
        ),
        # An older file, and a sealed segment to which a writer has appended.
        ([file("log.3", 2), file("log.2", 4, 10, 99), file("log.1", 5), file("log", 6)], ""),
        # A writer has appended to the active file after the file that came later.
        ([file("log.2", 5, 10, 99), file("log.1", 6), file("log", 7)], "log.1"),
        # The present file is none between, whatever its time is.
        ([file("log.1", 5), file("log.2", 9), file("log", 6)], "log.2"),
        ([file("log.2", 6), file("log.1.gz", 7), file("log", 8)], "log.2 log.1.gz"),
        ([file("log.1", 5)], ""),
    ],
)
def test_files_between(files: list[File], expected: str) -> None:
    """Inode 5 was active and modified at 5, and 4 is a sealed segment."""
    present = next((it.identity for it in files if it.name == "/log"), None)
    for listing in (files, files[::-1]):
        between = files_between(listing, {(DEVICE, 4), (DEVICE, 5)}, 5, present)
        assert " ".join(it.name[1:] for it in between) == expected


def shown(chain: Chain) -> str:
    """Return the chain as words: base, size (or ? if active) and name of each file."""
    sizes = ("?" if link.size is None else link.size for link in chain.links)
    words = (
        f"{link.base}+{size}:{link.file.name[1:]}"
        for link, size in zip(chain.links, sizes, strict=True)
    )
    return " ".join([*words, f"end={chain.end}"])


def test_following() -> None:
    """While the server runs, the new files follow the end of the active one."""
    old, between, present = file("log.2", 5), file("log.1", 6), file("log", 7)
    files, active = [old, between, present], old.identity
    chain = following(files, present, {active}, [active], 5, 100)
    assert shown(chain) == "100+10:log.1 110+?:log end=120"
    assert not chain.warnings
    # The path names the active file (again), or no file.
    assert shown(following(files, old, {active}, [active], 5, 100)) == "end=100"
    assert shown(following(files[:1], None, {active}, [active], 5, 100)) == "end=100"
    assert shown(following(files[:2], None, {active}, [active], 5, 100)) == "100+?:log.1 end=110"
    # A sealed segment has got the name of the path again.
    known = {active, present.identity}
    chain = following([old, present], present, known, [active], 5, 100)
    assert shown(chain) == "100+?:log end=110"
    # The active file has got it again, after another file had it.
    chain = following(files, present, known, [present.identity, active], 5, 100)
    assert shown(chain) == "end=100"


def head(text: str) -> bytes:
    """Return the beginning of a file, which is long enough for a full fingerprint."""
    return text.encode() * HEAD


def segment(
    base: int, size: int, inode: int, begin: bytes, *, sealed: bool = True, modified: int = 0
) -> SavedSegment:
    """Return a saved segment whose file began with `begin`."""
    return SavedSegment(
        base, size, sealed, inode, modified or inode, Fingerprint.of(begin[:size]), f"/old{inode}"
    )


BIG = 5000
# The log at the last save: 3 and 4 are sealed, 5 is active.
SAVED = [
    segment(1000, BIG, 3, head("c")),
    segment(6000, BIG, 4, head("d")),
    segment(11000, BIG, 5, head("e"), sealed=False),
]
# The active segment had a few bytes only, as after a crash.
SHORT = [*SAVED[:2], segment(11000, 10, 5, b"a few byte", sealed=False)]
EMPTY = [*SAVED[:2], segment(11000, 0, 5, b"", sealed=False)]
FEW = b"a few bytes more"
SEALED = "1000+5000:log.3 6000+5000:log.2"
LOG3, LOG2 = file("log.3", 3, BIG), file("log.2", 4, BIG)
HEADS = {3: head("c"), 4: head("d"), 5: head("e"), 6: head("f"), 7: head("g"), 8: head("h")}
GONE = "offsets from 1000 to 16000 are gone: '/old5'"
OLD_OFFSETS = "offsets from 16000 on may name other bytes"


@dataclass
class Case:
    """What is found, and the beginnings of warnings."""

    saved: list[SavedSegment]
    files: list[File]
    expected: str
    warnings: list[str] = field(default_factory=list)
    heads: dict[int, bytes | None] = field(default_factory=dict)


CASES = {
    "nothing happened": Case(
        SAVED,
        [LOG3, LOG2, file("log", 5, BIG)],
        f"{SEALED} 11000+?:log end=16000",
    ),
    "the active file has grown": Case(
        SHORT, [LOG3, LOG2, file("log", 5, 600)], f"{SEALED} 11000+?:log end=11600", heads={5: FEW}
    ),
    "one rotation": Case(
        SAVED,
        [LOG3, LOG2, file("log.1", 5, BIG + 3), file("log", 6, 0)],
        f"{SEALED} 11000+5003:log.1 16003+?:log end=16003",
    ),
    "a sealed file has got late bytes": Case(
        SAVED,
        [LOG3, file("log.2", 4, BIG + 9, 99), file("log.1", 5, BIG), file("log", 6)],
        f"{SEALED} 11000+5000:log.1 16000+?:log end=16010",
    ),
    "the active file has got late bytes": Case(
        SAVED,
        [LOG3, LOG2, file("log.2", 5, BIG + 9, 99), file("log.1", 6), file("log", 7)],
        f"{SEALED} 11000+5009:log.2 16009+10:log.1 16019+?:log end=16029",
    ),
    "three rotations, the oldest fell off": Case(
        SAVED,
        [
            file("log.4", 4, BIG),
            file("log.3", 5, BIG),
            file("log.2", 6),
            file("log.1", 7),
            file("log", 8),
        ],
        "6000+5000:log.4 11000+5000:log.3 16000+10:log.2 16010+10:log.1 16020+?:log end=16030",
        ["offsets from 1000 to 6000 are gone: '/old3' was deleted"],
    ),
    "a gap: what is before it goes, too": Case(
        SAVED,
        [file("log.3", 3, BIG), file("log", 5, BIG)],
        "11000+?:log end=16000",
        ["offsets from 1000 to 11000 are gone: '/old4' was deleted"],
    ),
    "an empty segment is no gap": Case(
        [SAVED[0], segment(6000, 0, 9, b""), segment(6000, BIG, 5, head("e"), sealed=False)],
        [LOG3, file("log", 5, BIG)],
        "1000+5000:log.3 6000+?:log end=11000",
    ),
    "the path names no file": Case(
        SAVED, [LOG3, LOG2, file("log.1", 5, BIG)], f"{SEALED} 11000+?:log.1 end=16000"
    ),
    "the path names no file, and another rotation before": Case(
        SAVED,
        [LOG3, LOG2, file("log.5", 5, BIG), file("log.1", 6)],
        f"{SEALED} 11000+5000:log.5 16000+?:log.1 end=16010",
    ),
    "the active file is gone": Case(
        SAVED, [LOG3, LOG2, file("log", 6)], "16000+?:log end=16010", [GONE, OLD_OFFSETS]
    ),
    "the active file is gone, and there were more rotations": Case(
        SAVED,
        [file("log.7", 2), LOG2, file("log.1", 6), file("log", 7)],
        "16000+10:log.1 16010+?:log end=16020",
        [GONE, OLD_OFFSETS],
    ),
    "everything is gone": Case(SAVED, [], "end=16000", [GONE, OLD_OFFSETS]),
    "the inode of the active file was reused": Case(
        SAVED,
        [LOG3, LOG2, file("log", 5, BIG)],
        "16000+?:log end=21000",
        [GONE, OLD_OFFSETS],
        {5: head("x")},
    ),
    "the inode of a sealed file was reused": Case(
        SAVED,
        [file("log.2", 4, BIG), file("log.1", 5, BIG), file("log", 3, BIG, 6)],
        "6000+5000:log.2 11000+5000:log.1 16000+?:log end=21000",
        ["offsets from 1000 to 6000 are gone: '/old3'"],
        {3: head("x")},
    ),
    "the empty active file has got bytes and was rotated": Case(
        EMPTY,
        [LOG3, LOG2, file("log.1", 5), file("log", 6)],
        f"{SEALED} 11000+10:log.1 11010+?:log end=11020",
    ),
    "the empty file is gone, and another one follows": Case(
        EMPTY, [LOG3, LOG2, file("log", 6)], f"{SEALED} 11000+?:log end=11010"
    ),
    "the log has not gone on to the empty file": Case(
        EMPTY,
        [LOG3, file("log.1", 4, BIG + 7), file("log", 5, 0)],
        "1000+5000:log.3 6000+5007:log.1 11007+?:log end=11007",
    ),
    "the log has not gone on to the empty file, which is gone": Case(
        EMPTY, [LOG3, file("log", 4, BIG + 7)], "1000+5000:log.3 6000+?:log end=11007"
    ),
    "the log has gone on to the empty file": Case(
        EMPTY,
        [LOG3, file("log.2", 4, BIG + 7), file("log.1", 5, 1), file("log", 6)],
        "1000+5000:log.3 6000+5000:log.2 11000+1:log.1 11001+?:log end=11011",
    ),
    "copytruncate": Case(
        SAVED,
        [LOG3, LOG2, file("log.1", 6, BIG + 3), file("log", 5, 10, 7)],
        f"{SEALED} 11000+5003:log.1 16003+?:log end=16013",
        heads={6: head("e"), 5: head("x")},
    ),
    "copytruncate, and the file is longer than before": Case(
        SAVED,
        [LOG3, LOG2, file("log.1", 6, BIG + 3), file("log", 5, BIG * 2, 7)],
        f"{SEALED} 11000+5003:log.1 16003+?:log end=26003",
        heads={6: head("e"), 5: head("x")},
    ),
    "copytruncate three times after a crash": Case(
        SHORT,
        [
            LOG3,
            LOG2,
            file("log.6", 6, 16),
            file("log.5", 7),
            file("log.4", 8),
            file("log", 5, 1, 9),
        ],
        f"{SEALED} 11000+16:log.6 11016+10:log.5 11026+10:log.4 11036+?:log end=11037",
        heads={6: FEW, 7: FEW, 8: FEW, 5: b"x"},
    ),
    "truncated without a copy": Case(
        SAVED,
        [LOG3, LOG2, file("log", 5, 10, 6)],
        "16000+?:log end=16010",
        [GONE, OLD_OFFSETS],
        {5: head("e")},
    ),
    "a header of all files is no copy": Case(
        SHORT,
        [LOG3, LOG2, file("log.1", 6, 16), file("log", 7, 16)],
        "11010+16:log.1 11026+?:log end=11042",
        ["offsets from 1000 to 11010 are gone", "offsets from 11010 on may name other bytes"],
        {6: FEW, 7: FEW},
    ),
    "sed -i on a sealed file keeps its size": Case(
        SAVED,
        [LOG3, file("log.2", 9, BIG, 9), file("log.1", 5, BIG), file("log", 6)],
        f"{SEALED} 11000+5000:log.1 16000+?:log end=16010",
        heads={9: head("d")},
    ),
    "sed -i on a sealed file removes bytes": Case(
        SAVED,
        [LOG3, file("log.2", 9, BIG - 1, 9), file("log.1", 5, BIG), file("log", 6)],
        "11000+5000:log.1 16000+?:log end=16010",
        ["offsets from 1000 to 11000 are gone: '/old4'"],
        {9: head("d")},
    ),
    "all files were restored from a backup": Case(
        SAVED,
        [file("log.3", 13, BIG), file("log.2", 14, BIG), file("log", 15, BIG + 7)],
        f"{SEALED} 11000+?:log end=16007",
        heads={13: head("c"), 14: head("d"), 15: head("e")},
    ),
    "delaycompress": Case(
        SAVED,
        [
            file("log.5.gz", 3, 99),
            file("log.4.gz", 14, 99, 4),
            file("log.3.gz", 15, 99, 5),
            file("log.2.gz", 16, 99, 6),
            file("log.1", 7),
            file("log", 8),
        ],
        "16000+10:log.1 16010+?:log end=16020",
        [
            GONE,
            OLD_OFFSETS,
            "the log lacks the bytes of 2 compressed files at offset 16000,"
            " the first is '/log.3.gz'",
        ],
    ),
    "only a file between is compressed": Case(
        SAVED,
        [LOG3, LOG2, file("log.9", 5, BIG), file("log.4", 6), file("log.1.gz", 7), file("log", 8)],
        f"{SEALED} 11000+5000:log.9 16000+10:log.4 16010+?:log end=16020",
        ["the log lacks the bytes of 1 compressed files at offset 16010"],
    ),
    "a compressed file has the inode number of a sealed one": Case(
        SAVED,
        [file("log.3.gz", 3, BIG), LOG2, file("log", 5, BIG)],
        "6000+5000:log.2 11000+?:log end=16000",
        ["offsets from 1000 to 6000 are gone"],
    ),
    "two sealed files begin alike": Case(
        [segment(1000, BIG, 3, head("d")), *SAVED[1:]],
        [LOG2, file("log", 5, BIG)],
        "6000+5000:log.2 11000+?:log end=16000",
        ["offsets from 1000 to 6000 are gone"],
    ),
    "an older file is no copy of the active one": Case(
        SAVED,
        [file("log.7", 2, BIG), LOG3, LOG2, file("log", 6)],
        "16000+?:log end=16010",
        [GONE, OLD_OFFSETS],
        {2: head("e")},
    ),
    "a sealed file had only a header": Case(
        [
            SAVED[0],
            segment(6000, 10, 4, FEW),
            segment(6010, BIG, 5, head("e"), sealed=False),
        ],
        [LOG3, file("log.2", 5, BIG), file("log.1", 6, 16), file("log", 7)],
        "6010+5000:log.2 11010+16:log.1 11026+?:log end=11036",
        ["offsets from 1000 to 6010 are gone: '/old4'"],
        {6: FEW},
    ),
    "a sealed file has got the name of the path": Case(
        SAVED,
        [LOG3, file("log.1", 5, BIG), file("log", 4, BIG)],
        "1000+5000:log.3 6000+5000:log 11000+5000:log.1 16000+?:log end=21000",
    ),
    "a file that cannot be read": Case(
        SAVED,
        [LOG3, LOG2, file("log.1", 5, BIG), file("log", 6)],
        f"{SEALED} 11000+5000:log.1 16000+?:log end=16010",
        heads={4: None, 5: None},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_decide(name: str) -> None:
    """At start, the files are found in order, and the warnings name the offsets that are gone."""
    case = CASES[name]
    heads = {(DEVICE, inode): begin for inode, begin in {**HEADS, **case.heads}.items()}
    for files in (case.files, case.files[::-1]):
        present = next((it for it in files if it.name == "/log"), None)
        chain = decide(files, present, heads, case.saved)
        assert shown(chain) == case.expected
        assert len(chain.warnings) == len(case.warnings)
        for warning, begin in zip(chain.warnings, case.warnings, strict=True):
            assert warning.startswith(begin)
            assert "\n" not in warning


def test_newer_file_that_the_link_does_not_name_yet() -> None:
    """A file with a later date than that of the link's target follows when the link names it."""
    names = ["log-2026010101", "log-2026010102", "log-2026010103", "log-2026010104"]
    files = [
        File(f"/{name}", (DEVICE, inode), 10, inode, dated(name))
        for inode, name in enumerate(names, 5)
    ]
    chain = following(files, files[2], {files[0].identity}, [files[0].identity], 0, 10)
    assert [link.file for link in chain.links] == files[1:3]
