"""Looks at files whose inode numbers change, in a FUSE file system in the folder argv[1].

Each case has the contents of both files, the growth of the first, and the expected verdicts.
"""

import os
import sys
from pathlib import Path

from support.fusefs import Fuse
from tailsrv.file_identity import CATCH_UP, FileIdentity

LONG = b"x" * 10_000
CASES: list[tuple[tuple[bytes, bytes], bytes, list[bool | None]]] = [
    ((b"same", b"same"), b"", [False] * 5),
    ((LONG, LONG), b"", [False] * 5),
    ((b"", b""), b"", [False] * 5),
    ((b"same", b"shor"), b"", [True] * 5),
    ((b"longer", b"long"), b"", [True] * 5),
    ((b"a" + LONG, b"b" + LONG), b"", [True] * 5),
    ((LONG + b"a", LONG + b"b" + LONG), b"", [True] * 5),
    ((b"copy", b"copy that grows"), b"", [None, None, True, True, True]),
    ((b"late", b"late news"), b" news", [None, None, False, False, False]),
    ((b"late", b"late news"), b" n", [None, None, None, None, True]),
]

fuse = Fuse(Path(sys.argv[1]), fresh=False)
for contents, grown, expected in CASES:
    fuse.write(contents[0], 2)
    fuse.write(contents[1], 3)
    fuse.order(node=2)
    file = os.open(fuse.path, os.O_RDONLY)
    identity = FileIdentity(file, str(fuse.path))
    fuse.order(node=3)
    seen = [identity.is_gone(now) for now in (0.0, CATCH_UP - 1)]
    if grown:
        fuse.write(contents[0] + grown, 2)
    seen += [identity.is_gone(now) for now in (CATCH_UP, 2 * CATCH_UP - 2, 2 * CATCH_UP)]
    assert seen == expected, (contents, grown, seen)
    os.close(file)
