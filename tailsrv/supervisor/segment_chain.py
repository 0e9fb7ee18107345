"""Decides which files are the segments of the log, and in which order. Pure: no system calls.

The rules:

- A rotated file has the served file's name and an ending of digits, see rotated().
- A saved segment is recognized by its inode number and its fingerprint. The number of the device is
  not compared, because it may change when the machine starts again. An empty segment is not looked
  for: it has no byte that could be missing, so its file counts as a new one.
- A file with another inode can be a copy (`copytruncate`, `sed -i`, a restored backup). A sealed
  segment's copy has the same fingerprint. An active segment's copy begins with the fingerprint, and
  either this covers HEAD bytes, or the original has been truncated. Fewer bytes may be a header
  that all files of the log have. A copy is never a new segment.
- The new files are those modified since the last active file was known to be active, in the order
  of their modification times. For equal times, a higher number is older, and a later date is newer.
  The file at the path is always the last one.
- The log has no gap. If a saved segment is missing, all segments before it are dropped.
- The last file that was active is sealed with its present size. If it is gone, its saved size is
  used. After a crash this size may be too small, and then clients may have later offsets. A warning
  says so; the log continues at that offset, because no better one is known.
- If that file has been truncated (`copytruncate`), it is a new segment at the last known end.
- If the last saved segment is empty and has no byte now, the log has not gone on to it: the one
  before it is still active. It was saved in advance, see LogStore.save().
- A compressed file is skipped with a warning. No client has an offset in it, so the next file
  begins at the same offset.
"""

import os
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from tailsrv.supervisor.state_file import HEAD, Fingerprint, SavedSegment

_COMPRESSED = (".gz", ".xz", ".zst", ".bz2", ".lz4", ".Z")
_ENDING = re.compile(r"[-._][0-9]+(?:[-._:T][0-9]+)*Z?")
_NUMBER = re.compile("[0-9]+")
# A date or a time has at least so many digits: 202601.
_DATE_DIGITS = 6
# The names that multilog and svlogd give to the old files beside `current`.
_TAI64N = re.compile(r"@([0-9a-f]{24})\.[su]")

# Device and inode number.
Identity = tuple[int, int]


@dataclass(frozen=True, slots=True)
class File:
    """A regular file as the listing shows it.

    Attributes:
        name: The absolute path.
        identity: Device and inode number.
        size: The size in bytes.
        modified: The modification time in nanoseconds.
        numbers: The numbers in the ending of the name. Larger ones belong to newer files.
        compressed: Whether the name says that the file is compressed.

    """

    name: str
    identity: Identity
    size: int
    modified: int
    numbers: tuple[int, ...] = ()
    compressed: bool = False


@dataclass(frozen=True, slots=True)
class Link:
    """A file's place in the log: the `base` offset, and the `size` in bytes, None if active."""

    base: int
    size: int | None
    file: File


@dataclass(frozen=True, slots=True)
class Chain:
    """Files in order. `end` is the offset at which the next file begins if there is no link.

    `later` is the number of files after the one that was active, or has taken its place.
    """

    links: list[Link]
    end: int
    warnings: list[str]
    later: int = 0


def rotated(name: str, base: str) -> tuple[tuple[int, ...], bool] | None:
    """Return whether `name` can be a rotated file of the file `base`. Both are without folder.

    The ending follows the name, or stands before the extension: `log.1`, `app-20260101.log`. It is
    a number after a dot, or a date or time of at least six digits, so that the log of another
    instance (`app-2.log`) or port (`app-8080.log`) does not count. If `base` has a date or time
    itself, then all names count that differ only in digits: rotatelogs renames no file, and the
    served path is a symbolic link to the newest one.

    Returns:
        The numbers in the ending, larger ones for newer files, and whether the name says that the
        file is compressed. None if it is another file.

    """
    plain, extension = os.path.splitext(name)
    compressed = extension in _COMPRESSED
    name = plain if compressed else name
    if base == "current" and (label := _TAI64N.fullmatch(name)):
        return (int(label[1], 16),), compressed
    if dated(base) and name != base and _NUMBER.sub("0", name) == _NUMBER.sub("0", base):
        return dated(name), compressed
    stem, extension = os.path.splitext(base)
    for before, after in ((base, ""), (stem, extension)):
        ending = name[len(before) : len(name) - len(after)]
        if name == before + ending + after and (numbers := _numbers(ending)):
            return numbers, compressed
    return None


def dated(name: str) -> tuple[int, ...]:
    """Return the numbers in `name` if they have as many digits as a date or time, else none."""
    numbers = _NUMBER.findall(name)
    return tuple(map(int, numbers)) if len("".join(numbers)) >= _DATE_DIGITS else ()


def _numbers(ending: str) -> tuple[int, ...]:
    if not _ENDING.fullmatch(ending):
        return ()
    numbers = _NUMBER.findall(ending)
    if len("".join(numbers)) >= _DATE_DIGITS:
        return tuple(map(int, numbers))
    # A counter: logrotate increases it at each rotation.
    return (-int(numbers[0]),) if len(numbers) == 1 and ending[0] == "." else ()


def files_between(
    files: Iterable[File], known: Collection[Identity], since: int, present: Identity | None
) -> list[File]:
    """Return the files that came between the last active file and the present one, in order.

    Args:
        files: The files in the folder, also compressed ones.
        known: The files of all segments, also of the last active one.
        since: The latest modification time of the last active file, in nanoseconds, that was seen
            while the path named it. Its present one does not do: a writer may append to it after a
            rotation, and a file that came later could then seem to be older.
        present: The file that the path names now, None if there is none.

    """
    new = (file for file in files if file.identity not in known and file.identity != present)
    return sorted((file for file in new if file.modified >= since), key=_age)


