"""Tests of the descriptor limit, and of the processor count from cgroups(7) trees in a folder."""

import os
import resource
from pathlib import Path

import pytest

from support.interpreter import run_program
from tailsrv.linux.process import (
    _quotas,
    count_processors,
    raise_descriptor_limit,
    usable_processors,
)

AFFINITY = len(os.sched_getaffinity(0))


class Tree:
    """A membership file and a cgroup file system."""

    def __init__(self, folder: Path) -> None:
        self.membership = folder / "membership"
        self.cgroups = folder / "cgroup"
        self.cgroups.mkdir()

    def write(self, name: str, text: str) -> None:
        path = self.cgroups / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def quotas(self, membership: str) -> list[int]:
        """Return the quotas that are found, in thousandths of a processor."""
        self.membership.write_text(membership)
        return [quota * 1000 // period for quota, period in _quotas(self.membership, self.cgroups)]


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    """Give an empty tree."""
    return Tree(tmp_path)


@pytest.mark.parametrize("membership", ["", "0::/\n", "0::/a\n4:cpu:/a\n"])
def test_no_cgroups(tree: Tree, membership: str) -> None:
    """Without cgroup files only the affinity counts."""
    assert count_processors(tree.membership, tree.cgroups) == AFFINITY
    assert tree.quotas(membership) == []
    assert count_processors(tree.membership, tree.cgroups) == AFFINITY


def test_quota_is_taken_into_account(tree: Tree) -> None:
    """A quota of half a processor results in one worker."""
    tree.write("a/cpu.max", "50000 100000\n")
    assert tree.quotas("0::/a\n") == [500]
    assert count_processors(tree.membership, tree.cgroups) == 1


def test_this_machine() -> None:
    """On any machine the answer is between 1 and the number of processors in the affinity."""
    assert 1 <= count_processors() <= AFFINITY


@pytest.mark.parametrize(
    ("words", "quotas"),
    [
        ("max 100000\n", []),
        ("200000 100000\n", [2000]),
        ("250000 100000\n", [2500]),
        ("1000 100000\n", [10]),
        ("", []),
        ("junk\n", []),
    ],
)
def test_quota_and_period(tree: Tree, words: str, quotas: list[int]) -> None:
    """Quota and period are in one file, and `max` means no quota."""
    tree.write("a/b/cpu.max", words)
    assert tree.quotas("0::/a/b\n") == quotas


def test_outer_groups_count(tree: Tree) -> None:
    """The quotas of a group and of all groups above it are found."""
    tree.write("a/b/c/cpu.max", "400000 100000\n")
    tree.write("a/b/cpu.max", "max 100000\n")
    tree.write("a/cpu.max", "300000 100000\n")
    tree.write("cpu.max", "100000 50000\n")
    assert tree.quotas("0::/a/b/c\n") == [4000, 3000, 2000]


def test_other_groups_do_not_count(tree: Tree) -> None:
    """The quotas of sibling groups and of groups below are ignored."""
    for group in ("b", "a/below"):
        tree.write(f"{group}/cpu.max", "100000 100000\n")
    assert tree.quotas("0::/a\n") == []


@pytest.mark.parametrize("group", ["/docker/0123456789", "/../../elsewhere", "/..", "/"])
def test_group_that_is_not_in_the_tree(tree: Tree, group: str) -> None:
    """If the group's path leads nowhere, as in a container, the root's quota is used."""
    tree.write("cpu.max", "500000 100000\n")
    assert tree.quotas(f"0::{group}\n") == [5000]


def test_version_1_is_ignored(tree: Tree) -> None:
    """The quotas of version 1 do not count, and a group's name may contain colons."""
    tree.write("cpu/a/cpu.cfs_quota_us", "300000\n")
    tree.write("cpu/a/cpu.cfs_period_us", "100000\n")
    tree.write("a/cpu.max", "100000 100000\n")
    tree.write("x:y/cpu.max", "200000 100000\n")
    tree.write("cpu.max", "500000 100000\n")
    assert tree.quotas("4:cpu:/a\n1:name=systemd:/a\n0::/x:y\n") == [2000, 5000]


@pytest.mark.parametrize(
    ("affinity", "quotas", "processors"),
    [
        (8, [], 8),
        (8, [(200_000, 100_000)], 2),
        (8, [(150_000, 100_000)], 2),
        (8, [(1_000, 100_000)], 1),
        (2, [(800_000, 100_000)], 2),
        (8, [(400_000, 100_000), (300_000, 100_000), (500_000, 100_000)], 3),
        (8, [(-1, 100_000)], 8),
        (8, [(0, 100_000), (100_000, 0)], 8),
        (1, [(50_000, 100_000)], 1),
    ],
)
def test_usable_processors(affinity: int, quotas: list[tuple[int, int]], processors: int) -> None:
    """The smallest quota counts, rounded up and at least 1; invalid quotas are ignored."""
    assert processors == usable_processors(affinity, quotas)


def test_raise_limit() -> None:
    """The soft limit is raised to the hard limit, which is returned."""
    done = run_program("soft_limit")
    assert (done.returncode, done.stderr) == (0, "")


def test_raise_limit_here() -> None:
    """If both limits are equal, nothing is changed."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[0] != before[1]:
        pytest.skip("the limits of this process differ, and this test must not change them")
    assert raise_descriptor_limit() == before[1]


def test_occupy_standard() -> None:
    """occupy_standard() opens the standard descriptors that are closed, and no others."""
    done = run_program("closed_standard_input")
    assert (done.returncode, done.stderr) == (0, "")
