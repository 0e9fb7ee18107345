"""The benchmark in contrib/bench leaves the promised files and refuses wrong results."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from support.checkout import ROOT
from support.interpreter import program
from support.tools import NOT_INSTALLED

BENCH = ROOT / "contrib/bench/bench.py"
CHARTS = ("latency.svg", "throughput.svg", "memory.svg", "workers.svg")
SVG = "{http://www.w3.org/2000/svg}"

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("cc", "gcc", "clang"))), reason=f"{NOT_INSTALLED}cc"
)


def run_bench(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *map(str, (BENCH, *arguments))]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )


def results(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "results.json").read_text())
    return found


@needs_compiler
@pytest.mark.thorough
@pytest.mark.slow
def test_leaves_figures_tables_and_charts(tmp_path: Path) -> None:
    """A quick run leaves plausible figures, a table with the ratios first, and four charts."""
    only = ("replay-64", "fanout-10", "mixed-20", "connect-500", "idle-10", "death-1000")
    done = run_bench(
        "--quick", "--workers", 1, "--no-socat", "--only", ",".join(only), "--output", tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert [f" {name}, round 1 of 1, tailsrv -w 1: " in done.stderr for name in only] == [
        True
    ] * len(only)

    found = results(tmp_path)
    assert found["machine"]["processors"] == len(os.sched_getaffinity(0))
    assert set(found["results"]) == set(only)
    for name, row in found["results"].items():
        figures = row["tailsrv -w 1"]["medians"]
        assert figures, name
        assert all(
            value > 0 for key, value in figures.items() if not key.endswith("_per_client")
        ), (name, figures)
    latency = found["results"]["mixed-20"]["tailsrv -w 1"]["medians"]
    assert latency["p50"] <= latency["p99"]
    assert 10 < found["results"]["idle-10"]["tailsrv -w 1"]["medians"]["pss"] < 200
    assert found["results"]["fanout-10"]["bare sender, 1"]["medians"]["last_p50"] > 0

    table = (tmp_path / "results.md").read_text()
    assert (
        -1
        < table.index("## Ratios to tailsrv -w 1")
        < table.index("## Figures")
        < table.index("## Headroom of the load generator")
    )
    assert "| replay-64 | throughput | 1.00 |" in table
    for name in CHARTS:
        chart = ET.parse(tmp_path / name).getroot()
        assert chart.tag == f"{SVG}svg"
        assert chart.findall(f"{SVG}circle"), name


@pytest.mark.sample(1)
@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("wrong", "byte 1000 is wrong"),
        ("more", "more bytes than the file has"),
        ("ends", "a stream ended after 4096 bytes"),
    ],
)
def test_wrong_stream_has_no_figures(tmp_path: Path, kind: str, reason: str) -> None:
    """A server that sends a wrong or extra byte, or ends its stream, gets a reason, no figures."""
    command = f"faulty={sys.executable} {program('lying_server')} {kind} {{port}} {{file}}"
    alone = ("--workers", 0, "--no-socat", "--no-bare")
    done = run_bench(
        "--quick", *alone, "--server", command, "--only", "fanout-10", "--output", tmp_path
    )
    assert done.returncode == 1
    assert reason in done.stderr.splitlines()[-1]
    cell = results(tmp_path)["results"]["fanout-10"]["faulty"]
    assert reason in cell["failed"]
    assert cell["medians"] == {}
    assert f"fanout-10: faulty: **failed**, {reason}" in (tmp_path / "results.md").read_text()


@pytest.mark.thorough
@needs_compiler
def test_server_that_does_not_start_is_reported(tmp_path: Path) -> None:
    """A server that exits at its start is reported with its last output."""
    command = """broken=sh -c 'echo no luck with {port} {file}; exit 7'"""
    alone = ("--workers", 0, "--no-socat", "--no-bare")
    done = run_bench(
        "--quick", *alone, "--server", command, "--only", "idle-10", "--output", tmp_path
    )
    assert done.returncode == 1
    assert "exited with status 7: no luck with" in done.stderr


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "arguments",
    [
        ("--rounds", "x"), ("--rounds", "0"), ("--only", "nonsense"), ("--server", "name"),
        ("--server", "name=no place"), ("--workers", "-1"), ("--clients", "0"), ("--what",),
    ],
)  # fmt: skip
def test_wrong_command_line_is_one_line(arguments: tuple[str, ...]) -> None:
    """A wrong command line ends with status 2 and one line."""
    done = run_bench(*arguments)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("bench: ")


def test_missing_compiler_is_one_line(tmp_path: Path) -> None:
    """A missing C compiler ends the run with one line and status 1."""
    done = run_bench("--quick", "--output", tmp_path, CC=str(tmp_path / "cc"))
    assert done.returncode == 1
    assert (
        done.stderr
        == f"bench: cannot run the C compiler {tmp_path}/cc: No such file or directory\n"
    )