def _age(file: File) -> tuple[int, tuple[int, ...], str]:
    return file.modified, file.numbers, file.name


def following(
    files: Iterable[File],
    present: File | None,
    known: Collection[Identity],
    unsealed: Collection[Identity],
    since: int,
    base: int,
) -> Chain:
    """Return the new files after the last active one. The first begins at the offset `base`.

    Args:
        files: See files_between(), as for `known` and `since`.
        present: The file that the path names now. If a sealed segment has got the path's name
            again, it is a new segment too: a writer may append to it.
        known: See above.
        unsealed: The known files that are not sealed: the last active one, and those after it.
            Nothing follows if the path names one of them.
        since: See above.
        base: The end of the last active segment.

    """
    if present and present.identity in unsealed:
        return Chain([], base, [])
    new = files_between(files, known, since, present.identity if present else None)
    if present and present.numbers:
        # The path is a symbolic link to a file with a date. A newer file follows as soon as the
        # link names it.
        new = [file for file in new if file.numbers < present.numbers]
    links: list[Link] = []
    skipped: dict[int, list[str]] = {}
    for file in [*new, *([present] if present else [])]:
        if file.compressed:
            skipped.setdefault(base, []).append(file.name)
        else:
            links.append(Link(base, file.size, file))
            base += file.size
    if links:
        links[-1] = replace(links[-1], size=None)
    warnings = [
        f"the log lacks the bytes of {len(names)} compressed files at offset {offset},"
        f" the first is {names[0]!r}: rotate with delaycompress, or without compress"
        for offset, names in skipped.items()
    ]
    return Chain(links, base, warnings)


def decide(
    files: Sequence[File],
    present: File | None,
    heads: Mapping[Identity, bytes | None],
    saved: Sequence[SavedSegment],
) -> Chain:
    """Return the chain of the log at start.

    Args:
        files: The files in the folder, also compressed ones.
        present: The file that the path names now, None if there is none.
        heads: The first HEAD bytes of each file that can be a segment, None if it cannot be read.
        saved: The segments in the state file.

    """
    saved = _without_agreement(files, saved)
    active, known = saved[-1], [segment for segment in saved if segment.size]
    matched, taken = _match(files, heads, known)
    first = max((index + 1 for index, file in enumerate(matched) if file is None), default=0)
    links = [
        Link(segment.base, segment.size, file)
        for segment, file in zip(known[first:], matched[first:], strict=True)
        if file
    ]
    # The file that was active, unless it was empty: then no link is for it.
    last = links[-1].file if active.size and links else None
    end = active.base + last.size if last else active.end
    unsealed = [last.identity] if last else []
    new = following(files, present, taken, unsealed, active.modified, end)
    if last:
        links[-1] = replace(links[-1], size=last.size if new.links else None)
    warnings = []
    if first:
        gone = known[first - 1]
        warnings.append(
            f"offsets from {known[0].base} to {gone.end} are gone: {gone.name!r}"
            " was deleted, compressed, truncated or changed while the server did not run"
        )
    inodes = {link.file.identity[1] for link in new.links}
    if not last and (active.size or active.inode not in inodes):
        warnings.append(
            f"offsets from {active.end} on may name other bytes than before if the server was"
            " killed: the file that was active is gone, and its last size is not known"
        )
    later = max(0, len(new.links) - (0 if last else 1))
    return Chain(links + new.links, new.end, warnings + new.warnings, later)


def _without_agreement(
    files: Iterable[File], saved: Sequence[SavedSegment]
) -> Sequence[SavedSegment]:
    """Return `saved` without a last segment that the log has not gone on to: it is still empty."""
    last = saved[-1]
    if len(saved) == 1 or last.size or any(f.size and f.identity[1] == last.inode for f in files):
        return saved
    *before, active, _ = saved
    return [*before, replace(active, sealed=False)]


def _match(
    files: Iterable[File], heads: Mapping[Identity, bytes | None], saved: Sequence[SavedSegment]
) -> tuple[list[File | None], set[Identity]]:
    """Return the file of each segment, None if it is gone, and all files that are not new."""
    plain = sorted((file for file in files if not file.compressed), key=_age)
    inodes = {file.identity[1]: file for file in plain}
    matched: list[File | None] = []
    for segment in saved:
        file = inodes.get(segment.inode)
        matched.append(file if file and _holds(file, heads.get(file.identity), segment) else None)
    taken = {file.identity for file in matched if file}
    for index, segment in enumerate(saved):
        if matched[index]:
            continue
        truncated = segment.inode in inodes
        for file in plain:
            head = heads.get(file.identity) or b""
            if file.identity not in taken and _is_copy(file, head, segment, truncated):
                taken.add(file.identity)
                # A copy that `sed -i` has made shorter is not a new segment either.
                matched[index] = file if file.size >= segment.size else None
                break
    return matched, taken


def _holds(file: File, head: bytes | None, segment: SavedSegment) -> bool:
    # A file that cannot be read matches, so that the error of opening it is reported.
    return file.size >= segment.size and (head is None or segment.fingerprint.matches(head))


def _is_copy(file: File, head: bytes, segment: SavedSegment, truncated: bool) -> bool:
    if segment.sealed:
        return Fingerprint.of(head) == segment.fingerprint
    return (
        (truncated or segment.fingerprint.count == HEAD)
        and segment.fingerprint.matches(head)
        and file.modified >= segment.modified
    )
