"""The contracts on imports in pyproject.toml hold, and a wrong import breaks them."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from support.checkout import ROOT
from support.waiting import DEADLINE

CHECK = (
    "import sys; sys.path.insert(0, ''); from importlinter.cli import lint_imports; "
    "sys.exit(lint_imports(no_cache=True))"
)


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the contracts of the pyproject.toml in `folder`."""
    return subprocess.run(
        [sys.executable, "-c", CHECK],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=DEADLINE,
    )


@pytest.mark.slow
def test_contracts_are_kept() -> None:
    """All contracts on imports hold."""
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout
    assert " 0 broken" in done.stdout


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("protocol.py", "import socket"),
        ("segments.py", "import tailsrv.linux.files"),
        ("linux/sockets.py", "import tailsrv.protocol"),
        ("linux/files.py", "import tailsrv.shared_counts"),
        ("worker/streams.py", "import tailsrv.supervisor.client_table"),
        ("client/stream.py", "import tailsrv.worker_channel"),
        ("health/report.py", "import tailsrv.listeners"),
    ],
)
def test_wrong_import_is_found(tmp_path: Path, module: str, line: str) -> None:
    """A forbidden import, or a system module in a pure module, breaks a contract."""
    shutil.copytree(
        ROOT / "tailsrv", tmp_path / "tailsrv", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    file = tmp_path / "tailsrv" / module
    file.write_text(f"{file.read_text()}\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout
    assert "BROKEN" in done.stdout


def test_contracts_name_existing_modules() -> None:
    """Each module that a contract names exists: a contract on a missing module always holds."""
    listed = (ROOT / "pyproject.toml").read_text().partition("[tool.importlinter]")[2]
    files = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "tailsrv").rglob("*.py")]
    modules = {".".join(file.parts).removesuffix(".__init__") for file in files}
    assert set(re.findall(r"\"(tailsrv\.[.\w]+)", listed)) - modules == set()


def test_every_top_level_module_is_in_a_contract() -> None:
    """Each top-level module and package but __init__ and __main__ is named in a contract."""
    listed = (ROOT / "pyproject.toml").read_text().partition("[tool.importlinter]")[2]
    modules, packages = (ROOT / "tailsrv").glob("*.py"), (ROOT / "tailsrv").glob("*/__init__.py")
    names = {path.stem for path in modules} | {path.parent.name for path in packages}
    assert (
        names - {"__init__", "__main__"} - set(re.findall(r"\"tailsrv\.(\w+)\"", listed)) == set()
    )
