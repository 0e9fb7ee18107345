"""Tests of the inotify watch on one file, with real inotify and real files."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from inotify_simple import flags

from support.files import append, is_gone, opened
from support.interpreter import environment, program, run_program
from support.processes import as_root
from support.sockets import readable, wait_readable
from support.waiting import DEADLINE
from tailsrv.linux.files import memory_file_with
from tailsrv.linux.inotify import Hints, Watch, steps_to
from tailsrv.served_file import size_of


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Give a file of four bytes."""
    path = tmp_path / "log"
    path.write_bytes(b"four")
    return path


@contextmanager
def watching(path: Path | str, following: bool = True) -> Iterator[Watch]:
    """Give a watch on the file that `path` names now."""
    with opened(path) as file:
        watch = Watch(file, str(path))
        assert watch.polling is None
        watch.follow(following)
        try:
            yield watch
        finally:
            watch.close()


def fd_of(watch: Watch) -> int:
    """Return the descriptor of a watch that does not poll."""
    fd = watch.fileno()
    assert fd is not None
    return fd


def quiet(watch: Watch) -> bool:
    """Tell whether the watch has no event.

    inotify(7) queues an event before the call that causes it returns, so no wait is needed.
    """
    return not readable(fd_of(watch))


def gone(watch: Watch) -> bool:
    """Read all events, as a worker does, and tell whether the file is gone."""
    assert not quiet(watch)
    suspicious = False
    while not quiet(watch):
        suspicious |= watch.read()
    return suspicious and bool(is_gone(watch.file, watch.path))


# Appends.


def test_append(path: Path) -> None:
    """An append wakes a watch that follows, and is no reason to check the path."""
    with watching(path) as watch:
        assert quiet(watch)
        append(path, b"more")
        wait_readable(fd_of(watch))
        assert watch.size() == 8
        assert watch.read() is False
        assert quiet(watch)


def test_many_appends_are_one_event(path: Path) -> None:
    """One read consumes the events of any number of appends."""
    with watching(path) as watch:
        for _ in range(1000):
            append(path, b"x")
        assert watch.read() is False
        assert quiet(watch)
        assert watch.size() == 1004


def test_append_through_a_hard_link(path: Path) -> None:
    """An append through another hard link of the file is noticed."""
    other = path.with_name("other")
    other.hardlink_to(path)
    with watching(path) as watch:
        append(other, b"more")
        assert watch.read() is False
        assert watch.size() == 8


def test_append_before_following(path: Path) -> None:
    """An append before follow(True) causes no event, but is included in the size."""
    with watching(path, following=False) as watch:
        append(path, b"more")
        watch.follow(True)
        assert quiet(watch)
        assert watch.size() == 8
        append(path, b"!")
        assert watch.read() is False
        assert watch.size() == 9


@pytest.mark.parametrize("times", [1, 2, 3])
def test_append_while_not_following(path: Path, times: int) -> None:
    """Without following, appends cause no event, and a later chmod still does."""
    with watching(path) as watch:
        for _ in range(times):
            append(path, b"heard")
            assert watch.read() is False
            watch.follow(False)
            append(path, b"not heard")
            assert quiet(watch)
            path.chmod(0o600)
            assert watch.read() is True
            assert quiet(watch)
            watch.follow(True)


def test_event_about_the_path_keeps_the_watch(path: Path) -> None:
    """An event about the path changes neither the watch nor whether it follows."""
    with watching(path) as watch:
        path.chmod(0o600)
        assert not gone(watch)
        append(path, b"more")
        assert watch.read() is False
        watch.follow(False)
        path.chmod(0o644)
        assert not gone(watch)
        append(path, b"more")
        assert quiet(watch)


def test_truncation(path: Path) -> None:
    """A truncation wakes the watch, shows in the size, and does not make the file gone."""
    with watching(path) as watch:
        os.truncate(path, 1)
        wait_readable(fd_of(watch))
        assert watch.size() == 1
        assert not gone(watch)


def test_read_without_events(path: Path) -> None:
    """A read without events returns at once and reports nothing suspicious."""
    with watching(path) as watch:
        assert watch.read() is False


def test_more_events_than_one_read_takes(path: Path) -> None:
    """A queue longer than one read is read in pieces, and the deletion at its end is noticed."""
    with watching(path) as watch:
        for number in range(100):
            append(path, b"x")
            path.chmod(0o600 + number % 2)
        path.unlink()
        assert gone(watch)
        assert watch.size() == 104


# Deletion and replacement of the file.


@pytest.mark.parametrize("following", [True, False])
def test_unlink(path: Path, following: bool) -> None:
    """A deleted file is gone, and the open file keeps its size."""
    with watching(path, following) as watch:
        path.unlink()
        assert gone(watch)
        assert watch.size() == 4


