"""A bounded run of each fuzzer; the long ones are run by hand, see tests/fuzz."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).parent / "fuzz"


@pytest.mark.parametrize("reader", ["perfdata", "pcap"])
def test_mutated_files(reader: str, tmp_path: Path) -> None:
    command = [sys.executable, str(FUZZ / f"fuzz_{reader}.py"), "200", "--first", "1000000", "--keep", str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
    assert run.stdout.startswith("cases 1000000 to 1000199")


@pytest.mark.parametrize("reader", ["perfdata", "pcap"])
def test_coverage_guided(reader: str, tmp_path: Path) -> None:
    pytest.importorskip("atheris", reason="no wheel of atheris for this interpreter")
    # No seeds but the empty file: they would take longer than the run.
    (tmp_path / "seeds").mkdir()
    command = [
        sys.executable,
        str(FUZZ / "atheris_readers.py"),
        reader,
        "-runs=200",
        "-seed=1",
        str(tmp_path / "seeds"),
    ]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert run.returncode == 0, run.stderr[-2000:]
    assert "Done 200 runs" in run.stderr


def test_a_broken_promise_is_found(tmp_path: Path) -> None:
    # The judge itself: a reader that loses samples, raises anything else or is slow must not pass.
    code = f"""
import sys, time; sys.path.insert(0, {str(FUZZ)!r})
import harness
def read(path, case):
    if case == 1: raise ValueError("not one of ours")
    if case == 2: return "WRONG: rows differ"
    if case == 3:
        end = time.process_time() + 1.1
        while time.process_time() < end: pass
    return "read"
target = harness.Target("", lambda: [b"x"], lambda seeds, case: b"y", read)
from pathlib import Path
sys.exit(harness.work(target, 0, 5, Path({str(tmp_path)!r})))
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert run.returncode == 1
    assert "3 WRONG, 2 read" in run.stdout
