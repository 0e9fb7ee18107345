"""Tests of the system calls on files, with real sockets and files."""

import errno
import os
import select
import socket
import subprocess
from contextlib import ExitStack
from pathlib import Path

import pytest

from support.files import EVERY_BYTE, append, evict, opened
from support.interpreter import run_program
from support.processes import as_root
from support.sockets import readable, recv_exactly, reset, tcp_pair, wait_for, wait_readable
from support.waiting import eventually
from tailsrv.linux.files import (
    MAX_COPY,
    has_writers,
    is_cached,
    read_ahead,
    send_chunk,
    send_to_all,
)
from tailsrv.linux.sockets import Outcome


@pytest.mark.parametrize(
    ("offset", "count"), [(0, 1), (0, 1000), (7, 1000), (len(EVERY_BYTE) - 10, 10)]
)
def test_send_chunk(
    pair: tuple[socket.socket, socket.socket], opened_file: int, offset: int, count: int
) -> None:
    """The file's bytes at that offset arrive, and the file position does not move."""
    near, far = pair
    assert send_chunk(near.fileno(), opened_file, offset, count) == count
    assert recv_exactly(far, count) == EVERY_BYTE[offset : offset + count]
    assert os.lseek(opened_file, 0, os.SEEK_CUR) == 0


def test_send_chunk_at_the_end(
    pair: tuple[socket.socket, socket.socket], full_file: Path, opened_file: int
) -> None:
    """A send stops at the end of the file, and bytes appended later can be sent then."""
    near, far = pair
    assert send_chunk(near.fileno(), opened_file, len(EVERY_BYTE), 10) == 0
    assert send_chunk(near.fileno(), opened_file, len(EVERY_BYTE) + 1000, 10) == 0
    assert send_chunk(near.fileno(), opened_file, len(EVERY_BYTE) - 3, 10) == 3
    append(full_file, b"more")
    assert send_chunk(near.fileno(), opened_file, len(EVERY_BYTE), 10) == 4
    assert recv_exactly(far, 7) == EVERY_BYTE[-3:] + b"more"


def test_send_chunk_to_a_full_socket(
    pair: tuple[socket.socket, socket.socket], opened_file: int
) -> None:
    """A full socket would block, and accepts bytes again when the peer has read everything."""
    near, far = pair
    sent = 0
    while (
        result := send_chunk(near.fileno(), opened_file, 0, len(EVERY_BYTE))
    ) is not Outcome.WOULD_BLOCK:
        assert isinstance(result, int)
        assert result > 0
        sent += result
    assert sent > len(EVERY_BYTE)
    assert len(recv_exactly(far, sent)) == sent
    wait_for(near, select.POLLOUT)
    assert isinstance(send_chunk(near.fileno(), opened_file, 0, 10), int)


def test_send_chunk_to_a_unix_socket(opened_file: int) -> None:
    """A full Unix socket would block, and one whose other end is closed has hung up."""
    near, far = socket.socketpair()
    near.setblocking(False)
    with near:
        with far:
            while (
                result := send_chunk(near.fileno(), opened_file, 0, len(EVERY_BYTE))
            ) is not Outcome.WOULD_BLOCK:
                assert isinstance(result, int)
        assert send_chunk(near.fileno(), opened_file, 0, 10) is Outcome.HUNG_UP


def test_send_chunk_after_a_reset(
    pair: tuple[socket.socket, socket.socket], opened_file: int
) -> None:
    """After a reset the first send and every later one report a hang-up."""
    near, far = pair
    reset(far)
    assert wait_for(near, select.POLLIN) & select.POLLERR
    assert [send_chunk(near.fileno(), opened_file, 0, 10) for _ in range(3)] == [
        Outcome.HUNG_UP
    ] * 3


def test_send_chunk_after_shutdown(
    pair: tuple[socket.socket, socket.socket], opened_file: int
) -> None:
    """A socket that this process has shut down counts as hung up."""
    near, _ = pair
    near.shutdown(socket.SHUT_WR)
    assert send_chunk(near.fileno(), opened_file, 0, 10) is Outcome.HUNG_UP


def test_send_chunk_to_a_half_closed_peer(
    pair: tuple[socket.socket, socket.socket], opened_file: int
) -> None:
    """A peer that has half-closed its connection still receives."""
    near, far = pair
    far.shutdown(socket.SHUT_WR)
    wait_readable(near)
    assert send_chunk(near.fileno(), opened_file, 0, 10) == 10
    assert recv_exactly(far, 10) == EVERY_BYTE[:10]


def test_send_chunk_of_a_folder(pair: tuple[socket.socket, socket.socket], tmp_path: Path) -> None:
    """An error that is not about the peer is returned as it is."""
    near, _ = pair
    with opened(tmp_path) as folder:
        sent = send_chunk(near.fileno(), folder, 0, 10)
    assert isinstance(sent, OSError)
    assert sent.errno == errno.EINVAL


