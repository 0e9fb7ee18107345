"""A writer that still appends to the old file after a rotation."""

import os
from pathlib import Path

import pytest

from support.files import append
from support.server import HURRIED, Serve
from support.sockets import expect, expect_eof


@pytest.mark.slow
def test_late_writer(serve: Serve, path: Path) -> None:
    """Late appends to the old file are logged; only the supervisor keeps that file open."""
    path.write_bytes(b"old")
    server = serve(path, "--follow-name", program=HURRIED)
    expect(stream := server.connect(b"0\n"), b"old")
    old = path.rename(path.with_suffix(".1"))
    path.write_bytes(b"new")
    expect_eof(stream)
    expect(server.connect(b"0\n"), b"new")
    (worker,) = server.workers(1)
    assert str(old) not in [os.readlink(fd) for fd in Path(f"/proc/{worker}/fd").iterdir()]
    server.logged("serving: ", count=2)
    append(old, b"late\n")
    server.logged("warning: bytes were appended to the old file after the rotation", "bytes=5 ")
