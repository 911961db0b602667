"""Notebooks that record: on the embedded testbed of this host, with real traffic."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from test_notebooks import FOLDER, _answer, _execute


@pytest.mark.parametrize("name", ["90_capture_on_your_host", "04_rps_rfs"])
def test_a_comparison_recorded_from_a_notebook(name, tmp_path):
    done = _execute(FOLDER / f"{name}.ipynb", tmp_path, live=True, reps=1, settings={"rps_cpus": "1"})
    text = _answer(done)
    if name.startswith("90"):
        assert "4 runs were recorded here" in text
        assert "nothing is changed" in text
    else:
        assert "host as it is" in text
        assert "not transferable to a NIC" in text


def test_the_curl_story_recorded_from_its_notebook(tmp_path):
    text = _answer(_execute(FOLDER / "01_one_packet.ipynb", tmp_path, live=True))
    assert text.startswith("**Answer:** `GET /index.html` took")