@pytest.mark.parametrize("following", [True, False])
def test_rename_away(path: Path, following: bool) -> None:
    """A file that was renamed is gone, and appends to it are still noticed."""
    moved = path.with_name("log.1")
    with watching(path, following) as watch:
        path.rename(moved)
        assert gone(watch)
        watch.follow(True)
        append(moved, b"more")
        assert watch.read() is False
        assert watch.size() == 8


def test_replaced_by_rename(path: Path) -> None:
    """A file that was replaced by a rename is gone, although its path names a file."""
    other = path.with_name("new")
    other.write_bytes(b"another")
    with watching(path) as watch:
        other.rename(path)
        assert gone(watch)
        assert watch.size() == 4


def test_replaced_while_a_hard_link_remains(path: Path) -> None:
    """A file that was replaced at its path is gone, although another hard link keeps it."""
    path.with_name("kept").hardlink_to(path)
    with watching(path) as watch:
        path.unlink()
        path.write_bytes(b"another")
        assert gone(watch)


def test_rotation(path: Path) -> None:
    """A file that was renamed, with a new one created at its path, is gone."""
    with watching(path) as watch:
        path.rename(path.with_name("log.1"))
        path.write_bytes(b"")
        assert gone(watch)


def test_hard_link_elsewhere(path: Path) -> None:
    """Adding and removing another hard link does not make the file gone."""
    other = path.with_name("other")
    with watching(path) as watch:
        other.hardlink_to(path)
        assert not gone(watch)
        other.unlink()
        assert not gone(watch)


def test_chmod(path: Path) -> None:
    """New permissions or times do not make the file gone, even if it could not be opened again."""
    with watching(path) as watch:
        path.chmod(0)
        assert not gone(watch)
        os.utime(path, (0, 0))
        assert not gone(watch)


def test_moved_away_and_back(path: Path) -> None:
    """A file that is back at its path when the path is checked is not gone."""
    with watching(path) as watch:
        path.rename(path.with_name("elsewhere"))
        path.with_name("elsewhere").rename(path)
        assert not gone(watch)
        path.unlink()
        assert gone(watch)


def test_other_files_do_not_wake_the_watch(path: Path) -> None:
    """Changes to other files in the same folder do not wake the watch."""
    with watching(path) as watch:
        neighbour = path.with_name("neighbour")
        neighbour.write_bytes(b"x")
        neighbour.rename(path.with_name("moved"))
        path.with_name("moved").unlink()
        assert quiet(watch)


# Links and folders on the path.


def test_symlink_retargeted(path: Path) -> None:
    """A symbolic link to another file makes the file gone, replaced atomically or not."""
    other, link, fresh = path.with_name("other"), path.with_name("link"), path.with_name("fresh")
    other.write_bytes(b"another")
    link.symlink_to(path)
    with watching(link) as watch:
        append(path, b"more")
        assert watch.read() is False
        fresh.symlink_to(other)
        fresh.rename(link)
        assert gone(watch)
    with watching(link) as watch:
        link.unlink()
        link.symlink_to(path)
        assert gone(watch)


def test_symlink_replaced_by_one_to_the_same_file(path: Path) -> None:
    """A new symbolic link to the same file does not make it gone, and is watched from then on."""
    link, fresh = path.with_name("link"), path.with_name("fresh")
    link.symlink_to(path)
    with watching(link) as watch:
        fresh.symlink_to(path)
        fresh.rename(link)
        assert not gone(watch)
        link.unlink()
        assert gone(watch)


def test_symlink_replaced_by_one_that_cannot_be_followed(path: Path) -> None:
    """If the path cannot be checked, the file's state is unknown, and it is still watched."""
    link, fresh = path.with_name("link"), path.with_name("fresh")
    link.symlink_to(path)
    with watching(link) as watch:
        fresh.symlink_to("x" * 300)
        fresh.rename(link)
        assert watch.read()
        assert is_gone(watch.file, watch.path) is None
        append(path, b"more")
        wait_readable(fd_of(watch))
        assert watch.size() == 8


def test_symlink_in_the_middle(tmp_path: Path) -> None:
    """A path may go through a relative symbolic link, and a new target of it is noticed."""
    for day in ("monday", "tuesday"):
        (tmp_path / day).mkdir()
        (tmp_path / day / "log").write_bytes(day.encode())
    current = tmp_path / "current"
    current.symlink_to("monday")
    with watching(current / "log") as watch:
        current.unlink()
        current.symlink_to("tuesday")
        assert gone(watch)


