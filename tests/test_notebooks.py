"""Notebooks are kept without outputs, ask one question and answer it, and run on the recorded data.

``RXLAB_NOTEBOOK_DATA`` names another folder of recorded runs than ``data/``.
"""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
NAMES = (
    "00_start_here", "01_one_packet", "02_align_clocks", "03_where_time_goes", "04_rps_rfs", "05_irq_and_cpu_affinity",
    "06_observer_effect", "07_slowest_packets", "08_kernel_function_log", "90_capture_on_your_host", "99_report",
)  # fmt: skip
LONGEST_CELL = 30
# Nobody waits longer for a page of results.
TIMEOUT = 240


@pytest.fixture(params=NOTEBOOKS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


def _parameters(notebook) -> nbformat.NotebookNode:
    cells = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert len(cells) == 1, "one cell is tagged 'parameters'"
    return cells[0]


def test_the_promised_notebooks_are_there():
    assert {path.stem for path in NOTEBOOKS} >= set(NAMES)


def test_nothing_executed_is_kept(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == []
            assert cell.execution_count is None
    assert notebook.metadata.kernelspec.name == "python3"


def test_parameters_say_live_iface_settings_and_run(notebook):
    source = _parameters(notebook).source
    given: dict = {}
    exec(source, given)
    assert given["live"] is False, "by default nothing is recorded"
    assert {"iface", "settings"} <= set(given)
    paths = [given["run"]] if "run" in given else given["runs"]
    assert all(path.startswith("../data/") for path in paths)


def test_one_question_first_and_its_answer_last(notebook):
    assert re.search(r"\*\*Question: .+\?\*\*", notebook.cells[0].source)
    assert "**Answer:**" in notebook.cells[-1].source


def test_cells_are_short(notebook):
    for cell in notebook.cells:
        assert len(cell.source.splitlines()) <= LONGEST_CELL, cell.source[:80]


def _execute(path: Path, scratch: Path, **parameters) -> nbformat.NotebookNode:
    """Execute a notebook as papermill does: the given parameters in a cell after the tagged one; its files go to `scratch`."""
    notebook = nbformat.read(path, as_version=4)
    where = notebook.cells.index(_parameters(notebook)) + 1
    injected = nbformat.v4.new_code_cell("\n".join(f"{name} = {value!r}" for name, value in parameters.items()))
    notebook.cells.insert(where, injected)
    client = NotebookClient(
        notebook, timeout=TIMEOUT, kernel_name="python3", resources={"metadata": {"path": str(scratch)}}
    )
    client.execute(env={**os.environ, "TMPDIR": str(scratch)})
    return notebook


def _answer(notebook) -> str:
    """Return what the last cell says."""
    outputs = notebook.cells[-1].outputs
    assert outputs, "the last cell answers"
    return "".join(outputs[-1].data["text/markdown"])


def _data() -> Path:
    folder = Path(os.environ.get("RXLAB_NOTEBOOK_DATA", FOLDER.parent / "data"))
    if not any(folder.glob("*/run.json")):
        pytest.skip(f"no recorded runs in {folder}")
    return folder


def _recorded(path: Path, tmp_path: Path) -> dict:
    """Return the parameters that point a notebook at the recorded runs and at a scratch folder."""
    given: dict = {}
    exec(_parameters(nbformat.read(path, as_version=4)).source, given)
    data = _data()

    def found(text: str) -> str:
        run = data / Path(text).name
        assert run.is_dir(), f"{path.name} reads {text}, which is not in {data}"
        return str(run)

    parameters: dict = {"runs": [found(run) for run in given["runs"]]} if "runs" in given else {}
    for name, value in given.items():
        if isinstance(value, str) and value.startswith("../data/"):
            parameters[name] = found(value)
    if "out" in given:
        parameters["out"] = str(tmp_path / "report.html")
    return parameters


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_on_recorded_data_and_answers(path, tmp_path):
    started = time.monotonic()
    done = _execute(path, tmp_path, **_recorded(path, tmp_path))
    print(f"{path.stem}: {time.monotonic() - started:.1f} s")
    text = _answer(done)
    assert text.startswith("**Answer:**")
    assert re.search(r"\d", text)
    assert "nan" not in text.lower().split()
    if path.stem == "01_one_packet":
        _check_the_curl_story(done)


def _check_the_curl_story(done) -> None:
    """Check that it shows the request line and the kernel's functions."""
    printed = "".join(
        output.get("text", "") for cell in done.cells if cell.cell_type == "code" for output in cell.outputs
    )
    assert re.search(r"^GET /\S* -> host \S+ -> status 200", printed, flags=re.M)
    assert "__netif_receive_skb_core (net/core/dev.c)" in printed
    assert "tcp_rcv_established" in printed
    assert "GET /" in _answer(done)
