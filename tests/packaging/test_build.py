"""What the build puts into a wheel, from a checkout and from a source distribution."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import tailsrv
from support.checkout import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

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
    )
    return out / printed.splitlines()[-1]


@pytest.fixture(scope="module")
def share(sources: Path, requirements: Path) -> Path:
    """Return the folder PREFIX/share of an installation from the source distribution."""
    sdist = call_backend("build_sdist", sources, requirements)
    out = sources.parent / "wheel"
    # pip builds in isolation, with only the declared requirements installed.
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", out, sdist)
    (wheel,) = out.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(out)
    return out / f"tailsrv-{tailsrv.__version__}.data/data/share"


def contents(folder: Path) -> dict[str, str]:
    """Return the contents of the files below the folder, by path."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_text() for path in files}


def test_shared_files_are_installed(share: Path) -> None:
    """The wheel has the manual pages and completions of the checkout, and no other files."""
    assert contents(share) == contents(ROOT / "share")


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
    assert sorted(names) == sorted(contents(share))
    assert {path.name for path in sources.iterdir()} - before <= {
        "build",
        "tailsrv.egg-info",
        "__pycache__",
    }