def test_parent_folder_renamed(tmp_path: Path) -> None:
    """Renaming a folder at any level above the file makes the file gone."""
    folder = tmp_path / "a" / "b" / "c"
    folder.mkdir(parents=True)
    (folder / "log").write_bytes(b"x")
    with watching(folder / "log") as watch:
        (tmp_path / "a").rename(tmp_path / "z")
        assert gone(watch)


def test_parent_folder_renamed_and_replaced(tmp_path: Path) -> None:
    """A folder that is replaced by a link to it does not make the file gone, and is watched."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "log").write_bytes(b"x")
    with watching(tmp_path / "a" / "log") as watch:
        (tmp_path / "a").rename(tmp_path / "b")
        (tmp_path / "a").symlink_to("b")
        assert not gone(watch)
        (tmp_path / "a").unlink()
        assert gone(watch)


def test_relative_path(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path is watched like an absolute one."""
    monkeypatch.chdir(path.parent)
    with watching("log") as watch:
        append(path, b"more")
        assert watch.read() is False
        path.rename(path.with_name("log.1"))
        assert gone(watch)


def test_gone_before_the_watch(path: Path) -> None:
    """A file that was deleted before it is watched can be watched, and is found to be gone."""
    with opened(path) as file:
        path.unlink()
        watch = Watch(file, str(path))
        try:
            assert watch.polling is None
            assert is_gone(file, str(path))
        finally:
            watch.close()


def test_steps_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """steps_to() lists each name on the path, the links, what they lead to, and the file last."""
    base = tmp_path.resolve()
    (base / "real").mkdir()
    (base / "real" / "log").write_bytes(b"")
    (base / "relative").symlink_to("real/../real")
    (base / "absolute").symlink_to(base / "relative")
    above = [str(folder) for folder in reversed([base, *base.parents[:-1]])]
    below = ["relative", "real", "real/..", "real/../real", "real/../real/log"]
    assert list(steps_to(f"{base}/absolute/log")) == [
        *above,
        f"{base}/absolute",
        *above,
        *[f"{base}/{step}" for step in below],
    ]
    monkeypatch.chdir(base / "real")
    assert list(steps_to("log"))[-1] == str(base / "real" / "log")


def test_steps_to_a_loop(tmp_path: Path) -> None:
    """steps_to() ends for links in a circle, and for a path that does not exist."""
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    assert len(list(steps_to(str(tmp_path / "a" / "log")))) < 100
    assert list(steps_to(str(tmp_path / "no" / "log")))[-1] == str(tmp_path / "no" / "log")


def test_unreadable_size(path: Path) -> None:
    """If the size cannot be read, the last known size holds."""
    reader, writer = os.pipe()
    with watching(path) as watch:
        assert (watch.size(), size_of(watch.file)) == (4, 4)
        os.dup2(reader, watch.file)
        append(path, b"more")
        assert watch.size() == 4
        os.close(reader)
        os.close(writer)
    assert size_of(writer) is None


def test_folder_that_is_gone() -> None:
    """A relative path in a deleted folder has no steps."""
    done = run_program("folder_that_is_gone")
    assert (done.returncode, done.stderr) == (0, "")


# Where inotify cannot be used.


def test_file_of_no_mount() -> None:
    """An anonymous file, which has no mount in /proc, is watched like a local one."""
    with open(memory_file_with(b"data"), "rb") as file:
        watch = Watch(file.fileno(), f"/proc/self/fd/{file.fileno()}")
        assert watch.polling is None
        assert watch.size() == 4
        watch.close()


def test_file_that_may_not_be_read_any_more(path: Path) -> None:
    """If the kernel refuses the watch, the file is polled, and the reason is given."""
    if not as_root:
        pytest.skip("only root can run the program as another user")
    path.chmod(0o644)
    path.parent.chmod(0o755)
    ready_reader, ready_writer = os.pipe()
    command = [
        sys.executable,
        "-W",
        "error",
        program("watch_unreadable_file"),
        str(path),
        str(ready_writer),
    ]
    piped = subprocess.PIPE
    with subprocess.Popen(
        command,
        stdin=piped,
        stdout=piped,
        stderr=piped,
        text=True,
        env=environment(),
        pass_fds=[ready_writer],
    ) as child:
        os.close(ready_writer)
        assert os.read(ready_reader, 5) == b"ready"
        os.close(ready_reader)
        path.chmod(0)
        reason = "inotify cannot be used: Permission denied"
        assert child.communicate(timeout=DEADLINE) == (f"{reason} 4\n", "")


