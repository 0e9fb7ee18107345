"""The direction of imports is a contract, in pyproject.toml; here it is kept, and seen to break."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from unit import PATIENCE, ROOT

CHECK = "import sys; sys.path.insert(0, ''); from importlinter.cli import lint_imports; sys.exit(lint_imports(no_cache=True))"


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    """Check the contracts of the pyproject.toml in `folder`."""
    return subprocess.run(
        [sys.executable, "-c", CHECK], cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, timeout=PATIENCE
    )


@pytest.mark.slow
def test_imports_go_down_the_list() -> None:
    """No module imports from its own group or from one above, and the pure ones make no system call."""
    done = lint_imports(ROOT)
    assert done.returncode == 0, done.stdout
    assert " 0 broken" in done.stdout


@pytest.mark.sample(1)
@pytest.mark.slow
@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("protocol.py", "import tailsrv.worker"),
        ("policy.py", "import socket"),
        ("streams.py", "import tailsrv.watch"),
        ("worker.py", "import tailsrv.cli"),
    ],
)
def test_wrong_import_is_found(tmp_path: Path, module: str, line: str) -> None:
    """An import up the list, sideways, or of a system call into a pure module breaks the contract."""
    shutil.copytree(ROOT / "tailsrv", tmp_path / "tailsrv", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    source = tmp_path / "tailsrv" / module
    source.write_text(f"{source.read_text()}\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode == 1, done.stdout
    assert "BROKEN" in done.stdout


def test_every_module_has_its_place() -> None:
    """A new module gets a place in the list: one that no contract names is bound by none."""
    listed = (ROOT / "pyproject.toml").read_text()
    files = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "tailsrv").rglob("*.py")]
    modules = {".".join(file.parts) for file in files if file.name not in ("__init__", "__main__")}
    places = set(re.findall(r"tailsrv[.\w]+", listed.partition("[tool.importlinter]")[2]))
    assert modules - places == set()
    assert places - modules == set(), "the list names what is not there"