@pytest.mark.parametrize("count", [1, MAX_COPY, MAX_COPY + 1, 100_000])
def test_send_to_all(opened_file: int, count: int) -> None:
    """All clients get the same bytes, and hung-up or full sockets are reported individually."""
    with ExitStack() as stack:
        pairs = [stack.enter_context(tcp_pair()) for _ in range(4)]
        near = [pair[0] for pair in pairs]
        reset(pairs[1][1])
        wait_for(near[1], select.POLLIN)
        while (
            send_chunk(near[2].fileno(), opened_file, 0, len(EVERY_BYTE)) is not Outcome.WOULD_BLOCK
        ):
            pass
        short = send_to_all([sock.fileno() for sock in near], opened_file, 7, count)
        assert short == {near[1].fileno(): Outcome.HUNG_UP, near[2].fileno(): Outcome.WOULD_BLOCK}
        for index in (0, 3):
            assert recv_exactly(pairs[index][1], count) == EVERY_BYTE[7 : 7 + count]


def test_send_to_all_after_truncation(
    pair: tuple[socket.socket, socket.socket], opened_file: int
) -> None:
    """If the file has shrunk, a client gets the bytes that are left, or none."""
    near, far = pair
    assert send_to_all([near.fileno()], opened_file, len(EVERY_BYTE) - 5, 10) == {near.fileno(): 5}
    assert recv_exactly(far, 5) == EVERY_BYTE[-5:]
    assert send_to_all([near.fileno()], opened_file, len(EVERY_BYTE), 10) == {near.fileno(): 0}


def test_send_to_all_of_an_unreadable_file(
    pair: tuple[socket.socket, socket.socket], full_file: Path
) -> None:
    """If the file cannot be read, each client's result is that error."""
    near, far = pair
    file = os.open(full_file, os.O_WRONLY)
    try:
        short = send_to_all([near.fileno()], file, 0, 10)
    finally:
        os.close(file)
    [error] = short.values()
    assert isinstance(error, OSError)
    assert error.errno == errno.EBADF
    assert not readable(far)


def test_cache_that_cannot_be_queried() -> None:
    """If the page cache cannot be queried, the bytes count as cached, and sendfile(2) tries."""
    reader, writer = os.pipe()
    try:
        assert is_cached(reader, 0, 10, 10)
        read_ahead(reader, 0, 10)
    finally:
        os.close(reader)
        os.close(writer)


def test_is_cached(tmp_path: Path) -> None:
    """Written bytes are cached until the kernel evicts them, and again after a read-ahead."""
    path = tmp_path / "file"
    path.write_bytes(EVERY_BYTE)
    with opened(path) as file:
        assert is_cached(file, 0, len(EVERY_BYTE), 4096)
        # Beyond the end of the file there is nothing to read from the disk.
        assert is_cached(file, len(EVERY_BYTE), 10, 10)
        evict(file)
        if is_cached(file, 0, len(EVERY_BYTE), 4096):
            pytest.skip("this file system keeps its files in memory, or does not report the cache")
        read_ahead(file, 0, len(EVERY_BYTE))
        eventually(lambda: is_cached(file, 0, len(EVERY_BYTE), 4096))


def test_memory_file_without_space() -> None:
    """An anonymous file is closed again if its data cannot be written."""
    done = run_program("memory_without_room")
    assert (done.stdout, done.returncode, done.stderr) == ("EFBIG\n", 0, "")


@pytest.mark.parametrize("mode", [os.O_WRONLY, os.O_RDWR, os.O_WRONLY | os.O_APPEND])
def test_has_writers(tmp_path: Path, mode: int) -> None:
    """A file has a writer as long as a process has it open for writing, under whatever name."""
    path = tmp_path / "file"
    path.write_bytes(b"four")
    path.with_name("link").hardlink_to(path)
    with opened(path) as file, opened(path):
        assert has_writers(file) is False
        writer = os.open(path.with_name("link"), mode)
        path.unlink()
        assert has_writers(file) is True
        os.close(writer)
        assert has_writers(file) is False


def test_has_a_writer_in_another_process(tmp_path: Path) -> None:
    """A writer in another process is found, until that process ends."""
    path = tmp_path / "file"
    with path.open("wb") as output, opened(path) as file:
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=output) as writer:
            output.close()
            assert has_writers(file) is True
            assert writer.stdin is not None
            writer.stdin.close()
            writer.wait()
        assert has_writers(file) is False


def test_has_writers_keeps_no_lease(tmp_path: Path) -> None:
    """After the question, a process can open the file for writing without waiting."""
    path = tmp_path / "file"
    path.write_bytes(b"four")
    with opened(path) as file:
        assert has_writers(file) is False
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))
        assert has_writers(file) is False


def test_has_writers_of_something_else() -> None:
    """For what cannot have a lease, the answer is None."""
    reader, writer = os.pipe()
    try:
        assert has_writers(reader) is None
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.skipif(not as_root, reason="only root can become another user")
def test_writers_seen_by_another_user(tmp_path: Path) -> None:
    """Without privileges, a process learns about the writers of its own files only."""
    for name in ("own", "written", "other"):
        (tmp_path / name).write_bytes(b"four")
    tmp_path.chmod(0o755)
    done = run_program("writers_seen_by_another_user", str(tmp_path))
    assert done.stdout == "{'own': False, 'written': True, 'other': None}\n", done.stderr