def test_polling_gives_the_reason() -> None:
    """On a file system without events the file is polled, and the reason names the file system."""
    with opened("/proc/self/mountinfo") as file:
        watch = Watch(file, "/proc/self/mountinfo")
        assert watch.polling is not None
        assert "proc" in watch.polling
        assert watch.fileno() is None
        watch.follow(True)
        watch.follow(False)
        watch.close()


def test_no_inotify_instances(path: Path) -> None:
    """Without inotify instances the file is polled, the reason names the setting, hints fail."""
    done = run_program(
        "watch_without_inotify",
        str(path),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "fs.inotify.max_user_instances" in done.stdout
    assert done.stdout.endswith(" None 4\nno hints: EMFILE\n")


def test_close_frees_the_instance(path: Path) -> None:
    """close() frees the inotify instance, and may be called twice."""
    with watching(path) as watch:
        fd = fd_of(watch)
        watch.close()
        assert watch.fileno() is None
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)
        watch.close()


# Hints.


@pytest.fixture
def hints() -> Iterator[Hints]:
    """Give hints about nothing."""
    hints = Hints()
    yield hints
    hints.close()


def hinted(hints: Hints) -> bool:
    """Tell whether there is a hint, and clear it."""
    seen = readable(hints.fileno())
    hints.clear()
    return seen


def test_hints(hints: Hints, path: Path) -> None:
    """A hint is there after each event that was asked for, about any of the paths."""
    other = path.with_name("other")
    other.write_bytes(b"other")
    watches = [(path, flags.MODIFY), (path.parent, flags.CREATE), (other, flags.ATTRIB)]
    assert hints.watch((str(path), mask) for path, mask in watches)
    acts: list[Callable[[], None]] = [
        lambda: append(path, b"more"),
        lambda: path.with_name("next").touch(),
        other.unlink,
    ]
    for act in acts:
        assert not hinted(hints)
        act()
        assert hinted(hints)
    path.chmod(0o600)
    path.rename(path.with_name("log.1"))
    assert not hinted(hints)


def test_hints_about_an_open_file(hints: Hints, path: Path) -> None:
    """The deletion of an open file is noticed, also if the file has another name by then."""
    with opened(path) as file:
        assert hints.watch([(f"/proc/self/fd/{file}", flags.ATTRIB)])
        moved = path.rename(path.with_name("log.1"))
        assert not hinted(hints)
        moved.unlink()
        assert hinted(hints)


def test_incomplete_hints(hints: Hints, path: Path) -> None:
    """A path that cannot be watched is no obstacle to others, and may be watched later."""
    missing = path.with_name("missing")
    wanted = [(str(missing), flags.MODIFY), (str(path), flags.MODIFY)]
    assert not hints.watch(wanted)
    append(path, b"more")
    assert hinted(hints)
    missing.touch()
    assert hints.watch(wanted)
    append(missing, b"more")
    assert hinted(hints)


def test_other_hints(hints: Hints, path: Path) -> None:
    """Only what was asked for last is watched, and what stays is watched without a gap."""
    other, gone = path.with_name("other"), path.with_name("gone")
    for name in (other, gone):
        name.touch()
    assert hints.watch((str(name), flags.MODIFY) for name in (path, other, gone))
    gone.unlink()
    append(path, b"more")
    assert hints.watch([(str(path), flags.MODIFY)])
    # This is the hint about the append before.
    assert hinted(hints)
    append(other, b"more")
    assert not hinted(hints)
    append(path, b"more")
    assert hinted(hints)
    assert hints.watch([(str(path), flags.ATTRIB)])
    hints.clear()
    append(path, b"more")
    assert not hinted(hints)
    path.chmod(0o600)
    assert hinted(hints)


def test_hints_about_one_folder_under_two_names(hints: Hints, path: Path) -> None:
    """A folder stays watched under one name when it is no longer watched under another."""
    link = path.with_name("link")
    link.symlink_to(path.parent)
    names = [(str(name), flags.CREATE) for name in (path.parent, link)]
    assert hints.watch(names)
    assert hints.watch(names[:1])
    hints.clear()
    path.with_name("next").touch()
    assert hinted(hints)


def test_many_hints(hints: Hints, tmp_path: Path) -> None:
    """All pending events are cleared at once, however many there are."""
    assert hints.watch([(str(tmp_path), flags.CREATE)])
    for number in range(100):
        (tmp_path / f"{number:0200}").touch()
    assert hinted(hints)
    assert not hinted(hints)


def test_close_frees_the_hints(path: Path) -> None:
    """After close() the descriptor is free."""
    before = os.listdir("/proc/self/fd")
    hints = Hints()
    hints.watch([(str(path), flags.MODIFY)])
    assert len(os.listdir("/proc/self/fd")) == len(before) + 1
    hints.close()
    assert os.listdir("/proc/self/fd") == before
